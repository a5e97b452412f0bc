"""Figures and tables of the stored benchmarks (``fmd.benchmark.read``)."""

from __future__ import annotations

import matplotlib as mpl
import pandas as pd

from fmd.plots import RC, STYLES, Figure

LINES = {
    "definition of full": ("full loss as defined", STYLES["none"]),
    "plain three terms": ("three terms, plain formulas", STYLES["soft-kd"]),
    "three terms": ("three terms", STYLES["decoupled"]),
    "full": ("full loss", STYLES["full"]),
}


@mpl.rc_context(RC)
def cost(record: dict) -> Figure:
    """Time and peak memory of a layer pair's losses against the number of patches B·N, log–log."""
    frame = pd.DataFrame(record["rows"])
    frame = frame[frame["case"] == "growth"].assign(tokens=lambda f: f["batch"] * f["patches"])
    figure = Figure(figsize=(9, 4), dpi=100, layout="constrained", facecolor="white")
    sentences = []
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("seconds", "peak_mb"),
        ("seconds, forward and backward", "peak memory above the tokens, MiB"),
    ):
        for function, (name, (color, line, marker)) in LINES.items():
            rows = frame[frame["function"] == function]
            axes.loglog(
                rows["tokens"], rows[column], color=color, linestyle=line, marker=marker, label=name
            )
            if len(rows):
                last = rows.iloc[-1]
                sentences.append(f"{name} at {last['tokens']}: {last[column]:.3g}")
        axes.set(xlabel="patches in the batch, B·N", ylabel=label)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=len(names))
    figure.alt = (
        "Two log-log plots of seconds, then MiB, against the number of patches. "
        f"{'; '.join(sentences)}. Measured on {record['device']}."
    )
    return figure


def speed_table(record: dict) -> pd.DataFrame:
    """Medians per shape and function, with the ratio to the yardstick and its range."""
    frame = pd.DataFrame(record["rows"])
    frame = frame[frame["case"] != "growth"]
    ratio = [
        f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f})" if row.yardstick else ""
        for row in frame.fillna({"yardstick": ""}).itertuples()
    ]
    return pd.DataFrame(
        {
            "shape": frame["case"],
            "function": frame["function"],
            "milliseconds": (1000 * frame["seconds"]).round(1),
            "peak MiB": frame["peak_mb"].round(1),
            "times faster": ratio,
            "than": frame["yardstick"].fillna(""),
        }
    )


def precision_table(record: dict) -> pd.DataFrame:
    """Relative error of the full loss's gradient, a row for features and a column for each way."""
    frame = pd.DataFrame(record["rows"])
    index = ["features", "tokens", "student_dim", "teacher_dim", "mean_length", "loss"]
    return frame.pivot(index=index, columns="method", values="gradient_error")[
        list(dict.fromkeys(frame["method"]))
    ]


def variance_table(record: dict) -> pd.DataFrame:
    """Bias, spread and gradient noise of the random term by K, averaged over layer pairs."""
    columns = ["bias", "expected_bias", "spread", "gradient_noise", "gradient_cosine"]
    return pd.DataFrame(record["rows"]).groupby(["student", "k"], sort=False)[columns].mean()


def step_table(record: dict) -> pd.DataFrame:
    """Seconds of each part of a step by variant, and the share of the step that they take."""
    frame = pd.DataFrame(record["rows"])
    order = {column: list(dict.fromkeys(frame[column])) for column in ("variant", "part")}
    table = frame.pivot(index="part", columns="variant", values="seconds")
    table = table.loc[order["part"], order["variant"]]
    shares = (table / table.loc["step"]).add_prefix("share: ")
    return pd.concat([table, shares], axis=1)
