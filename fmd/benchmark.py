"""What the losses cost, how exact they are and how noisy, measured side by side in one run.

``python -m fmd.benchmark losses|precision|variance|step`` writes
``results/benchmarks/<name>.json``. Functions that are compared take turns, so that a busy machine
slows all of them alike; each row holds the median time and, against its yardstick, the median ratio
with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from fmd.benchmark_step import step
from fmd.benchmark_tools import (
    peak_memory,
    plain_full,
    plain_inter,
    plain_intra,
    plain_three,
    progress,
    seconds,
)
from fmd.build import build_model, load_trained
from fmd.config import load_experiment, teacher_config
from fmd.data import load_data
from fmd.errors import run_main
from fmd.losses import ManifoldLoss, _distances, full_manifold_loss, random_patch_loss
from fmd.models import TokenModel
from fmd.processes import device_name
from fmd.records import provenance, spread, write_benchmark

# Time and memory of the losses


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


# Precision


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
    student: Tensor, teacher: Tensor, product: Callable, mean_apart: bool
) -> tuple[float, Tensor]:
    """The full loss of unit tokens ``(n, D)`` and its gradient, with another product of matrices.

    With ``mean_apart`` the tokens' mean m is taken off first, S = S' + 1 mᵀ, and what it
    contributes to SᵀS and to S (SᵀS) is added in float32.
    """
    n = len(student)
    means = [x.mean(0) if mean_apart else torch.zeros_like(x[0]) for x in (student, teacher)]
    s, t = student - means[0], teacher - means[1]

    def gram(a, b):
        chunks = zip(a.split(4096), b.split(4096))
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
    "float32, one sum": (lambda a, b: a @ b, False),
    "TF32": (_tf32, False),
    "TF32, mean apart": (_tf32, True),
    "bfloat16": (_bfloat16, False),
    "split bfloat16": (_split_bfloat16, False),
    "split bfloat16, mean apart": (_split_bfloat16, True),
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
        for name, (product, mean_apart) in METHODS.items():
            results["full", name] = simulated_full(s, t, product, mean_apart)
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


# Variance


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


BENCHMARKS = {"losses": losses, "precision": precision, "variance": variance, "step": step}


def run(name: str, *, quick: bool = False, device: str | torch.device | None = None) -> Path:
    """Run a benchmark and write its rows, with provenance and device; returns the file.

    Args:
        name: one of ``losses``, ``precision``, ``variance``, ``step``.
        quick: tiny sizes that show nothing but that all of it runs; written to ``<name>-quick``.
        device: a GPU if there is one, else the CPU.

    Raises:
        FmdError: a run of the digits that the features come from is not among the results.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    code = provenance()
    start = time.monotonic()
    rows = BENCHMARKS[name](device, quick)
    record = {
        "benchmark": name,
        "quick": quick,
        **code,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
    return write_benchmark(f"{name}-quick" if quick else name, record)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd.benchmark", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes would break the bar
    print(run(args.name, quick=args.quick, device=args.device))


if __name__ == "__main__":
    run_main(main)
