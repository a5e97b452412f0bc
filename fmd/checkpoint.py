"""Where a run stands: written whole or not at all, and read back exactly."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fmd.config import RunConfig
from fmd.errors import FmdError
from fmd.records import Epoch, write_atomically


@dataclass
class Progress:
    """Where a run stands, and what it has measured so far. Stored in the checkpoint."""

    sums: Tensor  # of each loss term over the steps of this epoch
    parts: dict[str, float]  # seconds of each of fmd.records.PARTS
    epoch: int = 0
    step: int = 0  # steps done in this epoch
    epochs: list[Epoch] = field(default_factory=list)
    best_epoch: int = 0
    best_weights: dict[str, Tensor] | None = None  # of that epoch
    images: int = 0  # trained on in the seconds of a step's parts
    resumed: int = 0
    corrupt: list[str] = field(default_factory=list)  # images that could not be decoded


def save(path: Path, config: RunConfig, conditions: dict, state: Progress, stateful: dict) -> None:
    """Write a checkpoint; raises :class:`FmdError` and keeps the old one if it cannot.

    ``conditions`` are not settings, but the numbers depend on them as well; ``stateful`` are
    networks, optimizer and scaler, by name.
    """
    buffer = io.BytesIO()
    torch.save(
        {
            "key": config.key,
            "conditions": conditions,
            "progress": {
                **vars(state),
                "epochs": [epoch.model_dump() for epoch in state.epochs],
            },
            "states": {name: each.state_dict() for name, each in stateful.items()},
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def restore(
    path: Path, config: RunConfig, conditions: dict, state: Progress, stateful: dict
) -> None:
    """Load a checkpoint in place.

    Raises :class:`FmdError` for a damaged file, or one of other settings or conditions.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch does not look at the checksums
                raise ValueError("damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        key = saved["key"]
    except Exception as error:
        raise FmdError(f"{path} is not a whole checkpoint: delete it to start again") from error
    if key != config.key:
        raise FmdError(f"{path} belongs to a run with other settings: move it away to start again")
    fields = saved["progress"].keys(), saved["conditions"].keys()
    if fields != (vars(state).keys(), conditions.keys()):
        raise FmdError(
            f"{path} was written by another version of this code: go on with that, or move it away "
            "to start again"
        )
    if saved["conditions"] != conditions:
        changed = "; ".join(
            f"{name}: {saved['conditions'][name]}, now {value}"
            for name, value in conditions.items()
            if saved["conditions"][name] != value
        )
        raise FmdError(
            f"{path} was written under other conditions ({changed}): go on under those, or move it "
            "away to start again"
        )
    for name, each in stateful.items():
        each.load_state_dict(saved["states"][name])
    progress = saved["progress"]
    progress["sums"] = progress["sums"].to(state.sums.device)
    progress["epochs"] = [Epoch(**epoch) for epoch in progress["epochs"]]
    vars(state).update(progress)
    state.resumed += 1
