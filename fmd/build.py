"""What a run is made of: data, networks, task, optimizer, schedule, from its settings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import Mixup
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.distributions import Binomial

from fmd.config import PRETRAINED, RunConfig, teacher_config
from fmd.data import ImageData, load_data
from fmd.errors import FmdError, nearest
from fmd.evaluate import evaluate_teacher
from fmd.losses import ManifoldLoss
from fmd.models import create_model, fingerprint, load_weights, pretrained_model
from fmd.photos import PhotoFolder
from fmd.records import Teacher, finished
from fmd.task import ManifoldDistillationTask

FUSED = ("adam", "adamw")  # optimizers of which torch has one kernel for all weights
TEACHER_CHECK = 2000  # validation images that a teacher is tried on


def open_data(config: RunConfig, workers: int | None = None) -> ImageData | PhotoFolder:
    """The data of a run; raises :class:`FmdError` where it is missing or damaged."""
    if config.photos is not None:
        return PhotoFolder(config, workers)
    return load_data(config.data).take(config.data_fraction)


def build_model(config: RunConfig, data) -> nn.Module:
    """A network for the data: its classes, channels, image size and normalisation."""
    settings = dict(in_chans=data.image_shape[0], **config.model_args)
    try:
        # Zero as well: some models drop paths unless they are told not to.
        model = create_model(
            config.model, data.num_classes, drop_path_rate=config.drop_path_rate, **settings
        )
    except FmdError:
        if config.drop_path_rate:
            raise
        model = create_model(config.model, data.num_classes, **settings)  # has no paths to drop
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": data.mean, "std": data.std}
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *data.image_shape))
    except (AssertionError, RuntimeError) as error:
        raise FmdError(
            f"'{config.model}' does not take the images of {data.name}: {error}"
        ) from None
    return model.train()


def load_trained(config: RunConfig, data) -> nn.Module:
    """The network of a finished run, with its last weights, in eval mode."""
    return load_weights(build_model(config, data), config.path("weights", ".safetensors")).eval()


def build_optimizer(config: RunConfig, student: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer; no weight decay on vectors, position embedding and class token."""
    options = {}
    if config.opt in FUSED and next(student.parameters()).is_cuda:
        options["fused"] = True  # a GPU's host has no time for a kernel a weight
    try:
        return create_optimizer_v2(
            student, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **options
        )
    except AssertionError as error:  # it needs a GPU, or a package
        raise FmdError(f"opt = '{config.opt}': {error}") from None
    except ValueError as error:
        raise FmdError(f"{error}{nearest(config.opt, list_optimizers())}") from None


def build_schedule(config: RunConfig, optimizer, steps: int) -> Callable[[int, int], None]:
    """A function that sets the learning rate with which a step of an epoch is made.

    The published code sets it once an epoch, after the epoch, from the number of the epoch that
    ended: the second epoch repeats the first, and all later ones come one late.
    """
    by_step = config.schedule == "step"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        warmup_prefix=False,
        step_on_epochs=not by_step,
        updates_per_epoch=steps,
    )
    if by_step:
        return lambda epoch, step: scheduler.step_update(epoch * steps + step)
    return lambda epoch, step: scheduler.step(max(epoch - 1, 0))


def build_mixup(config: RunConfig, num_classes: int) -> Mixup | None:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        config.mixup,
        config.cutmix,
        prob=config.mix_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )


def build_task(
    config: RunConfig,
    student: nn.Module,
    teacher: nn.Module | None,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> ManifoldDistillationTask:
    """The task of a run: labels, logits and manifold terms as its settings say."""
    # Mixup smooths its own targets.
    smoothing = 0.0 if config.mixup or config.cutmix else config.label_smoothing
    manifold = ManifoldLoss(
        config.intra,
        config.inter,
        config.random,
        config.full,
        config.num_patches,
        # With a fixed number of images to a forward pass, losses do not depend on how many run.
        across_processes=config.micro_batch is None,
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
            teacher_dtype=precision if device.type == "cuda" else None,  # casting pays on a GPU
        )
    except ValueError as error:
        raise FmdError(f"run {config.experiment}/{config.variant}: {error}") from error


def load_start(student: nn.Module, path: str) -> None:
    """Start from a file of weights, for fine-tuning; a head for other classes starts anew."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FmdError(
            f"cannot start from {path} ({error}): give init=<file.safetensors>"
        ) from None
    names = student.pretrained_cfg.get("classifier") or "head"
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    fresh = {k: v for k, v in student.state_dict().items() if k.startswith(heads)}
    fitting = {k: v for k, v in weights.items() if k not in fresh or v.shape == fresh[k].shape}
    try:
        student.load_state_dict(fresh | fitting)
    except RuntimeError as error:
        line = str(error).splitlines()[-1].strip()
        raise FmdError(f"{path} is not of this model: {line[:200]}") from None


def load_teacher(config: RunConfig, data, device: torch.device):
    """The trained teacher and what the record says of it."""
    if not config.distils:
        return None, None
    if config.teacher.startswith(PRETRAINED):
        teacher, recorded_fingerprint = _load_pretrained_teacher(config, data), None
    else:
        teacher, recorded_fingerprint = _load_own_teacher(config, data)
    teacher = teacher.to(device)
    weights_fingerprint = fingerprint(teacher)
    teacher_note = Teacher(run=config.teacher, fingerprint=weights_fingerprint, val_top1=None)
    if not teacher.num_classes:  # features alone: there are no answers to try
        return teacher, teacher_note
    if teacher.num_classes != data.num_classes:
        raise FmdError(
            f"the teacher {config.teacher} has {teacher.num_classes} classes and {data.name} "
            f"{data.num_classes}: take a teacher of these classes, or alpha=0 and "
            "teacher_args='{num_classes: 0}' for its features alone"
        )
    if recorded_fingerprint not in (None, weights_fingerprint):
        raise FmdError(f"the teacher's weights are not those of its record {config.teacher}")
    return teacher, teacher_note


def check_teacher(config: RunConfig, task: ManifoldDistillationTask, data, autocast) -> float:
    """Top-1 of the teacher on validation images; refuses one that knows nothing.

    That is one whose top-1 guessing reaches with a probability above 1 %.
    """
    images = min(TEACHER_CHECK, data.size("val"))
    top1 = evaluate_teacher(task, data, autocast, images).top1
    chance = 100 / data.num_classes
    guesses = Binomial(images, torch.tensor(chance / 100, dtype=torch.float64))
    as_good = torch.arange(round(images * top1 / 100), images + 1, dtype=torch.float64)
    near_chance = guesses.log_prob(as_good).exp().sum() > 0.01
    if near_chance and config.teacher_weights != "random":
        raise FmdError(
            f"the teacher {config.teacher} has {top1:.1f} % top-1 on {images} validation images, "
            f"near chance ({chance:.1f} %): its weights or its classes do not fit; train or load "
            "it again"
        )
    return top1


def _load_own_teacher(config: RunConfig, data) -> tuple[nn.Module, str]:
    run = teacher_config(config)
    record = finished(run)
    if record is None:
        raise FmdError(
            f"the teacher {config.teacher} is not trained yet: first run "
            f"notebooks/train_teacher.ipynb or python -m fmd.train {run.experiment} teacher "
            f"--seed {run.seed}"
        )
    return load_trained(run, data), record.fingerprint


def _load_pretrained_teacher(config: RunConfig, data) -> nn.Module:
    if config.teacher_weights == "random" and not data.is_sample:
        raise FmdError("teacher_weights=random is for --dry-run: such a teacher knows nothing")
    name = config.teacher.removeprefix(PRETRAINED)
    return pretrained_model(name, config.teacher_weights, **config.teacher_args)
