"""A whole training step: DeiT-Tiny taught by CaiT-S24 at 224 pixels, with random weights.

This project's step is set beside one in the published style, in turns in one run: in parts, each
until the device is done with it, and as a whole.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial

import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fmd.benchmark.tools import PLAIN_TERMS, progress, seconds
from fmd.cost import Gpu, find_gpu
from fmd.counting import COUNTED, PRODUCTS
from fmd.losses import ManifoldLoss
from fmd.models import TokenModel
from fmd.processes import device_name, synchronize
from fmd.records import spread
from fmd.task import ManifoldDistillationTask, soft_distillation_loss

STUDENT, TEACHER = "deit_tiny_patch16_224", "cait_s24_224"
STUDENT_LAYERS, TEACHER_LAYERS = [0, 1, 2, 3, 8, 9, 10, 11], [0, 1, 2, 3, 20, 21, 22, 23]
PUBLISHED, SOFT = "published style", "soft distillation"
WEIGHTS = {SOFT: None, "decoupled": (4.0, 0.1, 0.2, 0.0), "full": (0.0, 0.0, 0.0, 4.0)}


class PublishedStyle:
    """The step as it is published: eager, fp16 autocast on a GPU, plain formulas, six waits.

    Args:
        student, teacher: timm models, made without fused attention.
        student_layers, teacher_layers: compared in pairs.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, student_layers, teacher_layers):
        self.student = TokenModel(student.train(), student_layers)
        self.teacher = TokenModel(teacher.eval().requires_grad_(False), teacher_layers)
        self.device = next(student.parameters()).device
        cuda = self.device.type == "cuda"
        self.precision = torch.float16 if cuda else torch.float32
        self.autocast = torch.autocast(self.device.type, dtype=self.precision, enabled=cuda)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cuda)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6)

    def parts(self, images: Tensor, target: Tensor) -> Iterator[str]:
        """One step, which stops after each part to name it."""
        with self.autocast:
            with torch.no_grad():
                teacher_logits, teacher_tokens = self.teacher(images)
            yield "teacher forward"
            logits, tokens = self.student(images)
            yield "student forward"
            terms = {
                "base": F.cross_entropy(logits, target),
                "logit": soft_distillation_loss(logits, teacher_logits),
            }
            for name, (weight, formula) in PLAIN_TERMS.items():
                terms[name] = weight * sum(map(formula, tokens, teacher_tokens)) / len(tokens)
            loss = sum(terms.values()) - terms["base"]  # α = 1, as in the published command
            yield "losses"
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        yield "backward"
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for value in (loss, *terms.values()):
            value.item()
        synchronize(self.device)
        yield "optimizer"

    def whole(self, images: Tensor, target: Tensor) -> None:
        for _ in self.parts(images, target):
            pass


class OurStyle:
    """This project's step: on a GPU compiled, in bfloat16, without a wait.

    Args:
        student, teacher: timm models.
        student_layers, teacher_layers: compared in pairs.
        weights: of the manifold losses, or None for soft distillation alone.
    """

    def __init__(self, student, teacher, student_layers, teacher_layers, weights):
        manifold = ManifoldLoss(*weights) if weights else None
        if manifold is None:
            student_layers = teacher_layers = ()
        self.device = next(student.parameters()).device
        cuda = self.device.type == "cuda"
        self.precision = torch.bfloat16 if cuda else torch.float32
        self.autocast = torch.autocast(self.device.type, dtype=self.precision, enabled=cuda)
        self.task = ManifoldDistillationTask(
            student,
            teacher,
            student_layers,
            teacher_layers,
            manifold,
            device=self.device,
            teacher_dtype=self.precision if cuda else None,
        )
        self.task.train()
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=cuda)

    def parts(self, images: Tensor, target: Tensor) -> Iterator[str]:
        """The work of :meth:`whole`, which stops after each part to name it."""
        task = self.task
        with self.autocast:
            teacher_logits, teacher_tokens = task.teach(images)
            yield "teacher forward"
            logits, tokens = task.trainable_module(images)
            yield "student forward"
            task.criterion(logits, target)  # weighs nothing where α = 1, but is always reported
            loss = soft_distillation_loss(logits, teacher_logits)
            if task.manifold is not None:
                loss = loss + sum(task.manifold(tokens, teacher_tokens).values())
            yield "losses"
        self.optimizer.zero_grad()
        loss.backward()
        yield "backward"
        self.optimizer.step()
        yield "optimizer"

    def whole(self, images: Tensor, target: Tensor) -> None:
        with self.autocast:
            loss = self.task(images, target)["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def step(device: torch.device, quick: bool) -> list[dict]:
    """Time of a step in the published style and of this project's, in parts and as a whole.

    The row ``step`` of a variant is timed without stops. It holds ``images_per_second``,
    ``speedup`` over the published style and ``overhead_percent`` over soft distillation, medians
    over rounds of turns with the lowest and the highest. ``operations`` and ``bytes`` are counted
    (:func:`count`); on a known GPU ``matmul_share`` and ``memory_share`` say what part of its peak
    rates they make up.
    """
    cuda = device.type == "cuda"
    batch, repeats, steps, size = (256, 8, 5, 224) if cuda else (4, 10, 1, 224)
    names, layers, options = (STUDENT, TEACHER), (STUDENT_LAYERS, TEACHER_LAYERS), {}
    if quick:
        batch, repeats, steps, size = 2, 2, 1, 32
        names, layers = ("vit_tiny_patch16_224", "cait_xxs24_224"), ([0, 1], [0, 1])
        options = {"img_size": size, "depth": 2}

    def models():
        torch.manual_seed(0)
        return [timm.create_model(name, **options).to(device) for name in names]

    set_fused_attn(False)
    try:
        variants = {PUBLISHED: PublishedStyle(*models(), *layers)}
    finally:
        set_fused_attn(True)
    networks = models()
    for name, weights in WEIGHTS.items():
        variants[name] = OurStyle(*networks, *layers, weights)
    images = torch.randn(batch, 3, size, size, device=device)
    target = torch.randint(0, 1000, (batch,), device=device)
    counts, times = {}, {name: [] for name in variants}
    for name, variant in variants.items():
        counts[name] = count(variant.parts(images, target))  # of eager code; it also warms up
        if cuda and name != PUBLISHED:
            variant.task.compile()
    for repeat in progress(range(-cuda, repeats), repeats + cuda):
        for name, variant in variants.items():
            measured = _seconds_of_parts(variant.parts(images, target), device)
            measured["step"] = seconds(partial(variant.whole, images, target), device, steps)
            if repeat >= 0:  # what is compiled is warmed up in a round of its own
                times[name].append(measured)
    shape = {"student": names[0], "teacher": names[1], "batch": batch, "image_size": size}
    rows = []
    for name, variant in variants.items():
        same = {"variant": name, **shape, "precision": str(variant.precision)[6:]}
        for part in times[name][0]:
            row = spread("seconds", [run[part] for run in times[name]])
            row |= _limits(*counts[name][part], row["seconds"], find_gpu(device_name(device)))
            rows.append({**same, "part": part, **row})
        whole, published, soft = (
            [run["step"] for run in times[n]] for n in (name, PUBLISHED, SOFT)
        )
        rows[-1]["images_per_second"] = batch / statistics.median(whole)
        if name != PUBLISHED:
            rows[-1] |= spread("speedup", [a / b for a, b in zip(published, whole)])
        if name not in (PUBLISHED, SOFT):
            more = [100 * (b / a - 1) for a, b in zip(soft, whole)]
            rows[-1] |= spread("overhead_percent", more)
    return rows


def _seconds_of_parts(parts: Iterator[str], device: torch.device) -> dict[str, float]:
    measured = {}
    synchronize(device)
    start = time.perf_counter()
    for part in parts:
        synchronize(device)
        end = time.perf_counter()
        measured[part], start = end - start, end
    return measured


# Operations and bytes


class _BytesOfProducts(TorchDispatchMode):
    """Bytes of what products of matrices take and give."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in COUNTED:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            tensors = [x for x in tensors if x.ndim > 1]  # attention returns seeds as well
            # CaiT's mixing of a few heads is no product once it is compiled.
            if all(max(x.shape[-2:]) > 16 for x in tensors):
                self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def count(parts: Iterator[str]) -> dict[str, tuple[int, int]]:
    """Operations of the products of matrices in each part of a step, and the bytes they move.

    Both bound the time from below: all other work counts nothing, as if it were done on the fly
    while a product reads or writes. A multiplication and an addition are two operations.

    Args:
        parts: an eager step that yields the name of each part when it is done.

    Returns:
        Operations and bytes by part, and their sums as ``step``.
    """
    counts = {}
    while True:
        with (
            FlopCounterMode(display=False, custom_mapping=PRODUCTS) as operations,
            _BytesOfProducts() as moved,
        ):
            part = next(parts, None)
        if part is None:
            break
        counts[part] = operations.get_total_flops(), moved.bytes
    return counts | {"step": tuple(map(sum, zip(*counts.values())))}


def _limits(operations: int, moved: int, seconds: float, gpu: Gpu | None) -> dict[str, float]:
    row = {"operations": operations, "bytes": moved}
    if gpu is not None:
        row["matmul_share"] = operations / seconds / (gpu.tflops * 1e12)
        row["memory_share"] = moved / seconds / (gpu.bandwidth_gb_s * 1e9)
    return row
