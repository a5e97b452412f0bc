"""Accuracy of a network, and how far its relations are from its teacher's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from torch import Tensor, nn

from fmd.config import RunConfig
from fmd.errors import FmdError
from fmd.losses import full_manifold_loss, inter_image_loss, intra_image_loss
from fmd.models import TokenModel, match_layers
from fmd.records import Accuracy
from fmd.task import ManifoldDistillationTask

EVAL_BATCH = 2048  # at most: photographs come in smaller ones
TEACHER_BATCH = 256  # of a network that may be large, and take larger images
RELATION_IMAGES = 64
NO_AUTOCAST = nullcontext()


def evaluate(model: nn.Module, data, split: str, autocast=NO_AUTOCAST) -> Accuracy:
    """Accuracy of a model on a split, in percent; leaves the model in eval mode."""
    device = next(model.parameters()).device
    return _accuracy(model.eval(), _shared(data, split, EVAL_BATCH), device, autocast)


def evaluate_teacher(task: ManifoldDistillationTask, data, autocast, limit: int) -> Accuracy:
    """The teacher's accuracy on validation images, prepared as in training."""
    batches = _shared(data, "val", TEACHER_BATCH, limit)
    return _accuracy(lambda images: task.teach(images)[0], batches, task.device, autocast)


def measure_agreement(task: ManifoldDistillationTask, data, autocast) -> float:
    """Percent of the test images for which student and teacher give the same answer."""
    batches = ((x, task.teach(x)[0].argmax(1)) for x, _ in _shared(data, "test", TEACHER_BATCH))
    return _accuracy(task.get_eval_model().eval(), batches, task.device, autocast).top1


def _shared(
    data, split: str, size: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of the images, none of which any other process has."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return data.batches(split, size, rank, world, limit)


@torch.inference_mode()
def _accuracy(answer: Callable, batches: Iterable, device: torch.device, autocast) -> Accuracy:
    """Of all processes' images together."""
    evaluator = ClassificationEvaluator(device)
    with autocast:
        for images, target in batches:
            evaluator.update(answer(images), target)
    return Accuracy(**evaluator.compute(distributed=dist.is_initialized()))


@torch.no_grad()
def measure_relations(
    config: RunConfig, task: ManifoldDistillationTask, teacher: nn.Module, data
) -> dict[str, list[float]]:
    """Unweighted losses of each layer pair on the first validation images, in eval mode.

    Raises :class:`FmdError` for layers that a network does not have.
    """
    batch, _ = next(data.batches("val", RELATION_IMAGES, limit=RELATION_IMAGES))
    student = task.get_eval_model().eval()
    students = _tokens(config, "student_layers", student, batch)
    teachers = _tokens(config, "teacher_layers", teacher, task.teacher_view(batch))
    losses = {"intra": intra_image_loss, "inter": inter_image_loss, "full": full_manifold_loss}
    pairs = match_layers(students, teachers, batch)
    return {name: [loss(s, t).item() for s, t in pairs] for name, loss in losses.items()}


def _tokens(config: RunConfig, setting: str, model: nn.Module, images: Tensor) -> list[Tensor]:
    try:
        reader = TokenModel(model, getattr(config, setting))
    except ValueError as error:
        raise FmdError(f"run {config.experiment}/{config.variant}: {setting}: {error}") from None
    return reader(images)[1]
