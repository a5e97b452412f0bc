"""What the cells of the pages share: text, tables and figures, and what others report."""

from __future__ import annotations

import base64
import math
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import yaml
from IPython.display import HTML, Markdown, display

if TYPE_CHECKING:
    from fmd.plots import Figure

BOOK = Path(__file__).parent


def at_most(value: float) -> str:
    """Two digits, rounded up: what is said to be a bound must be one."""
    power = 10.0 ** math.floor(math.log10(value))
    return f"{math.ceil(10 * value / power) / 10 * power:.1e}"


def breakable(name: str) -> str:
    """A long name, which may break at each part."""
    return re.sub("(::|[/_.-])", r"\1<wbr>", escape(name))


def plain(value: object) -> str:
    """The value of a setting, as HTML; '–' for none."""
    if isinstance(value, dict):
        return "<br>".join(f"{escape(k)} {escape(str(v))}" for k, v in value.items()) or "–"
    if isinstance(value, tuple):
        return escape(" ".join(map(str, value))) or "–"
    if isinstance(value, str):
        return breakable(value)
    return "–" if value is None else str(value)


def say(markdown: str) -> None:
    display(Markdown(markdown))


def table(
    frame: pd.DataFrame, note: str = "", text: tuple[str, ...] = ("variant",), fold: str = ""
) -> None:
    """Show a frame of HTML strings in a box that scrolls by itself.

    Args:
        note: stands below.
        text: columns that align left.
        fold: heading of a fold that hides the table until it is opened.
    """
    side = {column: "text" if column in text else "number" for column in frame.columns}
    head = "".join(f'<th class="{side[c]}">{escape(c)}</th>' for c in frame.columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="{side[c]}">{row[c]}</td>' for c in frame.columns) + "</tr>"
        for row in frame.to_dict("records")
    )
    html = (
        f'<div class="scroll" tabindex="0"><table class="result"><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="result-note">{escape(note)}</p>'
    )
    if fold:
        html = f"<details><summary>{escape(fold)}</summary>{html}</details>"
    display(HTML(html))


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


def measured_note(name: str, record: dict) -> str:
    """What stands behind the measurements of ``results/benchmarks/<name>.json``."""
    parts = [f"commit {record['commit'][:7]}" + " with uncommitted changes" * record["dirty"]]
    if "device" in record:
        parts.append(record["device"])
    if "threads" in record:
        parts.append(f"{record['threads']} thread" + "s" * (record["threads"] > 1))
    parts += [f"{package} {record['versions'][package]}" for package in ("torch", "timm")]
    return f"benchmarks/{name}.json: {', '.join(parts)}"


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
