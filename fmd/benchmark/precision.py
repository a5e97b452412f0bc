"""Errors of the losses and their gradients, for several ways of multiplying matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from fmd.benchmark.tools import progress
from fmd.build import build_model, load_trained
from fmd.config import load_experiment, teacher_config
from fmd.data import load_data
from fmd.losses import _distances
from fmd.models import TokenModel


def _rounded(x: Tensor, bits: int) -> Tensor:
    """float32 rounded to ``bits`` explicit bits of mantissa: 10 for TF32, 7 for bfloat16."""
    drop = 23 - bits
    whole = x.contiguous().view(torch.int32)
    whole = whole + (1 << (drop - 1)) - 1 + ((whole >> drop) & 1)  # to nearest, ties to even
    return ((whole >> drop) << drop).view(torch.float32)


def _tf32(a: Tensor, b: Tensor) -> Tensor:
    return _rounded(a, 10) @ _rounded(b, 10)


def _bfloat16(a: Tensor, b: Tensor) -> Tensor:
    return _rounded(a, 7) @ _rounded(b, 7)


def _split_bfloat16(a: Tensor, b: Tensor) -> Tensor:
    """Three products of the leading and the following bits."""
    a_high, b_high = _rounded(a, 7), _rounded(b, 7)
    a_low, b_low = _rounded(a - a_high, 7), _rounded(b - b_high, 7)
    return a_high @ b_high + a_high @ b_low + a_low @ b_high


def simulated_full(
    student: Tensor, teacher: Tensor, product: Callable, mean_apart: bool = False, rows: int = 4096
) -> tuple[float, Tensor]:
    """The full loss of unit tokens ``(n, D)`` and its gradient, with another product of matrices.

    Products of so many ``rows`` are added up in float64. With ``mean_apart`` the tokens' mean m is
    taken off first, S = S' + 1 mᵀ, and what it contributes to SᵀS is added in float64, to S (SᵀS)
    in float32.
    """
    n = len(student)
    means = [x.mean(0) if mean_apart else torch.zeros_like(x[0]) for x in (student, teacher)]
    s, t = student - means[0], teacher - means[1]

    def gram(a, b):
        chunks = zip(a.split(rows), b.split(rows))
        return sum(product(x.T, y).double() for x, y in chunks)

    ss, ts, tt = gram(s, s), gram(t, s), gram(t, t)
    ms, mt = (m.double() for m in means)
    squares = [
        (x + n * torch.outer(a, b)).square().sum()
        for x, a, b in ((ss, ms, ms), (tt, mt, mt), (ts, mt, ms))
    ]
    loss = (squares[0] + squares[1] - 2 * squares[2]) / n**2
    ss, ts = ss.float(), ts.float()
    grad = product(s, ss) - product(t, ts) + (means[0] @ ss - means[1] @ ts)
    grad += n * torch.outer(student @ means[0] - teacher @ means[1], means[0])
    grad -= student * (grad * student).sum(-1, keepdim=True)
    return loss.item(), grad * (4 / n**2)


METHODS = {
    "float32, one sum": {"product": torch.matmul, "rows": 10**9},
    "TF32": {"product": _tf32},
    "TF32, mean apart": {"product": _tf32, "mean_apart": True},
    "bfloat16": {"product": _bfloat16},
    "split bfloat16": {"product": _split_bfloat16},
    "split bfloat16, mean apart": {"product": _split_bfloat16, "mean_apart": True},
}


def precision(device: torch.device, quick: bool) -> list[dict]:
    """Errors of the losses and their gradients against float64, by way of multiplying matrices.

    Of the full loss, ``used`` is :func:`fmd.losses.full_manifold_loss`; the other ways are
    simulated by rounding. Of the decoupled terms, ``float32`` and ``float16`` are what this project
    does, the latter in half-precision steps on GPUs, but here on the device at hand.
    """
    rows = []
    for features, student, teacher in progress(_features(quick), 3 if quick else 12):
        s, t = (F.normalize(x.flatten(0, -2), dim=-1).to(device) for x in (student, teacher))
        shape = {"features": features, "tokens": len(s)}
        shape |= {"student_dim": s.shape[1], "teacher_dim": t.shape[1]}
        shape |= {"mean_length": s.mean(0).norm().item()}
        exact = _loss_and_gradient("full", s.double()[None], t.double()[None])
        results = {("full", "used"): _loss_and_gradient("full", s[None], t[None])}
        for name, way in METHODS.items():
            results["full", name] = simulated_full(s, t, **way)
        references = {"full": exact}
        images = [_images(x).to(device) for x in (student, teacher)]
        for term in ("intra", "inter", "random"):
            references[term] = _loss_and_gradient(term, *(x.double() for x in images))
            for half in (False, True):
                key = term, "float16" if half else "float32"
                results[key] = _loss_and_gradient(term, *images, half=half)
        for (term, name), (loss, grad) in results.items():
            exact_loss, exact_grad = references[term]
            error = (grad.flatten() - exact_grad.flatten()).norm() / exact_grad.norm()
            rows.append(
                {
                    **shape,
                    "loss": exact_loss,
                    "term": term,
                    "method": name,
                    "loss_error": abs(loss - exact_loss) / exact_loss,
                    "gradient_error": error.item(),
                    "negative": loss < 0,
                }
            )
    return rows


def _loss_and_gradient(
    term: str, student: Tensor, teacher: Tensor, half: bool = False
) -> tuple[float, Tensor]:
    student = student.detach().requires_grad_()
    generator = torch.Generator(student.device).manual_seed(0)
    options = {"num_patches": 192, "generator": generator, "half": half}
    (loss,) = _distances(student, teacher, (term,), **options)
    return loss.item(), torch.autograd.grad(loss, student)[0]


def _images(tokens: Tensor) -> Tensor:
    """At most 64 images' tokens ``(B, N, D)``; of tokens without images, up to 64 times 196."""
    if tokens.ndim == 2:
        patches = min(len(tokens) // 64, 196)
        tokens = tokens[: 64 * patches].unflatten(0, (64, patches))
    return tokens[:64]


def _features(quick: bool) -> Iterable[tuple[str, Tensor, Tensor]]:
    """Tokens of students and teachers: of the digits, of photographs, and made up."""
    stages = [None] if quick else [None, "soft-kd", "full"]
    for stage in stages:
        pairs = digits_tokens(stage, images=8 if quick else 1024, trained_teacher=not quick)
        for layer in (0, len(pairs) - 1):
            yield f"digits, {stage or 'untrained'}, pair {layer}", *pairs[layer]
    # Tokens that are mostly one direction, a student near its teacher, many tokens.
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    shapes = [(200_000, 96, 1.0), (50_000, 384, 3.0), (12_544, 1024, 3.0)]
    for n, d, mean in [(64, 8, 3.0)] if quick else shapes:
        teacher = draw(n, 16) @ draw(16, d) / 4 + mean * draw(d) + 0.1 * draw(n, d)
        yield f"made up, {d} channels, mean {mean:g}", teacher + 0.1 * draw(n, d), teacher
    if quick:
        return
    photographs = _photographs(32)
    with torch.no_grad():
        student = TokenModel(timm.create_model("deit_tiny_patch16_224").eval(), [0, 11])
        teacher = TokenModel(timm.create_model("cait_s24_224").eval(), [0, 23])
        pairs = list(zip(student(photographs)[1], teacher(photographs)[1]))
    for layer, pair in enumerate(pairs):
        yield f"photographs, untrained, pair {layer}", *pair
    last = pairs[-1][1]
    near = last + 0.1 * last.std() * draw(last.shape)
    yield "photographs, student near teacher", near, last


def digits_tokens(
    variant: str | None, images: int, trained_teacher: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Tokens of the digits' student and teacher on training images, for each layer pair.

    Args:
        variant: whose student (seed 0) is taken from the results, or None for an untrained one.
        images: how many.
        trained_teacher: or an untrained one.

    Raises:
        FmdError: a run is not among the results.
    """
    data = load_data("digits")
    run = load_experiment("digits").run(variant or "full")
    torch.manual_seed(0)
    student = load_trained(run, data) if variant else build_model(run, data)
    config = teacher_config(run)
    teacher = load_trained(config, data) if trained_teacher else build_model(config, data)
    batch = data.normalize(data.train.images[:images])
    with torch.no_grad():
        _, students = TokenModel(student.eval(), run.student_layers)(batch)
        _, teachers = TokenModel(teacher.eval(), run.teacher_layers)(batch)
    return list(zip(students, teachers))


def _photographs(number: int) -> Tensor:
    """Crops of scikit-learn's two photographs, ``(number, 3, 224, 224)``, normalised."""
    from sklearn.datasets import load_sample_images

    generator = torch.Generator().manual_seed(0)
    images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2) / 255
    crops = []
    for i in range(number):
        top, left = (
            int(torch.randint(size - 223, (), generator=generator)) for size in images.shape[2:]
        )
        crops.append(images[i % len(images), :, top : top + 224, left : left + 224])
    return (torch.stack(crops) - 0.45) / 0.225
