"""Models and an experiment that run in seconds, for the tests."""

from pathlib import Path

import pytest
import timm
import torch

import fmd.config
from fmd.config import Experiment, load_experiment

TESTS = Path(__file__).parent

SMALL_VIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2)
MODELS = {
    "vit": ("vit_tiny_patch16_224", SMALL_VIT),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL_VIT),
    "cait": ("cait_xxs24_224", {**SMALL_VIT, "embed_dim": 24}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(
            img_size=32, patch_size=4, window_size=2, embed_dim=8, depths=(1, 1), num_heads=(1, 2)
        ),
    ),
    "convnext": ("convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))),
    "resnet": ("resnet10t", {}),
}


def tiny_model(name: str, seed: int = 0, **kwargs) -> torch.nn.Module:
    """A random timm model for 3×32×32 images and 5 classes."""
    torch.manual_seed(seed)
    model, settings = MODELS[name]
    return timm.create_model(model, **{"num_classes": 5, **settings, **kwargs})


def use_tiny(patch: pytest.MonkeyPatch, results: Path) -> Experiment:
    """tests/experiments instead of experiments/, results in ``results``, a fixed commit."""
    patch.setattr(fmd.config, "ROOT", TESTS)
    patch.setenv("FMD_RESULTS", str(results))
    patch.setenv("FMD_COMMIT", "0" * 40)
    patch.setenv("FMD_DIRTY", "")
    return load_experiment("tiny")
