"""Figures and tables of the stored benchmarks (:func:`fmd.records.read_benchmark`)."""

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
    figure = Figure(figsize=(9, 4))
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
    """Medians per function and shape, named once, with the ratio to the yardstick and its range."""
    frame = pd.DataFrame(record["rows"]).fillna({"yardstick": ""})
    frame = frame[frame["case"] != "growth"]
    ratio = [
        f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f})" if row.yardstick else ""
        for row in frame.itertuples()
    ]
    shape = pd.Series(
        [
            f"{row.case}: {row.batch}×{row.patches}, {row.student_dim}/{row.teacher_dim}"
            + f", {row.layers} pairs" * (row.layers > 1)
            for row in frame.itertuples()
        ],
        frame.index,
    )
    return pd.DataFrame(
        {
            "shape": shape.where(shape != shape.shift(), ""),
            "function": frame["function"],
            "milliseconds": (1000 * frame["seconds"]).round(1),
            "peak MiB": frame["peak_mb"].round(1),
            "times faster": ratio,
            "than": frame["yardstick"],
        }
    )


def precision_table(record: dict) -> pd.DataFrame:
    """Relative error of the full loss's gradient, a row for features and a column for each way."""
    frame = pd.DataFrame(record["rows"])
    frame = frame[frame["term"] == "full"]
    index = ["features", "tokens", "student_dim", "teacher_dim", "mean_length", "loss"]
    table = frame.pivot(index=index, columns="method", values="gradient_error")
    rows = pd.MultiIndex.from_frame(frame[index].drop_duplicates())
    return table.loc[rows, list(dict.fromkeys(frame["method"]))]


WAYS = {  # of multiplying: colour and marker
    "used": STYLES["full"][::2],
    "float32, one sum": STYLES["none"][::2],
    "TF32": STYLES["soft-kd"][::2],
    "TF32, mean apart": STYLES["inter"][::2],
    "bfloat16": STYLES["decoupled"][::2],
    "split bfloat16": STYLES["random"][::2],
    "split bfloat16, mean apart": STYLES["intra"][::2],
}
LARGEST_ERROR = 1e-3  # of the gradient, relative, that is aimed at


@mpl.rc_context(RC)
def precision(record: dict) -> Figure:
    """Relative error of the full loss's gradient: a row for features, a marker for each way."""
    table = precision_table(record).droplevel([1, 2, 3, 4, 5])
    figure = Figure(figsize=(7.2, 5))
    axes = figure.subplots()
    for way, (color, marker) in reversed(WAYS.items()):  # what is used on top
        axes.semilogx(table[way], table.index, color=color, marker=marker, linestyle="", label=way)
    axes.axvline(LARGEST_ERROR, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="relative error of the gradient (line: the aim)")
    handles, names = (x[::-1] for x in axes.get_legend_handles_labels())
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    worst = ", ".join(f"{way} {table[way].max():.1e}" for way in WAYS)
    figure.alt = (
        "Dots on a logarithmic axis: the relative error of the full loss's gradient on "
        f"{len(table)} sets of features, for {len(WAYS)} ways of multiplying. Largest errors: "
        f"{worst}; the aim is {LARGEST_ERROR:.0e}. Measured on {record['device']}."
    )
    return figure


def half_precision_table(record: dict) -> pd.DataFrame:
    """Relative errors of the decoupled terms' gradients, a column for each term and number format.

    Indexed by the features and, so that near misses show, the full loss of them.
    """
    frame = pd.DataFrame(record["rows"])
    index = ["features", "tokens", "student_dim", "teacher_dim"]
    full = frame[frame["method"] == "used"].set_index(index)["loss"]
    terms = frame[frame["term"] != "full"]
    terms = terms.assign(column=terms["term"] + ", " + terms["method"])
    table = terms.pivot(index=index, columns="column", values="gradient_error")
    table = table.loc[full.index, list(dict.fromkeys(terms["column"]))]
    return table.set_index(full.rename("full loss"), append=True).droplevel(index[1:])


def variance_table(record: dict) -> pd.DataFrame:
    """Bias, spread and gradient noise of the random term by K, averaged over layer pairs."""
    columns = ["bias", "expected_bias", "spread", "gradient_noise", "gradient_cosine"]
    return pd.DataFrame(record["rows"]).groupby(["student", "k"], sort=False)[columns].mean()


@mpl.rc_context(RC)
def noise(record: dict) -> Figure:
    """Bias of the random term (lines: as expected) and noise of its gradient against K."""
    table = variance_table(record)
    figure = Figure(figsize=(7.2, 3.8))
    bias, gradient = figure.subplots(1, 2)
    sentences = []
    for student, rows in table.groupby(level="student", sort=False):
        color, line, marker = STYLES.get(student, STYLES["none"])
        k = rows.index.get_level_values("k")
        bias.semilogx(k, 100 * rows["expected_bias"], color=color, linestyle=line)
        bias.semilogx(k, 100 * rows["bias"], color=color, linestyle="", marker=marker)
        gradient.loglog(
            k, rows["gradient_noise"], color=color, linestyle=line, marker=marker, label=student
        )
        first, last = rows.iloc[0], rows.iloc[-1]
        sentences.append(
            f"{student}: from K = {k[0]} to {k[-1]} the bias goes from {first['bias']:.0%} to "
            f"{last['bias']:.1%}, the gradient's noise from {first['gradient_noise']:.1f} to "
            f"{last['gradient_noise']:.1f} times its length"
        )
    bias.axhline(0, color="black", linewidth=1)
    bias.set(ylabel="bias, % of the full loss (lines: expected)")
    gradient.axhline(1, color="black", linewidth=1)
    gradient.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    gradient.set(ylabel="gradient's noise / its length")
    for axes in (bias, gradient):
        axes.set(xlabel="K, patches drawn")
        axes.set_xticks(k, [f"{x}" for x in k])
        axes.minorticks_off()
    handles, names = gradient.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    figure.alt = (
        "Two plots against the number of patches K: the bias of the random term, and the noise of "
        f"its gradient as a multiple of the gradient. {'; '.join(sentences)}. "
        f"Measured on {record['device']}."
    )
    return figure


PARTS = {
    "teacher forward": "#4477aa",
    "student forward": "#66ccee",
    "losses": "#ee6677",
    "backward": "#ccbb44",
    "optimizer": "#bbbbbb",
}


@mpl.rc_context(RC)
def step_parts(record: dict) -> Figure:
    """Milliseconds an image of each part of a step, a bar for each variant."""
    frame = pd.DataFrame(record["rows"])
    order = list(dict.fromkeys(frame["variant"]))
    table = frame.assign(milliseconds=1000 * frame["seconds"] / frame["batch"])
    table = table.pivot(index="variant", columns="part", values="milliseconds").loc[order]
    figure = Figure(figsize=(6, 2.8))
    axes = figure.subplots()
    start = 0
    for part, color in PARTS.items():
        axes.barh(order, table[part], left=start, color=color, label=part)
        start = start + table[part]
    axes.invert_yaxis()
    axes.set_axisbelow(True)
    axes.set(xlabel="milliseconds an image")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    sentences = [
        f"{variant}: " + ", ".join(f"{part} {row[part]:.3g}" for part in PARTS)
        for variant, row in table.iterrows()
    ]
    figure.alt = (
        f"Bars of milliseconds an image, by part of a training step. {'; '.join(sentences)}. "
        f"Measured on {record['device']}."
    )
    return figure


def step_table(record: dict) -> pd.DataFrame:
    """A row for each variant of the whole step: its speed, set against the others."""
    rows = [row for row in record["rows"] if row["part"] == "step"]
    return pd.DataFrame(
        {
            "step": [row["variant"] for row in rows],
            "images/s": [f"{row['images_per_second']:,.1f}" for row in rows],
            "times faster": [_range(row, "speedup", "{:.2f}") for row in rows],
            "over soft distillation, %": [
                _range(row, "overhead_percent", "{:+.1f}") for row in rows
            ],
            "precision": [row["precision"] for row in rows],
        }
    )


def limits_table(record: dict) -> pd.DataFrame | None:
    """How near the GPU's peak rates each part comes; None where these are not known."""
    rows = [row for row in record["rows"] if "matmul_share" in row]
    if not rows:
        return None
    return pd.DataFrame(
        {
            "step": [row["variant"] for row in rows],
            "part": [row["part"] for row in rows],
            "operations, 10⁹": [f"{row['operations'] / 1e9:.3g}" for row in rows],
            "of the peak": [f"{row['matmul_share']:.0%}" for row in rows],
            "bytes, 10⁹": [f"{row['bytes'] / 1e9:.3g}" for row in rows],
            "of the bandwidth": [f"{row['memory_share']:.0%}" for row in rows],
        }
    )


def _range(row: dict, column: str, form: str) -> str:
    """'1.60 (1.55 to 1.66)' of a row's median, lowest and highest; a dash without one."""
    if column not in row:
        return "–"
    middle, low, high = (
        form.format(row[name]).replace("-", "−")
        for name in (column, f"{column}_low", f"{column}_high")
    )
    return f"{middle} ({low} to {high})"
