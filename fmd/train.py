"""One training run, from settings to record: a linear loop that can be killed and resumed exactly.

Every random number of a step (augmentation, mixing, dropped paths, drawn patches) follows from the
run's seed, the epoch, the step and the process, so a checkpoint needs no generator states and a
resumed run is the same run, on a CPU to the last bit.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationEvaluator
from torch import Tensor, nn
from tqdm.auto import tqdm

from fmd.config import RunConfig, load_experiment
from fmd.data import ImageData, load_data
from fmd.errors import FmdError, nearest, run_main
from fmd.losses import ManifoldLoss, full_manifold_loss, inter_image_loss, intra_image_loss
from fmd.models import TokenModel, create_model, fingerprint, load_weights, match_grids
from fmd.records import (
    Accuracy,
    Epoch,
    Evaluation,
    Record,
    Relations,
    Teacher,
    Timing,
    finished,
    provenance,
    write_atomically,
    write_record,
)
from fmd.task import ManifoldDistillationTask

CHECKPOINT_SECONDS = 20  # between checkpoints, at ends of epochs; does not affect the numbers
CHECK_EVERY = 50  # steps between looks at the losses: each look makes the host wait for the device
EVAL_BATCH = 512
NO_AUTOCAST = nullcontext()


class OutOfTime(FmdError):
    """The time budget is used up; the checkpoint is written and the next call goes on from it."""


@dataclass
class Progress:
    """Where a run stands, and what it has measured so far. Stored in the checkpoint."""

    epoch: int
    step: int  # steps done in this epoch
    sums: Tensor  # of each loss term over the steps of this epoch
    epochs: list[Epoch]
    best_epoch: int
    seconds: float
    train_seconds: float
    images: int
    resumed: int


def train(
    config: RunConfig,
    *,
    device: str | torch.device | None = None,
    max_minutes: float | None = None,
    compile: bool | None = None,
    progress: bool = True,
    on_epoch: Callable[[list[Epoch]], None] | None = None,
) -> Record:
    """Train, evaluate and record one run, going on from its checkpoint if there is one.

    Args:
        config: from :meth:`fmd.config.Experiment.run` or ``teacher_run``.
        device: a GPU if there is one, else the CPU.
        max_minutes: checkpoint and raise :class:`OutOfTime` after this long.
        compile: ``torch.compile`` the task; on GPUs by default.
        progress: show a bar.
        on_epoch: called with the epochs so far after each one, to draw curves.

    Returns:
        The record, also written to ``results/runs/``; a run that has one is not repeated.

    Raises:
        FmdError: wrong settings, a missing teacher, a checkpoint of other settings, a loss that is
            not finite, or files that cannot be written.
    """
    record = finished(config)
    if record is not None:
        return record
    started = time.monotonic()
    deadline = started + 60 * max_minutes if max_minutes is not None else None
    rank, world, device = _set_up_process(device)
    if config.batch_size % world:
        raise FmdError(f"batch_size {config.batch_size} cannot be shared by {world} processes")
    precision = _precision(config.precision, device)
    code = provenance()
    data = load_data(config.data).take(config.data_fraction)
    if len(data.train) < config.batch_size:
        raise FmdError(
            f"batch_size {config.batch_size} exceeds the {len(data.train)} training images"
        )
    description = data.describe()
    data.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    torch.manual_seed(config.seed)
    student = build_model(config, data)
    teacher, teacher_note = _load_teacher(config, data, device)
    task = build_task(config, student, teacher, device)
    relations = {}
    if teacher is not None and config.student_layers:
        relations["before"] = measure_relations(config, student, teacher, data)
    try:
        optimizer = create_optimizer_v2(
            student, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay
        )
    except ValueError as error:
        raise FmdError(f"{error}{nearest(config.opt, list_optimizers())}") from None
    steps = len(data.train) // config.batch_size
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    if config.ema_decay is not None:
        task.setup_ema(decay=config.ema_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    mixup = _mixup(config, data.num_classes)
    micro = config.batch_size // world
    if mixup is not None and micro % 2:
        raise FmdError(f"mixup and cutmix pair images: {micro} per process must be even")

    terms = ["loss", "base"]
    if task.teacher is not None:
        terms += (["logit"] if config.alpha else []) + list(
            task.manifold.weights if task.manifold else []
        )
    state = Progress(0, 0, torch.zeros(len(terms), device=device), [], 0, 0.0, 0.0, 0, 0)
    best_weights = None
    checkpoint = config.path("checkpoints", ".pt")
    if checkpoint.exists():
        best_weights = _restore(checkpoint, config, state, task, student, optimizer, scaler)
        scheduler.step_update(state.epoch * steps + state.step)
    if world > 1:
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
    if compile if compile is not None else device.type == "cuda":
        task.compile()
        data.augment = torch.compile(data.augment)

    def save_checkpoint():
        state.seconds += time.monotonic() - save_checkpoint.since
        save_checkpoint.since = time.monotonic()
        # After a finite loss the weights may still be broken: keep the good checkpoint then.
        if not all(p.isfinite().all() for p in student.parameters()):
            lr = optimizer.param_groups[0]["lr"]
            raise _not_finite("weights", state.epoch, state.step, lr, checkpoint)
        if rank == 0:
            _save(checkpoint, config, state, task, student, optimizer, scaler, best_weights)

    save_checkpoint.since = started
    if not checkpoint.exists():
        save_checkpoint()  # a folder that takes no files is found out now, not after training
    last_saved = time.monotonic()
    bar = tqdm(
        total=config.epochs * steps,
        initial=state.epoch * steps + state.step,
        desc=f"{config.experiment}/{config.variant}/{config.seed}",
        unit="step",
        disable=not progress or rank > 0,
        mininterval=1.0,
        file=sys.stdout,
    )
    warm = False
    with bar:
        while state.epoch < config.epochs:
            order = _permutation(len(data.train), config.seed, state.epoch).to(device)
            task.train()
            recent: list[tuple[int, float, Tensor]] = []
            epoch_started = time.monotonic()
            first_step = state.step
            while state.step < steps:
                torch.manual_seed(_derive(config.seed, state.epoch, state.step, rank))
                start = state.step * config.batch_size + rank * micro
                rows = order[start : start + micro]
                images, target = data.train.images[rows], data.train.labels[rows]
                if config.augment:
                    images = data.augment(images)
                images = data.normalize(images)
                if mixup is not None:
                    # timm's Mixup draws from NumPy's global generator
                    np.random.seed(_derive(config.seed, state.epoch, state.step, rank, 1))  # noqa: NPY002
                    images, target = mixup(images, target)
                with autocast:
                    result = task(images, target)
                scaler.scale(result["loss"]).backward()
                if config.clip_grad is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(student.parameters(), config.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                losses = torch.stack([result[name].detach().float() for name in terms])
                recent.append((state.step, optimizer.param_groups[0]["lr"], losses))
                state.sums += losses
                state.step += 1
                update = state.epoch * steps + state.step
                scheduler.step_update(update)
                task.update_ema(step=update)
                bar.update()
                if not warm:  # the first step compiles, which is not what a step costs
                    _synchronize(device)
                    warm, epoch_started, first_step = True, time.monotonic(), state.step
                if len(recent) < CHECK_EVERY and state.step < steps:
                    continue
                _check_finite(recent, terms, state.epoch, checkpoint)
                recent.clear()
                if state.step < steps and _past(deadline, device):
                    state.images += (state.step - first_step) * config.batch_size
                    state.train_seconds += time.monotonic() - epoch_started
                    _average(state.sums)
                    save_checkpoint()
                    raise OutOfTime(_out_of_time(config, state, steps, checkpoint))
            _synchronize(device)
            state.images += (steps - first_step) * config.batch_size
            state.train_seconds += time.monotonic() - epoch_started

            val = evaluate(student, data, "val", autocast)
            if not np.isfinite(val.loss):
                lr = optimizer.param_groups[0]["lr"]
                raise _not_finite("validation loss", state.epoch, state.step, lr, checkpoint)
            ema = None
            if task.has_ema():
                ema = evaluate(task.get_eval_model(ema=True), data, "val", autocast)
            _average(state.sums)
            means = dict(zip(terms, (state.sums / steps).tolist()))
            lr = optimizer.param_groups[0]["lr"]
            state.epochs.append(Epoch(epoch=state.epoch, lr=lr, train=means, val=val, val_ema=ema))
            best = state.epochs[state.best_epoch]
            if best_weights is None or val.top1 > best.val.top1:
                state.best_epoch = state.epoch
                best_weights = {
                    k: v.detach().cpu().clone() for k, v in student.state_dict().items()
                }
            state.epoch, state.step = state.epoch + 1, 0
            state.sums.zero_()
            bar.set_postfix(loss=f"{means['loss']:.3f}", val=f"{val.top1:.1f}%", refresh=False)
            if on_epoch is not None and rank == 0:
                on_epoch(state.epochs)
            done = state.epoch == config.epochs
            out_of_time = not done and _past(deadline, device)
            if done or out_of_time or time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                save_checkpoint()
                last_saved = time.monotonic()
            if out_of_time:
                raise OutOfTime(_out_of_time(config, state, steps, checkpoint))

    if relations:
        relations["after"] = measure_relations(config, student, teacher, data)
    test = _test(config, task, student, teacher, best_weights, data, autocast)
    record = Record(
        config=config,
        key=config.key,
        **code,
        device=device_name(device),
        precision=str(precision).removeprefix("torch."),
        world_size=world,
        data=description,
        parameters=sum(p.numel() for p in student.parameters()),
        teacher=teacher_note,
        fingerprint=fingerprint(student),
        epochs=state.epochs,
        best_epoch=state.best_epoch,
        test=test,
        relations=Relations(
            student_layers=list(config.student_layers),
            teacher_layers=list(config.teacher_layers),
            **relations,
        )
        if relations
        else None,
        timing=Timing(
            seconds=round(state.seconds + time.monotonic() - save_checkpoint.since, 3),
            images_per_second=round(state.images / max(state.train_seconds, 1e-9), 1),
            peak_memory_mb=round(_peak_memory(device), 1),
            resumed=state.resumed,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        ),
    )
    if rank == 0:
        weights = {k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}
        write_atomically(config.path("weights", ".safetensors"), save(weights))
        write_record(record)
        checkpoint.unlink(missing_ok=True)
    if world > 1:
        dist.barrier()  # the next run of any rank may need these files
    return record


def build_task(
    config: RunConfig, student: nn.Module, teacher: nn.Module | None, device: torch.device
) -> ManifoldDistillationTask:
    """The task of a run: labels, logits and manifold terms as its settings say."""
    # Mixup smooths its own targets.
    smoothing = 0.0 if config.mixup or config.cutmix else config.label_smoothing
    manifold = ManifoldLoss(
        config.intra, config.inter, config.random, config.full, config.num_patches
    )
    try:
        return ManifoldDistillationTask(
            student,
            teacher,
            config.student_layers,
            config.teacher_layers,
            manifold,
            alpha=config.alpha,
            temperature=config.temperature,
            logit=config.logit,
            criterion=nn.CrossEntropyLoss(label_smoothing=smoothing),
            device=device,
        )
    except ValueError as error:
        raise FmdError(f"run {config.experiment}/{config.variant}: {error}") from error


@torch.inference_mode()
def evaluate(model: nn.Module, data: ImageData, split: str, autocast=NO_AUTOCAST) -> Accuracy:
    """Accuracy of a model on a split, in percent; leaves the model in eval mode."""
    model.eval()
    evaluator = ClassificationEvaluator(data.val.images.device)
    with autocast:
        for images, target in data.batches(split, EVAL_BATCH):
            evaluator.update(model(images), target)
    return Accuracy(**evaluator.compute())


@torch.no_grad()
def measure_relations(
    config: RunConfig, student: nn.Module, teacher: nn.Module, data: ImageData, images: int = 64
) -> dict[str, list[float]]:
    """Unweighted losses of each layer pair on the first validation images, in eval mode."""
    batch, _ = next(data.batches("val", images))
    aspect = batch.shape[-2] / batch.shape[-1]
    tokens = [
        TokenModel(model.eval(), layers)(batch)[1]
        for model, layers in ((student, config.student_layers), (teacher, config.teacher_layers))
    ]
    losses = {"intra": intra_image_loss, "inter": inter_image_loss, "full": full_manifold_loss}
    pairs = [match_grids(s, t, aspect) for s, t in zip(*tokens)]
    return {name: [loss(s, t).item() for s, t in pairs] for name, loss in losses.items()}


def build_model(config: RunConfig, data: ImageData) -> nn.Module:
    """A network for the data: its classes, channels, image size and normalisation."""
    model = create_model(
        config.model,
        data.num_classes,
        in_chans=data.train.images.shape[1],
        drop_path_rate=config.drop_path_rate or None,  # timm drops None: not every model has it
        **config.model_args,
    )
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": data.mean, "std": data.std}
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *data.train.images.shape[1:]))
    except (AssertionError, RuntimeError) as error:
        raise FmdError(
            f"'{config.model}' does not take the images of {data.name}: {error}"
        ) from None
    return model.train()


def load_trained(config: RunConfig, data: ImageData) -> nn.Module:
    """The network of a finished run, with its last weights, in eval mode."""
    return load_weights(build_model(config, data), config.path("weights", ".safetensors")).eval()


def teacher_config(config: RunConfig) -> RunConfig:
    """Settings of the teacher's run that a student's settings name."""
    experiment, _, seed = config.teacher.rpartition("/seed-")
    if not experiment or not seed.isdigit():
        raise FmdError(f"teacher '{config.teacher}' must read '<experiment>/seed-<n>'")
    return load_experiment(experiment).teacher_run(int(seed))


def _load_teacher(config: RunConfig, data: ImageData, device: torch.device):
    """The trained teacher and what the record says of it; refuses one that knows nothing."""
    if config.teacher is None or not (config.alpha or config.has_manifold):
        return None, None
    run = teacher_config(config)
    record = finished(run)
    if record is None:
        raise FmdError(
            f"the teacher {config.teacher} is not trained yet: first run "
            f"notebooks/train_teacher.ipynb or python -m fmd.train {run.experiment} teacher "
            f"--seed {run.seed}"
        )
    teacher = load_trained(run, data).to(device)
    accuracy = evaluate(teacher, data, "val").top1
    chance = 100 / data.num_classes
    if accuracy < 2 * chance:
        raise FmdError(
            f"the teacher {config.teacher} has {accuracy:.1f} % validation top-1, near chance "
            f"({chance:.1f} %): its weights do not fit; train it again"
        )
    if fingerprint(teacher) != record.fingerprint:
        raise FmdError(f"the teacher's weights are not those of its record {config.teacher}")
    return teacher, Teacher(run=config.teacher, fingerprint=record.fingerprint, val_top1=accuracy)


def _test(config, task, student, teacher, best_weights, data, autocast) -> Evaluation:
    """Read the test images, for the last and the best weights."""
    last = evaluate(student, data, "test", autocast)
    ema = (
        evaluate(task.get_eval_model(ema=True), data, "test", autocast) if task.has_ema() else None
    )
    agreement = None
    if teacher is not None:
        with torch.inference_mode():
            same = [
                (student(x).argmax(1) == teacher(x).argmax(1)).float()
                for x, _ in data.batches("test", EVAL_BATCH)
            ]
        agreement = 100 * torch.cat(same).mean().item()
    best_model = build_model(config, data)
    best_model.load_state_dict(best_weights)
    best = evaluate(best_model.to(data.test.images.device), data, "test", autocast)
    return Evaluation(last=last, best=best, ema=ema, agreement=agreement)


def _mixup(config: RunConfig, num_classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        config.mixup,
        config.cutmix,
        prob=config.mix_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def _derive(*numbers: int) -> int:
    """A seed from a tuple of numbers; different tuples give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(n))


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _set_up_process(device) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device; joins the group that ``torchrun`` describes."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise FmdError(f"no device '{device}': {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FmdError(f"no device '{device}': torch sees no GPU; leave --device out, or give cpu")
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def _average(sums: Tensor) -> None:
    """Mean over the processes, in place: each saw its own share of every batch."""
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums /= dist.get_world_size()


def _past(deadline: float | None, device: torch.device) -> bool:
    """Whether time is up for the slowest process, so that all stop at the same step."""
    if deadline is None:
        return False
    late = torch.tensor(float(time.monotonic() > deadline), device=device)
    if dist.is_initialized():
        dist.all_reduce(late, dist.ReduceOp.MAX)
    return bool(late)


def device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({platform.machine()})"
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _check_finite(recent, terms: list[str], epoch: int, checkpoint: Path) -> None:
    values = torch.stack([losses for *_, losses in recent])
    if values.isfinite().all().item():
        return
    for step, lr, losses in recent:
        bad = [name for name, value in zip(terms, losses.tolist()) if not np.isfinite(value)]
        if bad:
            parts = [name for name in bad if name != "loss"] or bad
            raise _not_finite(" and ".join(parts), epoch, step, lr, checkpoint)


def _not_finite(what: str, epoch: int, step: int, lr: float, checkpoint: Path) -> FmdError:
    return FmdError(
        f"not finite: {what} at epoch {epoch}, step {step}, learning rate {lr:.3g}; "
        f"the last good checkpoint {checkpoint} is kept: lower lr, or set clip_grad"
    )


def _out_of_time(config: RunConfig, state: Progress, steps: int, checkpoint: Path) -> str:
    share = (state.epoch * steps + state.step) / (config.epochs * steps)
    return (
        f"time is up at {share:.0%} of {config.experiment}/{config.variant}/seed-{config.seed}; "
        f"{checkpoint} is written, and the same call goes on from there"
    )


def _save(path, config, state, task, student, optimizer, scaler, best_weights) -> None:
    import io

    buffer = io.BytesIO()
    torch.save(
        {
            "key": config.key,
            "progress": {
                **vars(state),
                "epochs": [epoch.model_dump() for epoch in state.epochs],
            },
            "student": student.state_dict(),
            "ema": task.get_eval_model(ema=True).state_dict() if task.has_ema() else None,
            "best": best_weights,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def _restore(path, config, state, task, student, optimizer, scaler):
    """Load a checkpoint in place; returns the best weights so far."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:  # torch does not look at the checksums
            raise ValueError("damaged")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        key = saved["key"]
    except Exception as error:
        raise FmdError(f"{path} is not a whole checkpoint: delete it to start again") from error
    if key != config.key:
        raise FmdError(f"{path} belongs to a run with other settings: move it away to start again")
    student.load_state_dict(saved["student"])
    if task.has_ema():
        task.get_eval_model(ema=True).load_state_dict(saved["ema"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    for name, value in saved["progress"].items():
        setattr(state, name, value)
    state.sums = state.sums.to(next(student.parameters()).device)
    state.epochs = [Epoch(**epoch) for epoch in state.epochs]
    state.resumed += 1
    return saved["best"]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmd.train",
        description="Train one run of an experiment; KEY=VALUE overrides settings for a trial.",
    )
    parser.add_argument("experiment")
    parser.add_argument("variant", help="a variant of the experiment, or 'teacher'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args()
    config = load_experiment(args.experiment).run(
        args.variant, args.seed, **parse_overrides(args.overrides)
    )
    record = train(config, device=args.device, max_minutes=args.max_minutes)
    print(f"test top-1 {record.test.last.top1:.2f} % -> {config.path('runs', '.json')}")
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def parse_overrides(words: list[str]) -> dict:
    """['lr=1e-3', …] to settings, with YAML's types; pydantic checks them later."""
    import yaml

    overrides = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise FmdError(f"'{word}' must read KEY=VALUE, e.g. lr=0.001")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise FmdError(f"'{word}': the value is not YAML") from None
        if key in ("variant", "seed"):
            raise FmdError(f"'{word}' is no override: the {key} has an argument of its own")
        value = overrides[key]
        # YAML reads {a:1}, without a space, as a key 'a:1' of no value.
        if value is None or (isinstance(value, dict) and None in value.values()):
            raise FmdError(f"'{word}' holds no value, e.g. model_args='{{depth: 2}}'")
    return overrides


if __name__ == "__main__":
    run_main(main)
