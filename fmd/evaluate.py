"""Accuracy of a network, and how far its relations are from its teacher's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator
from torch import nn

from fmd.config import RunConfig
from fmd.losses import full_manifold_loss, inter_image_loss, intra_image_loss
from fmd.models import TokenModel, match_grids
from fmd.processes import share, total
from fmd.records import Accuracy
from fmd.task import ManifoldDistillationTask

EVAL_BATCH = 2048  # at most: photographs come in smaller ones
RELATION_IMAGES = 64
NO_AUTOCAST = nullcontext()


@torch.inference_mode()
def evaluate(
    model: nn.Module, data, split: str, autocast=NO_AUTOCAST, limit: int | None = None
) -> Accuracy:
    """Accuracy of a model on a split, in percent; leaves the model in eval mode.

    Each process takes its share of the images, none of them twice, and all get the sum.
    """
    model.eval()
    device = next(model.parameters()).device
    evaluator = ClassificationEvaluator(device)
    with autocast:
        for images, target in data.batches(split, EVAL_BATCH, *share(), limit):
            evaluator.update(model(images), target)
    return Accuracy(**evaluator.compute(distributed=dist.is_initialized()))


@torch.no_grad()
def measure_relations(
    config: RunConfig, task: ManifoldDistillationTask, teacher: nn.Module, data
) -> dict[str, list[float]]:
    """Unweighted losses of each layer pair on the first validation images, in eval mode."""
    batch, _ = next(data.batches("val", RELATION_IMAGES, limit=RELATION_IMAGES))
    aspect = batch.shape[-2] / batch.shape[-1]
    student = task.get_eval_model().eval()
    tokens = (
        TokenModel(student, config.student_layers)(batch)[1],
        TokenModel(teacher, config.teacher_layers)(task.teacher_view(batch))[1],
    )
    losses = {"intra": intra_image_loss, "inter": inter_image_loss, "full": full_manifold_loss}
    pairs = [match_grids(s, t, aspect) for s, t in zip(*tokens)]
    return {name: [loss(s, t).item() for s, t in pairs] for name, loss in losses.items()}


@torch.inference_mode()
def measure_agreement(student: nn.Module, teach: Callable, data, autocast) -> float:
    """Percent of the test images for which student and teacher give the same answer."""
    device = next(student.parameters()).device
    with autocast:
        same = [
            (student(x).argmax(1) == teach(x)[0].argmax(1)).double()
            for x, _ in data.batches("test", EVAL_BATCH, *share())
        ]
    same = torch.cat(same) if same else torch.zeros(0)
    return 100 * total(same.sum().item(), device) / total(len(same), device)
