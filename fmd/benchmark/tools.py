"""What the benchmarks measure against, and how they measure time and memory."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from fmd.processes import synchronize

# The yardstick: the paper's formulas as one writes them down.


def plain_intra(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    return (s @ s.mT - t @ t.mT).square().mean()


def plain_inter(student: Tensor, teacher: Tensor) -> Tensor:
    return plain_intra(student.transpose(0, 1), teacher.transpose(0, 1))


def plain_random(student: Tensor, teacher: Tensor, num_patches: int = 192) -> Tensor:
    s, t = student.flatten(0, 1), teacher.flatten(0, 1)
    rows = torch.randperm(len(s), device=s.device)[:num_patches]
    return plain_intra(s[rows], t[rows])


def plain_full(student: Tensor, teacher: Tensor) -> Tensor:
    return plain_intra(student.flatten(0, 1), teacher.flatten(0, 1))


# name: the paper's weight, the formula
PLAIN_TERMS = {
    "intra": (4.0, plain_intra),
    "inter": (0.1, plain_inter),
    "random": (0.2, plain_random),
}


def plain_three(student: Tensor, teacher: Tensor) -> Tensor:
    return sum(weight * term(student, teacher) for weight, term in PLAIN_TERMS.values())


# Time and memory


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes of tensors that a call holds at once, over those there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    sizes = [event["args"] for event in events if event.get("name") == "[memory]"]
    before = sizes[0]["Total Allocated"] - sizes[0]["Bytes"]
    return max(size["Total Allocated"] for size in sizes) - before


def seconds(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of a call, the mean of so many in a row, until the device is done with them."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def progress(items: Iterable, total: int | None = None) -> tqdm:
    return tqdm(items, total=total, desc="measuring")
