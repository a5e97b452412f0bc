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
    images: int = 0  # trained on in the seconds of a step's parts
    resumed: int = 0
    corrupt: list[str] = field(default_factory=list)  # images that could not be decoded


def save(
    path: Path, config: RunConfig, conditions: dict, state: Progress, task, optimizer, scaler, best
) -> None:
    """Write a checkpoint; raises :class:`FmdError` and keeps the old one if it cannot.

    ``conditions`` are not settings, but the numbers depend on them as well.
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
            "student": task.get_eval_model().state_dict(),
            "ema": task.get_eval_model(ema=True).state_dict() if task.has_ema() else None,
            "best": best,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def restore(
    path: Path, config: RunConfig, conditions: dict, state: Progress, task, optimizer, scaler
) -> dict[str, Tensor] | None:
    """Load a checkpoint in place; returns the best weights so far.

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
    parts = saved["progress"].keys(), saved["conditions"].keys()
    if parts != (vars(state).keys(), conditions.keys()):
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
    task.get_eval_model().load_state_dict(saved["student"])
    if task.has_ema():
        task.get_eval_model(ema=True).load_state_dict(saved["ema"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    device = state.sums.device
    for name, value in saved["progress"].items():
        setattr(state, name, value)
    state.sums = state.sums.to(device)
    state.epochs = [Epoch(**epoch) for epoch in state.epochs]
    state.resumed += 1
    return saved["best"]
