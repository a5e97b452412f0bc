"""One training run, from settings to record: a linear loop that can be killed and resumed exactly.

Every random number of a step (augmentation, mixing, dropped paths, drawn patches) follows from the
run's seed, the epoch, the step and the process, so a checkpoint needs no generator states and a
resumed run is the same run, on a CPU to the last bit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from timm.utils import distribute_bn, random_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmd import checkpoint
from fmd.build import (
    build_mixup,
    build_model,
    build_optimizer,
    build_schedule,
    build_task,
    check_teacher,
    load_start,
    load_teacher,
    open_data,
)
from fmd.checkpoint import Progress
from fmd.config import RunConfig, load_experiment, parse_overrides
from fmd.cost import find_gpu
from fmd.counting import count_step
from fmd.data import ImageData
from fmd.errors import FmdError, OutOfTime
from fmd.evaluate import evaluate, measure_agreement, measure_relations
from fmd.logs import logger
from fmd.models import fingerprint, narrow
from fmd.photos import PhotoFolder
from fmd.processes import (
    any_past,
    average,
    deadline,
    device_name,
    gather,
    join,
    run_together,
)
from fmd.records import (
    STEP_PARTS,
    Epoch,
    Evaluation,
    Record,
    Timing,
    finished,
    provenance,
    write_atomically,
    write_record,
)
from fmd.timing import Stopwatch

CHECKPOINT_SECONDS = 20  # between checkpoints, at ends of epochs; does not affect the numbers
CHECKPOINT_SECONDS_WITHIN = 300  # the same within an epoch
# Steps between looks at the losses, which make the host wait for the device. Several processes
# average their sums then: a record depends on this in its last bits, not on times of checkpoints.
CHECK_EVERY = 50
COMPILE_FROM = 2000  # steps of a run: compiling takes 20 s to minutes, which fewer do not repay


def train(
    config: RunConfig,
    *,
    device: str | torch.device | None = None,
    max_minutes: float | None = None,
    compile: bool | None = None,
    workers: int | None = None,
    progress: bool = True,
    on_epoch: Callable[[list[Epoch]], None] | None = None,
    data: ImageData | PhotoFolder | None = None,
) -> Record:
    """Train, evaluate and record one run, going on from its checkpoint if there is one.

    Args:
        config: from :meth:`fmd.config.Experiment.run` or ``teacher_run``.
        device: a GPU if there is one, else the CPU.
        max_minutes: checkpoint and raise :class:`OutOfTime` after this long.
        compile: ``torch.compile`` the task; by default as :func:`worth_compiling` says.
        workers: processes that decode photographs; all cores' share by default.
        progress: show a bar.
        on_epoch: called with the epochs so far after each one, to draw curves.
        data: what ``open_data(config)`` gave, if it is open already.

    Returns:
        The record, also written to ``results/runs/``; a run that has one is not repeated.

    Raises:
        FmdError: wrong settings, a missing teacher, a checkpoint of other settings, a loss that is
            not finite, weights that ``half_weights`` cannot hold, or files that cannot be read or
            written.
    """
    record = finished(config)
    if record is not None:
        return record
    end = deadline(max_minutes)
    here = join(device)
    device = here.device
    stopwatch = Stopwatch(device)
    micro_batches = _micro_batches_of_step(config, here.world)
    own_micro_batches = range(here.rank, micro_batches, here.world)
    precision = _precision(config.precision, device)
    code = provenance()
    data = data if data is not None else open_data(config, workers)
    steps = steps_of_epoch(config, data)
    data.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    torch.manual_seed(config.seed)
    student = build_model(config, data)
    if config.init is not None:
        load_start(student, config.init)
    teacher, teacher_note = load_teacher(config, data, device)
    gpu = find_gpu(device_name(device)) if precision != torch.float32 else None
    seconds_per_image_at_peak = None  # of this GPU's rate
    if gpu is not None:
        cost = count_step(config, student, teacher, data.image_shape)
        # A backward pass is two forward ones: torch overcounts that of grouped convolutions.
        flops = cost.teacher_flops + 3 * cost.forward_flops
        seconds_per_image_at_peak = flops / (gpu.tflops * 1e12)
    task = build_task(config, student, teacher, device, precision)
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    if teacher is not None and teacher.num_classes:  # else it gives features alone
        teacher_note.val_top1 = check_teacher(config, task, data, autocast)
    relations = {}
    if teacher is not None and config.student_layers:
        relations["before"] = measure_relations(config, task, teacher, data)
    optimizer = build_optimizer(config, student)
    set_lr = build_schedule(config, optimizer, steps)
    if config.ema_decay is not None:
        task.setup_ema(decay=config.ema_decay)
    averaged = task.get_eval_model(ema=True)
    models = {"student": student} if averaged is None else {"student": student, "ema": averaged}
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    stateful = {**models, "optimizer": optimizer, "scaler": scaler}
    mixup = build_mixup(config, data.num_classes)
    if mixup is not None and config.batch_size // micro_batches % 2:
        raise FmdError(
            f"mixup and cutmix pair images: {config.batch_size // micro_batches} in a forward "
            "pass must be even"
        )

    terms = ["loss", "base"]
    if config.alpha:
        terms.append("logit")
    if task.manifold is not None:
        terms += task.manifold.weights
    sums = torch.zeros(len(terms), device=device)
    state = Progress(sums=sums, parts=stopwatch.seconds)
    conditions = {
        "precision": str(precision),
        "forward passes a step": micro_batches,
        "data": data.fingerprint,
        "teacher": teacher_note and teacher_note.fingerprint,
    }
    place = config.path("checkpoints", ".pt")
    resumes = place.exists()
    if resumes:
        checkpoint.restore(place, config, conditions, state, stateful)
        stopwatch.seconds = state.parts
    if len(set(gather((resumes, state.epoch, state.step)))) > 1:
        raise FmdError(
            f"the processes see different checkpoints at {place}: FMD_RESULTS must be a folder "
            "that all machines share"
        )
    set_lr(state.epoch, state.step)
    if here.world > 1:
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
    if compile if compile is not None else worth_compiling(config, steps, device):
        task.compile()
        data.compile()

    def lr() -> float:
        return optimizer.param_groups[0]["lr"]

    def all_corrupt() -> list[str]:
        return sorted(set().union(state.corrupt, *gather(data.corrupt)))

    def save_checkpoint():
        # After a finite loss the weights may still be broken: keep the good checkpoint then.
        finite = torch.stack([p.isfinite().all() for p in student.parameters()])
        if not finite.all():  # one look for all: each makes the host wait for the device
            raise _not_finite("weights", state.epoch, state.step, lr(), place)
        if config.half_weights:
            narrow(student.state_dict())  # what does not fit is found out now, not after training
        state.corrupt = all_corrupt()
        if here.rank == 0:
            checkpoint.save(place, config, conditions, state, stateful)
            if state.best_weights is not None:
                _write_weights(config, "-best", state.best_weights)
            if averaged is not None:
                _write_weights(config, "-ema", _weights(averaged))
        if here.world > 1:
            dist.barrier()  # none goes on, or starts anew, from an older checkpoint

    def pause(interval: float) -> None:
        """Save if that is due or time is up, which ends the call unless all steps are done."""
        nonlocal last_saved
        done = state.epoch == config.epochs
        out_of_time, due = any_past(end, last_saved + interval)
        if out_of_time or due or done:
            save_checkpoint()
            stopwatch.settle("checkpoints")
            last_saved = time.monotonic()
        if out_of_time and not done:
            share = (state.epoch * steps + state.step) / (config.epochs * steps)
            raise OutOfTime(
                f"time is up at {share:.0%} of {config.name}; "
                f"{place} is written, and the same call goes on from there"
            )

    if not resumes:
        save_checkpoint()  # a folder that takes no files is found out now, not after training
    last_saved = time.monotonic()
    bar = tqdm(
        total=config.epochs * steps,
        initial=state.epoch * steps + state.step,
        desc=f"{config.experiment}/{config.variant}/{config.seed}",
        unit="step",
        disable=not progress or here.rank > 0,
        # A file that takes the output for days need not hold every second.
        mininterval=1.0 if sys.stdout.isatty() or "ipykernel" in sys.modules else 15.0,
        file=sys.stdout,
    )
    warm = False
    with bar:
        while state.epoch < config.epochs:
            task.train()
            recent: list[tuple[int, float, Tensor]] = []
            order = data.order(config.seed, state.epoch)
            places = [(step, j) for step in range(state.step, steps) for j in own_micro_batches]
            plan = [
                order[step * config.batch_size : (step + 1) * config.batch_size][j::micro_batches]
                for step, j in places
            ]
            seeds = [_derive(config.seed, state.epoch, *where) for where in places]
            batches = zip(seeds, data.chunks(plan, seeds))
            while state.step < steps:
                losses = torch.zeros_like(state.sums)
                for j in own_micro_batches:
                    seed, (images, target) = next(batches)
                    random_seed(seed)  # all that a step draws from: torch, NumPy and Python
                    if config.augment:
                        images = data.training_images(images)
                    else:
                        images = data.normalize(images)
                    if mixup is not None:
                        images, target = mixup(images, target)
                    stopwatch.lap("batches")
                    # The gradients of a step are summed over the processes once.
                    last = j == own_micro_batches[-1]
                    with nullcontext() if last else task.no_sync():
                        with autocast:
                            result = task(images, target)
                        stopwatch.lap("forward")
                        scaler.scale(result["loss"] / len(own_micro_batches)).backward()
                    losses += torch.stack([result[name].detach().float() for name in terms])
                    stopwatch.lap("backward")
                losses /= len(own_micro_batches)
                if config.clip_grad is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(student.parameters(), config.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                recent.append((state.step, lr(), losses))
                state.sums += losses
                state.step += 1
                set_lr(state.epoch, state.step)
                task.update_ema()  # without a step, timm averages from the first one on
                stopwatch.lap("update")
                bar.update()
                if warm:
                    state.images += config.batch_size
                else:  # the first step compiles, which is not what a step costs
                    stopwatch.settle("preparation")
                    warm = True
                if len(recent) < CHECK_EVERY and state.step < steps:
                    continue
                _check_finite(recent, terms, state.epoch, place)
                average(state.sums)
                stopwatch.settle("update")
                recent.clear()
                if state.step == steps:
                    break
                pause(CHECKPOINT_SECONDS_WITHIN)

            if here.world > 1:  # batch norm's averages are those that the first process stores
                for model in models.values():
                    distribute_bn(model, here.world)
            val = evaluate(student, data, "val", autocast)
            if not np.isfinite(val.loss):
                raise _not_finite("validation loss", state.epoch, state.step, lr(), place)
            ema = None
            if averaged is not None:
                ema = evaluate(averaged, data, "val", autocast)
            means = dict(zip(terms, (state.sums / steps).tolist()))
            state.epochs.append(
                Epoch(epoch=state.epoch, lr=lr(), train=means, val=val, val_ema=ema)
            )
            best = state.epochs[state.best_epoch]
            if state.best_weights is None or val.top1 > best.val.top1:
                state.best_epoch = state.epoch
                state.best_weights = _weights(student)
            state.epoch, state.step = state.epoch + 1, 0
            set_lr(state.epoch, 0)
            state.sums.zero_()
            bar.set_postfix(loss=f"{means['loss']:.3f}", val=f"{val.top1:.1f}%", refresh=False)
            if on_epoch is not None and here.rank == 0:
                on_epoch(state.epochs)
            stopwatch.settle("evaluation")
            pause(CHECKPOINT_SECONDS)

    if not warm:  # all steps were done before
        stopwatch.settle("preparation")
    if config.half_weights:
        # The network that is measured and named by its fingerprint is the one in the file.
        state.best_weights = narrow(state.best_weights)
        for model in models.values():
            model.load_state_dict(narrow(model.state_dict()))
    if relations:
        relations["after"] = measure_relations(config, task, teacher, data)
        relations |= {name: getattr(config, name) for name in ("student_layers", "teacher_layers")}
    test = _test(config, task, student, teacher, state.best_weights, data, autocast)
    corrupt = all_corrupt()
    stopwatch.settle("evaluation")
    in_steps = sum(state.parts[part] for part in STEP_PARTS)
    images_per_second = state.images / max(in_steps, 1e-9)
    share_of_peak = None
    if seconds_per_image_at_peak is not None:
        share_of_peak = round(seconds_per_image_at_peak * images_per_second / here.world, 4)
    record = Record(
        config=config,
        key=config.key,
        **code,
        device=device_name(device),
        precision=str(precision).removeprefix("torch."),
        world_size=here.world,
        data=data.describe() | ({"corrupt": len(corrupt)} if config.skip_corrupt else {}),
        parameters=sum(p.numel() for p in student.parameters()),
        teacher=teacher_note,
        fingerprint=fingerprint(student),
        epochs=state.epochs,
        best_epoch=state.best_epoch,
        test=test,
        relations=relations or None,
        timing=Timing(
            seconds=round(sum(state.parts.values()), 3),
            parts={part: round(seconds, 3) for part, seconds in state.parts.items()},
            images_per_second=round(images_per_second, 1),
            share_of_peak=share_of_peak,
            peak_memory_mb=round(_peak_memory(device), 1),
            resumed=state.resumed,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
    if here.rank == 0:
        # The best and the averaged weights went with the last checkpoint.
        _write_weights(config, "", _weights(student))
        write_record(record)
        place.unlink(missing_ok=True)
    if here.world > 1:
        dist.barrier()  # the next run of any process may need these files
    return record


def steps_of_epoch(config: RunConfig, data) -> int:
    """Steps that an epoch has, without a last one of fewer images; at least one."""
    steps = len(data.order(config.seed, 0)) // config.batch_size
    if not steps:
        raise FmdError(
            f"batch_size {config.batch_size} exceeds the {data.size('train')} training images"
        )
    return steps


def worth_compiling(config: RunConfig, steps: int, device: torch.device) -> bool:
    """Whether a run of so many steps an epoch is compiled: on a GPU, if it is long."""
    return device.type == "cuda" and config.epochs * steps >= COMPILE_FROM


def _test(config, task, student, teacher, best_weights, data, autocast) -> Evaluation:
    """Read the test images, for the last and the best weights."""
    last = evaluate(student, data, "test", autocast)
    ema = (
        evaluate(task.get_eval_model(ema=True), data, "test", autocast) if task.has_ema() else None
    )
    agreement = None
    if teacher is not None and teacher.num_classes:
        # To compile the teacher once more, for batches of another size, takes longer than they do.
        with torch.compiler.set_stance("force_eager"):
            agreement = measure_agreement(task, data, autocast)
    best_model = build_model(config, data)
    best_model.load_state_dict(best_weights)
    best = evaluate(best_model.to(task.device), data, "test", autocast)
    return Evaluation(last=last, best=best, ema=ema, agreement=agreement)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights on the CPU, which stays as it is while the model trains on."""
    return {k: v.to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}


def _write_weights(config: RunConfig, suffix: str, weights: dict[str, Tensor]) -> None:
    content = save(narrow(weights) if config.half_weights else weights)
    write_atomically(config.path("weights", f"{suffix}.safetensors"), content)


def _derive(*numbers: int) -> int:
    """A seed from a tuple of numbers; different tuples give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _micro_batches_of_step(config: RunConfig, world: int) -> int:
    """Forward passes that make up a step, over all processes."""
    micro_batches = config.batch_size // config.micro_batch if config.micro_batch else world
    if micro_batches % world or config.batch_size % micro_batches:
        raise FmdError(
            f"{world} processes cannot share batch_size {config.batch_size}"
            + (f" in parts of micro_batch {config.micro_batch}" if config.micro_batch else "")
        )
    return micro_batches


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _check_finite(recent, terms: list[str], epoch: int, place: Path) -> None:
    values = torch.stack([losses for *_, losses in recent]).tolist()  # one wait for the device
    for (step, lr, _), losses in zip(recent, values):
        bad = [name for name, value in zip(terms, losses) if not np.isfinite(value)]
        if bad:
            parts = [name for name in bad if name != "loss"] or bad
            raise _not_finite(" and ".join(parts), epoch, step, lr, place)


def _not_finite(what: str, epoch: int, step: int, lr: float, place: Path) -> FmdError:
    return FmdError(
        f"not finite: {what} at epoch {epoch}, step {step}, learning rate {lr:.3g}; "
        f"the last good checkpoint {place} is kept: lower lr, or set clip_grad"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmd.train",
        description="Train one run of an experiment; KEY=VALUE overrides settings for a trial. "
        "Under torchrun the processes share the run.",
    )
    parser.add_argument("experiment", help="a file of experiments/, without .yaml")
    parser.add_argument("variant", help="a variant of the experiment, or 'teacher'")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches")
    parser.add_argument("--device")
    parser.add_argument("--max-minutes", type=float, help="checkpoint and end after this long")
    parser.add_argument("--workers", type=int, help="processes that decode photographs")
    parser.add_argument("--log", action="store_true", help="log each epoch, for TensorBoard")
    parser.add_argument("--dry-run", action="store_true", help="try a few steps, estimate the rest")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="e.g. lr=0.002 epochs=5"
    )
    args = parser.parse_intermixed_args()
    config = load_experiment(args.experiment).run(
        args.variant, args.seed, **parse_overrides(args.overrides)
    )
    try:
        if args.dry_run:
            from fmd.dryrun import dry_run  # which imports this module

            said = dry_run(config, args.device, args.workers)
        else:
            stored = finished(config)
            record = stored or train(
                config,
                device=args.device,
                max_minutes=args.max_minutes,
                workers=args.workers,
                on_epoch=logger(config) if args.log else None,
            )
            said = f"test top-1 {record.test.last.top1:.2f} % -> {config.path('runs', '.json')}"
            if stored:
                said += " (was finished before: nothing was trained)"
    except torch.OutOfMemoryError:
        raise FmdError(
            "the GPU's memory is full: give micro_batch=<fewer images a forward pass>"
        ) from None
    if int(os.environ.get("RANK", 0)) == 0:
        print(said)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_together(main)
