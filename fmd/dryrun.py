"""Try a run before paying for it: ``python -m fmd.train EXPERIMENT VARIANT --dry-run``."""

from __future__ import annotations

import shutil
from contextlib import suppress
from functools import partial

import torch.distributed as dist

from fmd.build import open_data
from fmd.config import RunConfig
from fmd.cost import estimate_lines
from fmd.counting import count_step, networks
from fmd.errors import FmdError, OutOfTime
from fmd.processes import join
from fmd.train import steps_of_epoch, train, worth_compiling

CPU_MICRO_BATCH = 4
STEPS = {"cuda": 8, "cpu": 2}  # of an epoch; the first one after a start is not timed
VAL_IMAGES = 128  # enough to tell a teacher from one that guesses
FOLDER = "dry-run"  # in the place of the variant, for what the trial writes


def dry_run(config: RunConfig, device: str | None = None, workers: int | None = None) -> str:
    """A few steps of everything, thrown away; says what worked and what the run would cost.

    The training loop itself makes them, as short epochs: evaluation and checkpoint after the first,
    then a new start from the checkpoint, the rest, and the record. On a CPU a step has few images,
    for a whole one would take minutes.

    Raises:
        FmdError: as :func:`fmd.train.train`.
    """
    here = join(device)
    small = {"variant": f"{FOLDER}/{config.variant}", "epochs": 2, "warmup_epochs": 0}
    if here.device.type == "cpu":
        small |= {"micro_batch": CPU_MICRO_BATCH, "batch_size": 2 * CPU_MICRO_BATCH * here.world}
    trial = config.model_copy(update=small)
    images = STEPS[here.device.type] * trial.batch_size
    if trial.repeats > 1 and images > 256:
        images += -images % 256  # what an epoch is cut to
    data = open_data(trial, workers)
    train_images = data.size("train")
    try:
        compile, lacking = worth_compiling(config, steps_of_epoch(config, data), here.device), ""
    except FmdError as error:  # on a CPU a few images are enough to try everything on
        compile, lacking = False, f"; but the run itself will say: {error}"
    data = data.sample(images, 2 * here.world if config.teacher_weights == "random" else VAL_IMAGES)
    steps = steps_of_epoch(trial, data)  # fewer than asked for, if there are few images
    if steps == 1:  # the first step of a call is not timed
        trial = trial.model_copy(update={"epochs": 3})
    attempt = partial(train, trial, device=here.device, compile=compile, data=data)
    if here.rank == 0:
        _clean(trial)
    if here.world > 1:
        dist.barrier()
    try:
        with suppress(OutOfTime):
            attempt(max_minutes=0, progress=False)
        record = attempt()
    finally:  # without waiting: others may wait for this process elsewhere
        if here.rank == 0:
            _clean(trial)
    rate = record.timing.images_per_second
    who = f"{here.world} x {record.device}" if here.world > 1 else record.device
    return (
        f"dry run on {who}, {record.precision}: {trial.epochs * steps} steps of "
        f"{trial.batch_size} images, evaluation, checkpoint, resume and record work{lacking}\n"
        f"{record.parameters / 1e6:.1f} M parameters; {rate:.1f} images/s and "
        f"{record.timing.peak_memory_mb:.0f} MB measured\n"
        + estimate_lines(config, count_step(config, *networks(config)), 1 / rate, train_images)
    )


def _clean(trial: RunConfig) -> None:
    for kind in ("runs", "weights", "checkpoints"):
        folder = trial.path(kind, "").parent
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another dry run may be under way
            folder.parent.rmdir()
