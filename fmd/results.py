"""Records rolled up: one row a run, one row a variant with intervals; tables, figures and cards.

Intervals are 95 % t intervals over seeds: they hold the spread of initialisation and batches, not
that of drawing other test images. Differences are paired: the same seed starts from the same
weights and sees the same batches, so its spread cancels.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from fmd import plots
from fmd.cards import model_card
from fmd.config import (
    Experiment,
    is_teacher,
    load_experiment,
    own_teacher,
    results_dir,
    split_variant,
)
from fmd.errors import FmdError, run_main
from fmd.plots import number, plus_minus
from fmd.records import Record, changed_settings, read_record, write_atomically

BASELINE = "soft-kd"
FREE_PICTURES = {"digits"}  # data whose images may be shown in figures that are stored
# Settings that soft-kd does not feel: a variant that overrides them is compared with plain soft-kd.
MANIFOLD_SETTINGS = {
    "intra", "inter", "random", "full", "num_patches", "student_layers", "teacher_layers",
}  # fmt: skip


def load_records(experiment: str, root: Path | None = None) -> tuple[list[Record], list[str]]:
    """The records of an experiment, and what is wrong with the others.

    A record is left out if it is not whole, lies in the wrong place, or was made with other
    settings than the experiment has now; each is a line of the second list and a warning on stderr.
    Records that do not go together (other images, another teacher of the same name) are kept, and
    warned of.

    Args:
        experiment: name of a file in ``experiments/``.
        root: a results folder; by default :func:`fmd.config.results_dir`.

    Returns:
        Records in the order of the experiment's variants, each followed by its overridden forms,
        the teacher first, by seed; and the problems.

    Raises:
        FmdError: there is no such experiment.
    """
    settings = load_experiment(experiment)
    folder = Path(root or results_dir()) / "runs" / experiment
    records, problems = [], []
    for path in sorted(folder.glob("*/*.json")):
        try:
            record = read_record(path)
            _check_current(record, path, settings)
            records.append(record)
        except FmdError as error:
            problems.append(str(error))
    problems += _mixed(records)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    order = ["teacher", *settings.variants]
    records.sort(
        key=lambda r: (
            order.index(split_variant(r.config.variant)[0]),
            r.config.variant,
            r.config.seed,
        )
    )
    return records, problems


def _check_current(record: Record, path: Path, settings: Experiment) -> None:
    config = record.config
    if path.parts[-3:] != (config.experiment, config.variant, f"seed-{config.seed}.json"):
        raise FmdError(
            f"{path} is skipped: it is the record of {config.name}; move it to its place"
        )
    variant, overridden = split_variant(config.variant)
    try:
        overrides = {name: getattr(config, name) for name in overridden}
        now = settings.run(variant, config.seed, **overrides)
    except (FmdError, AttributeError) as error:
        raise FmdError(f"{path} is skipped: {error}; move it away") from None
    if now.key != record.key:
        raise FmdError(
            f"{path} is skipped: the experiment's settings have changed since "
            f"({changed_settings(config, now)}); move it away and run again"
        )


def _mixed(records: list[Record]) -> list[str]:
    """Runs that cannot be compared: other images, or another teacher under the same name."""
    seen: dict[str, set[str]] = {}
    for record in records:
        seen.setdefault(f"data {record.data['name']}", set()).add(record.data["fingerprint"])
        if record.teacher is not None:
            seen.setdefault(f"teacher {record.teacher.run}", set()).add(record.teacher.fingerprint)
    return [
        f"the records come from {len(prints)} different versions of {what} (by fingerprint): "
        "run the older ones again before comparing"
        for what, prints in seen.items()
        if len(prints) > 1
    ]


def _baseline_of(label: str, baseline: str) -> str:
    """The baseline's label at the same recipe: every override but those of the manifold terms."""
    _, overrides = split_variant(label)
    kept = [f"{k}={v}" for k, v in overrides.items() if k not in MANIFOLD_SETTINGS]
    return "+".join([baseline, *kept])


def tidy(records: list[Record]) -> pd.DataFrame:
    """One row a run, in the order of ``records``: accuracies in percent, times in seconds.

    ``top1`` is the last epoch's accuracy on the test images, the headline metric; ``top1_best``
    that of the weights with the best validation accuracy; ``val_…`` the same two on the validation
    images.
    """
    rows = [
        {
            "experiment": record.config.experiment,
            "variant": record.config.variant,
            "seed": record.config.seed,
            "top1": record.test.last.top1,
            "top1_best": record.test.best.top1,
            "top5": record.test.last.top5,
            "test_loss": record.test.last.loss,
            "val_top1": record.last.val.top1,
            "val_top1_best": record.best.val.top1,
            "best_epoch": record.best_epoch,
            "epochs": len(record.epochs),
            "agreement": record.test.agreement,
            "parameters": record.parameters,
            "seconds": record.timing.seconds,
            "images_per_second": record.timing.images_per_second,
            "peak_memory_mb": record.timing.peak_memory_mb,
            "teacher": record.teacher.run if record.teacher else None,
            "fingerprint": record.fingerprint,
            "commit": record.commit,
            "dirty": record.dirty,
            "device": record.device,
            "key": record.key,
        }
        for record in records
    ]
    # Without rows, the columns that others look up.
    frame = pd.DataFrame(rows, columns=None if rows else ["variant", "seed", "top1", "agreement"])
    return frame.astype({"agreement": float})


def interval(values: np.ndarray) -> float:
    """Half width of the 95 % t interval of the mean; NaN below two values."""
    n = len(values)
    if n < 2:
        return float("nan")
    return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n))


def summarize(frame: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """One row a student's variant, in the order of ``frame``; teachers are left out.

    Args:
        frame: from :func:`tidy`.
        baseline: the variant that the others are compared with. One with overrides is compared with
            the baseline under the same overrides, those of the manifold terms aside.

    Returns:
        Columns ``variant``, ``n`` (seeds), ``top1``, ``top1_best``, ``agreement`` (means, percent;
        the first two with ``…_ci``, the half width of the 95 % interval), ``baseline``,
        ``difference`` (mean over the common seeds of top-1 minus the baseline's, percentage points)
        with ``difference_ci`` and ``pairs``, ``images_per_second`` (mean), ``dirty`` (how many runs
        came from an uncommitted tree) and ``commits``. NaN is what cannot be said: an interval of
        one run, the difference of the baseline to itself.
    """
    rows = []
    top1 = frame.pivot(index="seed", columns="variant", values="top1")
    for label, runs in frame.groupby("variant", sort=False):
        if is_teacher(label):
            continue
        reference = _baseline_of(label, baseline)
        differences = pd.Series(dtype=float)
        if reference != label and reference in top1:
            differences = (top1[label] - top1[reference]).dropna()
        rows.append(
            {
                "variant": label,
                "n": len(runs),
                "top1": runs["top1"].mean(),
                "top1_ci": interval(runs["top1"]),
                "top1_best": runs["top1_best"].mean(),
                "top1_best_ci": interval(runs["top1_best"]),
                "agreement": runs["agreement"].mean(),
                "baseline": reference,
                "difference": differences.mean(),
                "difference_ci": interval(differences),
                "pairs": len(differences),
                "images_per_second": runs["images_per_second"].mean(),
                "dirty": int(runs["dirty"].sum()),
                "commits": " ".join(sorted({commit[:7] for commit in runs["commit"]})),
            }
        )
    none = ["variant", "baseline", "difference", "difference_ci", "pairs"]
    return pd.DataFrame(rows, columns=None if rows else none)


def format_table(summary: pd.DataFrame) -> pd.DataFrame:
    """A summary for readers: percent with 95 % intervals, '–' where there is none."""
    baselines = summary["baseline"].unique()
    to = f"to {baselines[0]}" if len(baselines) == 1 else "to the baseline"
    return pd.DataFrame(
        {
            "variant": row.variant,
            "seeds": f"{row.n}" + (f" ({row.dirty} uncommitted)" if row.dirty else ""),
            "top-1, last epoch (%)": plus_minus(row.top1, row.top1_ci),
            "top-1, best on validation (%)": plus_minus(row.top1_best, row.top1_best_ci),
            "agrees with teacher (%)": number(row.agreement),
            f"difference {to} (points)": plus_minus(row.difference, row.difference_ci, "+"),
            "pairs": f"{row.pairs}" if row.pairs else "–",
        }
        for row in summary.itertuples()
    )


def format_run(record: Record) -> pd.DataFrame:
    """What one run gave, for readers: one column, percent as in tables, '–' where there is none."""
    test, timing = record.test, record.timing
    rows = {
        "test top-1, last epoch (%)": number(test.last.top1),
        "test top-1, best epoch on validation (%)": number(test.best.top1),
        "test top-5, last epoch (%)": number(test.last.top5),
        "validation top-1, last epoch (%)": number(record.last.val.top1),
        "agrees with teacher (%)": "–" if test.agreement is None else number(test.agreement),
        "parameters": f"{record.parameters:,}",
        "epochs": f"{len(record.epochs)}",
        "time (s)": f"{timing.seconds:,.0f}",
        "training images per second": f"{timing.images_per_second:,.0f}",
        "peak memory (MB)": f"{timing.peak_memory_mb:,.0f}",
    }
    return pd.Series(rows, name=record.config.variant).to_frame()


def _markdown(frame: pd.DataFrame) -> str:
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def provenance_note(records: list[Record]) -> str:
    """One line on where numbers come from: experiment, records, commits, devices, versions."""
    if not records:
        return "no records"

    def distinct(values) -> str:
        return ", ".join(dict.fromkeys(values))

    count = f"{len(records)} record{'s' if len(records) > 1 else ''}"
    dirty = sum(record.dirty for record in records)
    note = f" ({dirty} of {count} from uncommitted code)" if dirty else ""
    return (
        f"{distinct(r.config.experiment for r in records)}: {count}, "
        f"commit {distinct(r.commit[:7] for r in records)}{note}, "
        f"{distinct(r.device for r in records)}, "
        + ", ".join(
            f"{name} {distinct(r.versions.get(name, '?') for r in records)}"
            for name in ("torch", "timm")
        )
    )


def compare(experiment: str, here: Path, there: Path) -> pd.DataFrame:
    """:func:`compare_runs` of two results folders.

    Raises:
        FmdError: no such experiment, a folder without records of it, or twice the same folder.
    """
    if here.resolve() == there.resolve():
        raise FmdError(
            f"{here} would be compared with itself: set FMD_RESULTS to the other folder, e.g. "
            "FMD_RESULTS=reproduction"
        )
    return compare_runs(*(tidy(_required(experiment, root)) for root in (here, there)))


def compare_runs(here: pd.DataFrame, there: pd.DataFrame) -> pd.DataFrame:
    """Runs from :func:`tidy` side by side, one row a variant that either has; trials if both do.

    Returns:
        Columns ``variant``, ``n_here``, ``n_there``, ``top1_here``, ``top1_there`` (means, percent)
        and ``verdict`` over the common seeds: 'same weights' if all ended in the same weights;
        'same top-1'; 'within the seeds' spread' if the mean difference is no larger than its 95 %
        interval, which another machine's rounding explains; 'one seed: no spread to judge by'; else
        'different', or 'missing'.
    """
    frames = here, there
    labels = list(dict.fromkeys(label for frame in frames for label in frame["variant"]))
    rows = []
    for label in labels:
        in_both = all((frame["variant"] == label).any() for frame in frames)
        if split_variant(label)[1] and not in_both:
            continue  # somebody's trial
        a, b = (frame[frame["variant"] == label].set_index("seed") for frame in frames)
        rows.append(
            {
                "variant": label,
                "n_here": len(a),
                "n_there": len(b),
                "top1_here": a["top1"].mean(),
                "top1_there": b["top1"].mean(),
                "verdict": _verdict(a, b),
            }
        )
    return pd.DataFrame(rows)


def _verdict(a: pd.DataFrame, b: pd.DataFrame) -> str:
    seeds = a.index.intersection(b.index)
    if seeds.empty:
        return "missing"
    a, b = a.loc[seeds], b.loc[seeds]
    if (a["fingerprint"] == b["fingerprint"]).all():
        return "same weights"
    difference = a["top1"] - b["top1"]
    if np.allclose(difference, 0, atol=1e-9):
        return "same top-1"
    if len(seeds) < 2:
        return "one seed: no spread to judge by"
    return (
        "within the seeds' spread"
        if abs(difference.mean()) <= interval(difference)
        else "different"
    )


def _required(experiment: str, root: Path) -> list[Record]:
    records, _ = load_records(experiment, root)
    if not records:
        raise FmdError(
            f"no records of '{experiment}' in {root / 'runs' / experiment}: train them all with "
            f"`snakemake --cores 2 --config experiment={experiment}`"
        )
    return records


def write_tables(experiment: str, runs: pd.DataFrame, summary: pd.DataFrame) -> list[Path]:
    """Write ``results/tables/<experiment>.csv`` (the summary), ``…-runs.csv`` (one row a run) and,
    if the experiment trains its own, ``…-teacher.csv``, the summary last. Returns what was written.
    """
    teacher = runs["variant"].map(is_teacher)
    frames = {"-runs": runs[~teacher], "-teacher": runs[teacher], "": summary}
    written = []
    for suffix, frame in frames.items():
        if len(frame):
            path = results_dir() / "tables" / f"{experiment}{suffix}.csv"
            write_atomically(path, frame.to_csv(index=False, float_format="%.6g"))
            written.append(path)
    return written


def write_figures(experiment: str, records: list[Record], summary: pd.DataFrame) -> list[Path]:
    """Write the figures that the records (and the stored weights of one seed) allow, under
    ``results/figures/<experiment>/``; trials and ablations are in the forest plot alone. Returns
    the SVG files."""
    figures = {"forest": plots.forest(summary)} if summary["pairs"].any() else {}
    records = without_overrides(records)
    if records:
        figures["learning_curves"] = plots.learning_curves(records)
    if len(main := summarize(tidy(records))):
        figures["speed"] = plots.speed(main)
    if any(record.relations for record in records):
        figures["layer_similarity"] = plots.layer_similarity(records)
    pictured = [record.config for record in with_maps(records)]
    if pictured and pictured[0].data in FREE_PICTURES:
        from fmd.data import load_data  # loads torch

        try:
            data = load_data(pictured[0].data)
            students = {config.variant: config for config in pictured}
            figures["relation_maps"] = plots.trained_relation_maps(students, data)
        except FmdError as error:  # a reader has the records, but not always images and weights
            print(f"warning: no relation maps: {error}", file=sys.stderr)
    folder = results_dir() / "figures" / experiment
    return [plots.save(figure, folder / name) for name, figure in figures.items()]


def without_overrides(records: list[Record]) -> list[Record]:
    """Those that are neither trials nor ablations."""
    return [record for record in records if not split_variant(record.config.variant)[1]]


def with_weights(records: list[Record]) -> list[Record]:
    """Those whose weights are shown: of seed 0, without overrides, as far as they are there."""
    return [
        record
        for record in without_overrides(records)
        if record.config.seed == 0 and record.config.path("weights", ".safetensors").exists()
    ]


def with_maps(records: list[Record]) -> list[Record]:
    """Those whose relation maps are drawn: with weights, layers to compare and a teacher's run."""
    drawn = (BASELINE, "decoupled", "full")
    return [
        record
        for record in with_weights(records)
        if record.config.variant in drawn
        and record.config.student_layers
        and own_teacher(record.config) is not None
    ]


def write_cards(records: list[Record]) -> list[Path]:
    """Write ``README.md``, a model card, beside the weights of each of :func:`with_weights`.
    Returns what was written."""
    written = []
    for record in with_weights(records):
        config = record.config
        weights = config.path("weights", ".safetensors")
        if config.photos is not None:
            modules = ""
            images = "preparation = student.preparation  # for timm.data.create_transform"
        else:
            modules = "from fmd.data import load_data\n"
            images = (
                f'data = load_data("{config.data}")\n'
                "answers = student.model(data.normalize(data.test.images)).argmax(1)\n"
                "top1 = 100 * (answers == data.test.labels).float().mean()"
            )
        load = (
            "from fmd.config import load_experiment\n"
            f"{modules}from fmd.deploy import load_student\n\n"
            f'run = load_experiment("{config.experiment}").run("{config.variant}")\n'
            f"student = load_student(run)\n{images}"
        )
        files = f"`{weights.name}`, {weights.stat().st_size / 1e6:.1f} MB"
        if is_teacher(config.variant):
            files += (
                f". A student learns from it: `python -m fmd.train {config.experiment} decoupled`"
            )
        path = weights.with_name("README.md")
        write_atomically(path, model_card(record, load, f"{files}."))
        written.append(path)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmd.results",
        description="Roll an experiment's records up into tables, figures and model cards.",
    )
    parser.add_argument("experiment")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="compare with another results folder, write nothing",
    )
    args = parser.parse_args()
    if args.against is not None:
        comparison = compare(args.experiment, results_dir(), args.against)
        print(_markdown(_readable(comparison, os.path.relpath(results_dir()), args.against)))
        return
    records = _required(args.experiment, results_dir())
    runs = tidy(records)
    summary = summarize(runs)
    written = write_figures(args.experiment, records, summary) + write_cards(records)
    # By the last one Snakemake sees that all is done.
    written += write_tables(args.experiment, runs, summary)
    if len(summary):
        print(_markdown(format_table(summary)))
    print(provenance_note(records))
    for path in written:
        print(path)


def _readable(comparison: pd.DataFrame, here: str, there: Path) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "variant": row.variant,
            f"{here}: top-1 (%)": f"{number(row.top1_here)} (n = {row.n_here})",
            f"{there}: top-1 (%)": f"{number(row.top1_there)} (n = {row.n_there})",
            "verdict": row.verdict,
        }
        for row in comparison.itertuples()
    )


if __name__ == "__main__":
    run_main(main)
