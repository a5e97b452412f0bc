"""Time and memory of the losses, set against plain formulas, by shape of the tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from fmd.benchmark.tools import (
    peak_memory,
    plain_full,
    plain_inter,
    plain_intra,
    plain_three,
    progress,
    seconds,
)
from fmd.losses import ManifoldLoss
from fmd.records import spread


def compare(
    functions: dict[str, Callable[[], object]],
    yardsticks: dict[str, str],
    device: torch.device,
    repeats: int,
) -> list[dict]:
    """Time functions in turns, after a call each to warm up and one that measures memory.

    Args:
        functions: by name.
        yardsticks: the name of the function to set another against.
        repeats: calls of each.

    Returns:
        A row a function: ``seconds`` (median), ``peak_mb``, and against its ``yardstick``
        ``speedup`` (median, with ``speedup_low`` and ``_high``) and ``memory_ratio``.
    """
    for function in functions.values():
        function()  # a GPU's libraries take what they need for good at the first call
    peaks = {name: peak_memory(function, device) for name, function in functions.items()}
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    rows = []
    for name in functions:
        row = {
            "function": name,
            "seconds": statistics.median(times[name]),
            "peak_mb": peaks[name] / 2**20,
        }
        if name in yardsticks:
            other = yardsticks[name]
            ratios = [theirs / ours for theirs, ours in zip(times[other], times[name])]
            row |= {"yardstick": other} | spread("speedup", ratios)
            row["memory_ratio"] = peaks[other] / peaks[name]
        rows.append(row)
    return rows


YARDSTICKS = {
    "three terms": "plain three terms",
    "intra": "plain intra",
    "inter": "plain inter",
    "full": "three terms",
    "full alone": "definition of full",
}


def _layer_losses(batch: int, patches: int, ds: int, dt: int, layers: int, device: torch.device):
    """Forward and backward of each function on Gaussian tokens of ``layers`` pairs."""
    student, teacher = (
        [torch.randn(batch, patches, dim, device=device) for _ in range(layers)] for dim in (ds, dt)
    )
    for x in student:
        x.requires_grad_()

    # The gradients are returned, not kept: they count as memory of the call that makes them.
    def plain(term):
        return lambda: torch.autograd.grad(sum(map(term, student, teacher)) / layers, student)

    def project(*weights):
        manifold = ManifoldLoss(*weights)
        return lambda: torch.autograd.grad(sum(manifold(student, teacher).values()), student)

    return {
        "plain three terms": plain(plain_three),
        "three terms": project(),
        "full": project(0.0, 0.0, 0.0, 4.0),
        "plain intra": plain(plain_intra),
        "intra": project(1.0, 0.0, 0.0),
        "plain inter": plain(plain_inter),
        "inter": project(0.0, 1.0, 0.0),
        "definition of full": plain(plain_full),
        "full alone": project(0.0, 0.0, 0.0, 1.0),
    }


TERMS = ("plain three terms", "three terms", "full", "plain intra", "intra", "plain inter", "inter")
WHOLE = ("definition of full", "full alone")


def losses(device: torch.device, quick: bool) -> list[dict]:
    """Time and peak memory of forward and backward, by shape of the tokens."""
    # name, B, N, student's and teacher's D, layer pairs, functions, repeats
    cases = [
        ("paper, batch 64", 64, 196, 192, 384, 8, TERMS, 5),
        ("paper, batch 128", 128, 196, 192, 384, 8, TERMS[:3], 5),
        ("Swin, first stage", 4, 3136, 96, 128, 1, TERMS, 3),
        ("definition of full", 30, 200, 192, 384, 1, WHOLE, 5),
    ]
    # The definition stops where a map of relations fills half a gigabyte.
    for batch in (8, 16, 32, 64, 128, 256, 512):
        names = (*TERMS[:3], *(WHOLE[:1] if batch <= 32 else ()))
        cases.append(("growth", batch, 196, 192, 384, 1, names, 3))
    if quick:
        cases = [(case[0], 4, 9, 8, 12, 2, case[6], 1) for case in (cases[0], cases[3], cases[4])]
    rows = []
    for case, batch, patches, ds, dt, layers, names, repeats in progress(cases):
        if device.type == "cuda" and not quick:
            repeats *= 10  # calls take milliseconds there
        functions = _layer_losses(batch, patches, ds, dt, layers, device)
        shape = {"batch": batch, "patches": patches, "student_dim": ds, "teacher_dim": dt}
        for row in compare({name: functions[name] for name in names}, YARDSTICKS, device, repeats):
            rows.append({"case": case, **shape, "layers": layers, **row})
    return rows
