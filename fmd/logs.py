"""What a run leaves behind while it trains: curves for TensorBoard and for a notebook."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter

from fmd.config import RunConfig
from fmd.errors import FmdError
from fmd.records import Epoch, write_atomically

_EPOCHS = TypeAdapter(list[Epoch])


def log_folder(config: RunConfig) -> Path:
    return config.path("logs", "")


def logger(config: RunConfig) -> Callable[[list[Epoch]], None]:
    """A function for ``fmd.train.train(on_epoch=…)`` that logs each epoch.

    Raises :class:`FmdError` if TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise FmdError("--log needs TensorBoard: pip install tensorboard") from None
    folder, writer = log_folder(config), None

    def log(epochs: list[Epoch]) -> None:
        nonlocal writer
        last = epochs[-1]
        if writer is None:
            # A run that was killed may repeat epochs that are in the log already.
            writer = SummaryWriter(folder, purge_step=last.epoch)
        values = {f"train/{name}": value for name, value in last.train.items()}
        values |= {"val/top1": last.val.top1, "val/loss": last.val.loss, "lr": last.lr}
        if last.val_ema is not None:
            values["val/top1_ema"] = last.val_ema.top1
        for name, value in values.items():
            writer.add_scalar(name, value, last.epoch)
        writer.flush()
        write_atomically(folder / "epochs.json", _EPOCHS.dump_json(epochs))

    return log


def read_log(config: RunConfig) -> list[Epoch]:
    """The epochs logged so far; none if the run has not come that far."""
    path = log_folder(config) / "epochs.json"
    return _EPOCHS.validate_json(path.read_bytes()) if path.exists() else []
