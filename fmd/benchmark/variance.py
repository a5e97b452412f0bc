"""How noisy an estimate of the full loss the random term is, on real features."""

from __future__ import annotations

import statistics

import torch

from fmd.benchmark.precision import digits_tokens
from fmd.benchmark.tools import progress
from fmd.losses import full_manifold_loss, random_patch_loss


def variance(device: torch.device, quick: bool) -> list[dict]:
    """Bias and spread of the random term as an estimate of the full loss, and of its gradient.

    For tokens of length one the diagonal of a map of relations carries no loss, so that a draw of K
    of n patches expects (1 − 1/K) / (1 − 1/n) of the full loss.
    """
    draws = 3 if quick else 100
    generator = torch.Generator(device).manual_seed(0)
    stages = [None] if quick else [None, "soft-kd", "full"]
    rows = []
    for stage in progress(stages):
        pairs = digits_tokens(stage, images=8 if quick else 128, trained_teacher=not quick)
        for layer, (student, teacher) in enumerate(pairs):
            s, t = student.to(device).requires_grad_(), teacher.to(device)
            n = s.shape[0] * s.shape[1]
            full = full_manifold_loss(s, t)
            (full_grad,) = torch.autograd.grad(full, s)
            for k in (8, 32) if quick else (16, 48, 96, 192, 384, 768):
                values, errors, cosines = [], [], []
                for _ in range(draws):
                    loss = random_patch_loss(s, t, k, generator=generator)
                    (grad,) = torch.autograd.grad(loss, s)
                    values.append(loss.item() / full.item())
                    errors.append(((grad - full_grad).norm() / full_grad.norm()).item() ** 2)
                    cosines.append(
                        torch.cosine_similarity(grad.ravel(), full_grad.ravel(), 0).item()
                    )
                spread = statistics.stdev(values)
                rows.append(
                    {
                        "student": stage or "untrained",
                        "pair": layer,
                        "patches": n,
                        "k": k,
                        "draws": draws,
                        "full": full.item(),
                        "bias": statistics.mean(values) - 1,
                        "bias_error": spread / draws**0.5,
                        "expected_bias": (1 - 1 / k) / (1 - 1 / n) - 1,
                        "spread": spread,
                        "gradient_noise": statistics.mean(errors) ** 0.5,
                        "gradient_cosine": statistics.mean(cosines),
                    }
                )
    return rows
