"""Companion to *Fine-Grained Manifold Distillation* (arXiv 2107.01378)."""

from importlib import import_module

_HOME = {
    "ManifoldDistillationTask": "fmd.task",
    "ManifoldLoss": "fmd.losses",
    "full_manifold_loss": "fmd.losses",
    "inter_image_loss": "fmd.losses",
    "intra_image_loss": "fmd.losses",
    "random_patch_loss": "fmd.losses",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    # On first use: tables and figures are made from records, without loading torch and timm.
    if name not in _HOME:
        raise AttributeError(f"module 'fmd' has no attribute '{name}'")
    return getattr(import_module(_HOME[name]), name)
