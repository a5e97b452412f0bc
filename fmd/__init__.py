"""Companion to *Fine-Grained Manifold Distillation* (arXiv 2107.01378)."""

from fmd.losses import (
    ManifoldLoss,
    full_manifold_loss,
    inter_image_loss,
    intra_image_loss,
    random_patch_loss,
)
from fmd.task import ManifoldDistillationTask

__version__ = "0.1.0"

__all__ = [
    "ManifoldDistillationTask",
    "ManifoldLoss",
    "full_manifold_loss",
    "inter_image_loss",
    "intra_image_loss",
    "random_patch_loss",
]
