"""Figures from records: pure matplotlib, no global state, one colour and line style per variant.

Every figure has a solid white panel, which reads the same on dark and light pages, Okabe and Ito's
colours, which do not rely on telling red from green (an experiment's own variants: on markers), and
an alternative text written from its data.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.figure import Figure as MplFigure

from fmd.config import RunConfig, is_teacher, split_variant, teacher_config
from fmd.errors import FmdError
from fmd.records import Record, write_atomically

if TYPE_CHECKING:  # only the relation maps need torch, which takes seconds to load
    from torch import Tensor, nn

    from fmd.data import ImageData

# Okabe & Ito, "Color universal design" (2008), without the yellow that white swallows.
STYLES = {
    "none": ("#000000", ":", "o"),
    "soft-kd": ("#0072B2", "--", "s"),
    "intra": ("#E69F00", "-", "^"),
    "inter": ("#56B4E9", "-", "v"),
    "random": ("#CC79A7", "-", "D"),
    "decoupled": ("#D55E00", "-", "P"),
    "full": ("#009E73", "-", "X"),
    "teacher": ("#666666", "-.", "*"),
}
# Of an experiment's own variants, in turn: what of Paul Tol's "muted" (2021) is unlike those above.
OWN_COLORS, OWN_LINES, OWN_MARKERS = ("#332288", "#999933", "#882255"), ("--", ":"), "<>phd"
TERMS = {"intra": "within an image", "inter": "between images", "full": "all patches"}
RC = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.markersize": 6,
    "svg.fonttype": "none",  # text stays text: it can be searched, selected and read aloud
    "svg.hashsalt": "fmd",  # the same data give the same file
}


class Figure(MplFigure):
    """A matplotlib figure with an alternative text, which a notebook shows together with it."""

    alt: str = ""

    def __init__(self, *args, dpi=100, layout="constrained", facecolor="white", **kwargs):
        super().__init__(*args, dpi=dpi, layout=layout, facecolor=facecolor, **kwargs)

    def svg(self) -> bytes:
        """The figure as SVG; equal data give equal bytes."""
        buffer = io.BytesIO()
        with mpl.rc_context(RC):
            self.savefig(buffer, format="svg", metadata={"Date": None})
        return buffer.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self.svg()).decode()
        return (
            f'<img alt="{escape(self.alt)}" style="max-width: 100%" '
            f'src="data:image/svg+xml;base64,{data}">'
        )


def save(figure: Figure, stem: Path) -> Path:
    """Write ``<stem>.png`` (at twice the screen's resolution), ``<stem>.txt`` (the alternative
    text) and ``<stem>.svg``. Returns the SVG's path."""
    png = io.BytesIO()
    with mpl.rc_context(RC):
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    contents = {"png": png.getvalue(), "txt": figure.alt + "\n", "svg": figure.svg()}
    for suffix, content in contents.items():
        path = Path(f"{stem}.{suffix}")
        write_atomically(path, content)
    return path


def number(value: float, sign: str = "") -> str:
    """One decimal, with a true minus sign, and none of either kind for 0.0; '–' for NaN."""
    if np.isnan(value):
        return "–"
    rounded = round(value, 1) or 0.0  # not −0.0
    return f"{rounded:{sign if rounded else ''}.1f}".replace("-", "−")


def plus_minus(value: float, half_width: float, sign: str = "") -> str:
    """A value with the half width of its interval; '–' for NaN."""
    return "–" if np.isnan(value) else f"{number(value, sign)} ± {number(half_width)}"


def _figure(width: float, height: float, **subplots):
    """A figure in inches at 100 dpi, and its axes."""
    figure = Figure(figsize=(width, height))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches
    return figure, figure.subplots(**subplots)


def _styles(labels: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour, line style and marker; an overridden variant looks like the one it overrides.

    An experiment's own variants look alike in all figures of the same labels.
    """
    names = {label: split_variant(label)[0] for label in labels}
    own = [name for name in dict.fromkeys(names.values()) if name not in STYLES]
    looks = STYLES | dict(zip(own, zip(*map(cycle, (OWN_COLORS, OWN_LINES, OWN_MARKERS)))))
    parts = ("color", "linestyle", "marker")
    return {label: dict(zip(parts, looks[name])) for label, name in names.items()}


def _by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.config.variant, []).append(record)
    return groups


@mpl.rc_context(RC)
def learning_curves(records: Sequence[Record]) -> Figure:
    """Validation top-1 by epoch: each variant's mean over seeds, in a band from the lowest to the
    highest seed. Next to students the teacher is a level line at its last epoch."""
    groups = _by_variant(records)
    students = {k: v for k, v in groups.items() if not is_teacher(k)}
    teachers = {k: v for k, v in groups.items() if k not in students}
    figure, axes = _figure(7.2, 4.2)
    last, styles = {}, _styles(list(groups))
    for variant in students or teachers:
        style = styles[variant]
        curves = np.array([[e.val.top1 for e in r.epochs] for r in groups[variant]])
        epochs = np.arange(1, curves.shape[1] + 1)
        mean = curves.mean(axis=0)
        last[variant] = mean[-1]
        axes.plot(epochs, mean, label=variant, markevery=max(len(epochs) // 8, 1), **style)
        if len(curves) > 1:
            low, high = curves.min(axis=0), curves.max(axis=0)
            axes.fill_between(epochs, low, high, color=style["color"], alpha=0.12, linewidth=0)
    if students:
        for variant, runs in teachers.items():
            level = np.mean([record.last.val.top1 for record in runs])
            color, line, _ = STYLES["teacher"]
            axes.axhline(level, color=color, linestyle=line, label=f"{variant}, last epoch")
    axes.set(xlabel="epoch", ylabel="validation top-1 (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    # The legend lists the lines from the highest end to the lowest, as the eye meets them.
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: -last.get(labels[i], np.inf))
    seeds = sorted({len(runs) for runs in (students or teachers).values()})
    several = f"mean of {span(seeds)} seeds;\nband: lowest to highest"
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        title=several if seeds[-1] > 1 else "one seed",
        title_fontsize=9,
        alignment="left",
    )
    ranking = sorted(last, key=last.__getitem__, reverse=True)
    figure.alt = (
        "Line chart of validation top-1 accuracy by epoch. At the last epoch: "
        + ", ".join(f"{variant} {last[variant]:.1f} %" for variant in ranking)
        + "."
    )
    return figure


def span(numbers: Sequence[int]) -> str:
    """'5', or '3 to 5' of sorted numbers."""
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


@mpl.rc_context(RC)
def forest(summary: pd.DataFrame) -> Figure:
    """Paired differences of test top-1 to the baseline with 95 % intervals, one row a variant.

    Args:
        summary: from :func:`fmd.results.summarize`; rows without a difference are left out.
    """
    rows = summary[summary["pairs"] > 0].iloc[::-1]  # matplotlib counts rows from the bottom
    baselines = " / ".join(dict.fromkeys(rows["baseline"]))
    figure, axes = _figure(7.2, 1.3 + 0.42 * len(rows))
    axes.axvline(0, color="#000000", linewidth=1)
    texts, styles = [], _styles(list(summary["variant"]))
    for y, row in enumerate(rows.itertuples()):
        style = styles[row.variant]
        known = not np.isnan(row.difference_ci)
        axes.errorbar(
            row.difference,
            y,
            xerr=row.difference_ci if known else None,
            fmt=style["marker"],
            color=style["color"],
            markersize=8,
            capsize=4,
            linewidth=2,
        )
        pairs = f"{row.pairs} pair{'s' if row.pairs > 1 else ''}"
        texts.append(f"{plus_minus(row.difference, row.difference_ci, '+')} ({pairs})")
    axes.set_yticks(range(len(rows)), list(rows["variant"]))
    for y, text in enumerate(texts):
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center")
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"test top-1 minus {baselines}, same seed (points; bar: 95 % interval)")
    order = np.argsort(-rows["difference"].to_numpy(), kind="stable")
    listing = ", ".join(f"{rows['variant'].iloc[i]} {texts[i]}" for i in order)
    figure.alt = (
        f"Forest plot of the difference in test top-1 to {baselines} at equal seeds, in percentage "
        f"points with 95 % intervals, largest first: {listing}."
    )
    return figure


@mpl.rc_context(RC)
def speed(summary: pd.DataFrame) -> Figure:
    """Test top-1 (95 % interval) against training images per second, one point a variant.

    Speeds compare only between runs of one machine under one load.

    Args:
        summary: from :func:`fmd.results.summarize`.
    """
    figure, axes = _figure(7.2, 3.8)
    styles = _styles(list(summary["variant"]))
    for row in summary.itertuples():
        style = styles[row.variant]
        axes.errorbar(
            row.images_per_second,
            row.top1,
            yerr=None if np.isnan(row.top1_ci) else row.top1_ci,
            fmt=style["marker"],
            color=style["color"],
            markersize=8,
            capsize=4,
            label=row.variant,
        )
    axes.set(xlabel="training images per second", ylabel="test top-1 (%)")
    axes.set_xlim(left=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.alt = "Test top-1 against training speed. " + "; ".join(
        f"{row.variant}: {row.top1:.1f} % at {row.images_per_second:.0f} images per second"
        for row in summary.itertuples()
    )
    return figure


@mpl.rc_context(RC)
def layer_similarity(records: Sequence[Record]) -> Figure:
    """Unweighted manifold losses of each layer pair before training (grey) and after, one panel a
    loss, means over seeds; lower is more like the teacher.

    Records without relations are left out, and those of other layers than the first, which is said.

    Raises:
        ValueError: no record has relations.
    """
    styles = _styles([record.config.variant for record in records])
    records = [record for record in records if record.relations]
    if not records:
        raise ValueError("none of the records has relations: only runs that compare layers do")
    first = records[0].relations
    layers = (first.student_layers, first.teacher_layers)
    groups = _by_variant(
        [r for r in records if (r.relations.student_layers, r.relations.teacher_layers) == layers]
    )
    others = [variant for variant in _by_variant(records) if variant not in groups]
    pairs = [f"{s}–{t}" for s, t in zip(*layers)]
    figure, all_axes = _figure(8.4, 4.2, ncols=len(TERMS), sharey=True)
    change = {}
    for axes, (term, meaning) in zip(all_axes, TERMS.items()):
        before = np.array([r.relations.before[term] for runs in groups.values() for r in runs])
        axes.plot(
            pairs,
            before.mean(axis=0),
            color=STYLES["teacher"][0],
            linestyle=":",
            marker="o",
            label="before training",
        )
        for variant, runs in groups.items():
            after = np.mean([r.relations.after[term] for r in runs], axis=0)
            axes.plot(pairs, after, label=variant, **styles[variant])
            change.setdefault(variant, []).append(f"{meaning} {after.mean():.3f}")
        axes.set_title(f"{term}: {meaning}")
        axes.margins(x=0.12)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    all_axes[0].set_ylabel("loss to the teacher's relations")
    without = f" (without {', '.join(others)}: other layers)" if others else ""
    figure.supxlabel(f"student–teacher layers{without}", fontsize=RC["font.size"])
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6))
    best = min(groups, key=lambda v: np.mean([r.relations.after["intra"] for r in groups[v]]))
    figure.alt = (
        "Manifold losses per layer pair before and after training. After training, averaged over "
        "layers: "
        + "; ".join(f"{v}: {', '.join(t)}" for v, t in change.items())
        + f". Most like the teacher {TERMS['intra']}: {best}."
    )
    return figure


def relation_map(tokens: Tensor) -> np.ndarray:
    """Cosines ``(N, N)``, from −1 to 1, between the tokens ``(N, D)`` of one image."""
    import torch

    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    return (tokens @ tokens.T).cpu().numpy()


@mpl.rc_context(RC)
def relation_maps(maps: Mapping[str, np.ndarray], image: np.ndarray) -> Figure:
    """Relation maps side by side, the first being the teacher's, under one colour scale.

    Args:
        maps: title to ``(N, N)`` cosines, from :func:`relation_map`; all of one size.
        image: ``(H, W)`` or ``(H, W, 3)``, shown in front.

    Below each of the others stands its mean squared distance from the first: the loss ``intra`` of
    this one image.
    """
    panels = len(maps) + 1
    columns = panels if panels <= 4 else math.ceil(panels / 2)  # wider rows shrink the text
    rows = math.ceil(panels / columns)
    panel = 6.4 / columns
    figure, grid = _figure(7.2, rows * (panel + 0.5), nrows=rows, ncols=columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    free = iter(grid.flat)
    axes = next(free)
    axes.imshow(image, cmap="gray_r" if image.ndim == 2 else None)
    axes.set_title("image")
    reference_title, reference = next(iter(maps.items()))
    # Rounded: last bits, which differ between machines, then hardly ever move the colour bar.
    lowest = round(min(values.min() for values in maps.values()), 2)
    distances = {}
    for title, values in maps.items():
        axes = next(free)
        drawn = axes.imshow(values, cmap="cividis", vmin=lowest, vmax=1)
        axes.set_title(title)
        if title == reference_title:
            axes.set_xlabel(f"{len(values)} patches", fontsize=10)
        else:
            distances[title] = float(((values - reference) ** 2).mean())
            axes.set_xlabel(f"distance {distances[title]:.3f}", fontsize=10)
    for axes in free:
        axes.set_visible(False)
    figure.colorbar(drawn, ax=grid, label="cosine", fraction=0.03, pad=0.02)
    figure.alt = (
        f"Cosines between the patches of one image, as maps. Mean squared distance from "
        f"{reference_title}: " + ", ".join(f"{k} {v:.3f}" for k, v in distances.items()) + "."
    )
    return figure


def trained_relation_maps(students: Mapping[str, RunConfig], data: ImageData) -> Figure:
    """Relation maps of stored networks in the last pair of layers, for the first test image: the
    teacher, the first student before training, then each student after it.

    Args:
        students: by title, finished runs with stored weights. Those of another network, teacher or
            last pair of layers than the first are left out.
        data: their data, on the CPU.

    Raises:
        FmdError: weights are missing, or a run compares no layers, or single patches.
    """
    import torch

    from fmd.build import build_model, load_trained
    from fmd.models import TokenModel, match_layers

    image = data.normalize(data.test.images[:1])

    @torch.no_grad()
    def tokens(model: nn.Module, layers: Sequence[int]) -> Tensor:
        return TokenModel(model.eval(), layers[-1:])(image)[1][0]

    def pair(config: RunConfig) -> tuple:
        layers = config.student_layers[-1:], config.teacher_layers[-1:]
        return config.model, config.model_args, config.teacher, layers

    config = next(iter(students.values()))
    if not config.student_layers:
        raise FmdError(f"{config.name} compares no layers")
    read = {"teacher": tokens(load_trained(teacher_config(config), data), config.teacher_layers)}
    torch.manual_seed(config.seed)  # as training starts
    read["untrained"] = tokens(build_model(config, data), config.student_layers)
    for title, run in students.items():
        if pair(run) == pair(config):
            read[title] = tokens(load_trained(run, data), run.student_layers)
    # As the losses compare them: where grids differ, on the coarser.
    coarsest = min(read.values(), key=lambda x: x.shape[1])
    if coarsest.shape[1] == 1:
        raise FmdError(f"{config.name} compares single patches, which have no relations")
    pairs = match_layers(list(read.values()), [coarsest] * len(read), image)
    pixels = data.test.images[0]
    return relation_maps(
        {title: relation_map(x[0]) for title, (x, _) in zip(read, pairs)},
        pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy(),
    )
