"""Try a run before paying for it: ``python -m fmd.train EXPERIMENT VARIANT --dry-run``."""

from __future__ import annotations

import shutil

import torch.distributed as dist

from fmd.build import open_data
from fmd.config import RunConfig, results_dir
from fmd.cost import estimate_lines
from fmd.errors import OutOfTime
from fmd.processes import join
from fmd.train import train

CPU_MICRO_BATCH = 4
FOLDER = "dry-run"  # in the place of the variant, for what the trial writes


def dry_run(config: RunConfig, device: str | None = None, workers: int | None = None) -> str:
    """Three steps of everything, thrown away; says what worked and what the run would cost.

    The training loop itself makes them, as epochs of one step each: evaluation and checkpoint after
    the first, then a new start from the checkpoint, two more, and the record. On a CPU a step has
    few images, for a whole one would take minutes.

    Raises:
        FmdError: as :func:`fmd.train.train`.
    """
    here = join(device)
    small = {"variant": f"{FOLDER}/{config.variant}", "epochs": 3, "warmup_epochs": 0}
    if here.device.type == "cpu":
        small |= {"micro_batch": CPU_MICRO_BATCH, "batch_size": 2 * CPU_MICRO_BATCH * here.world}
    trial = config.model_copy(update=small)
    images = trial.batch_size
    if trial.repeats > 1 and images > 256:
        images += -images % 256  # what an epoch is cut to
    data = open_data(trial, workers)
    train_images = data.train_size
    data = data.sample(images, 2 * here.world)
    _clean(trial, here)
    try:
        try:
            train(trial, device=here.device, max_minutes=0, data=data, progress=False)
        except OutOfTime:
            pass
        record = train(trial, device=here.device, data=data)
    finally:
        _clean(trial, here)
    seconds = trial.batch_size / record.timing.images_per_second
    who = f"{here.world} x {record.device}" if here.world > 1 else record.device
    return (
        f"dry run on {who}, {record.precision}: three steps of {trial.batch_size} images, "
        f"evaluation, checkpoint, resume and record work\n"
        f"{record.parameters / 1e6:.1f} M parameters; "
        f"{record.timing.images_per_second:.1f} images/s and {record.timing.peak_memory_mb:.0f} MB "
        "measured\n" + estimate_lines(config, seconds / trial.batch_size, train_images)
    )


def _clean(trial: RunConfig, here) -> None:
    if here.rank == 0:
        for kind in ("runs", "weights", "checkpoints"):
            shutil.rmtree(results_dir() / kind / trial.experiment / FOLDER, ignore_errors=True)
    if here.world > 1:
        dist.barrier()
