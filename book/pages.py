"""What the cells of the pages share: results with the records behind them, and said in words."""

from __future__ import annotations

import base64
import contextlib
import io
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import yaml
from IPython.display import HTML, Markdown, display

if TYPE_CHECKING:
    from fmd.plots import Figure
    from fmd.records import Record

BOOK = Path(__file__).parent
MANIFOLD = ("intra", "inter", "random", "decoupled", "full")


def records(experiment: str) -> list[Record]:
    """The stored records of an experiment; what is missing or not whole is said on the page."""
    from fmd.results import load_records  # loads torch, which pages without records do not need

    with contextlib.redirect_stderr(io.StringIO()):  # the problems are shown below instead
        found, problems = load_records(experiment)
    for problem in problems:
        say(f":::{{warning}}\n{problem}\n:::")
    if not found:
        say(
            f":::{{warning}}\nThere are no records of `{experiment}` yet. Make them with "
            f"`snakemake --cores 2 --config experiment={experiment}`, "
            "then build the book again.\n:::"
        )
    return found


def say(markdown: str) -> None:
    display(Markdown(markdown))


def table(frame: pd.DataFrame, note: str = "", text: tuple[str, ...] = ("variant",)) -> None:
    """Show a frame of HTML strings in a box that scrolls by itself; ``text`` columns align left."""
    side = {column: "text" if column in text else "number" for column in frame.columns}
    head = "".join(f'<th class="{side[c]}">{escape(c)}</th>' for c in frame.columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="{side[c]}">{row[c]}</td>' for c in frame.columns) + "</tr>"
        for row in frame.to_dict("records")
    )
    display(
        HTML(
            f'<div class="scroll" tabindex="0"><table class="result"><thead><tr>{head}</tr></thead>'
            f'<tbody>{body}</tbody></table></div><p class="result-note">{escape(note)}</p>'
        )
    )


def figure(fig: Figure, note: str = "") -> None:
    """Show a figure as SVG with its alternative text and the records behind it."""
    data = base64.b64encode(fig.svg()).decode()
    display(
        HTML(
            '<figure class="result"><div class="scroll" tabindex="0">'
            f'<img alt="{escape(fig.alt)}" src="data:image/svg+xml;base64,{data}"></div>'
            f'<figcaption class="result-note">{escape(note)}</figcaption></figure>'
        )
    )


def points(difference: float, half_width: float) -> str:
    """'+1.2 ± 0.3 points', with a true minus sign."""
    return f"{difference:+.1f} ± {half_width:.1f} points".replace("-", "−")


def answer(summary: pd.DataFrame) -> str:
    """Does each manifold variant help beyond soft distillation? In words, from a summary.

    Args:
        summary: from :func:`fmd.results.summarize`, against ``soft-kd``.

    Returns:
        Markdown that goes on from 'After n epochs,'. A difference counts where its 95 % interval
        excludes zero.
    """
    rows = summary[summary["variant"].isin(MANIFOLD) & summary["difference_ci"].notna()]
    if rows.empty:
        return "there are too few runs to say whether the manifold terms help."
    low, high = rows.difference - rows.difference_ci, rows.difference + rows.difference_ci
    groups = {
        "better than soft distillation alone": rows[low > 0],
        "not distinguishable from soft distillation alone": rows[(low <= 0) & (high >= 0)],
        "worse than soft distillation alone": rows[high < 0],
    }
    said = [
        f"**{len(part)} of {len(rows)}** {'is' if len(part) == 1 else 'are'} {verdict}: "
        + ", ".join(
            f"`{r.variant}` ({points(r.difference, r.difference_ci)})" for r in part.itertuples()
        )
        for verdict, part in groups.items()
        if len(part)
    ]
    pairs = sorted(set(rows["pairs"]))
    seeds = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    return (
        f"of the variants with manifold terms, {'; '.join(said)}. These are differences of test "
        f"top-1 to `soft-kd` at equal seeds, with 95 % intervals over {seeds} seeds."
    )


def schedule(found: list[Record]) -> str:
    """'25 epochs', of the students."""
    epochs = sorted(
        {record.config.epochs for record in found if record.config.variant != "teacher"}
    )
    return f"{' or '.join(map(str, epochs))} epochs"


def reported() -> pd.DataFrame:
    """What the paper, its authors, reruns and rivals report: one row a number, as strings."""
    return pd.read_csv(BOOK / "data" / "reported.csv", dtype=str, keep_default_na=False)


def reported_pair(kind: str) -> tuple[float, float]:
    """Top-1 with the manifold terms and with soft labels alone, CaiT-S24 to DeiT-Tiny.

    Args:
        kind: ``'paper'`` or ``'rerun'``.
    """
    frame = reported()
    rows = frame[
        (frame.kind == kind) & (frame.student == "DeiT-Tiny") & (frame.teacher == "CaiT-S24")
    ]
    return tuple(
        float(rows[rows.method.str.startswith(method)].top1.item())
        for method in ("manifold distillation", "soft labels only")
    )


def repository() -> str:
    """The public address, from the one place that holds it."""
    return yaml.safe_load((BOOK.parent / "_config.yml").read_text())["repository"]["url"]
