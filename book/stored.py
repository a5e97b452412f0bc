"""Stored runs as parts of a page: each shows what the records allow, with the commit behind it."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pandas as pd
from pages import figure, say, table

from fmd import plots
from fmd.config import RunConfig, is_teacher, load_experiment, results_dir, split_variant
from fmd.errors import FmdError
from fmd.records import PARTS, Record
from fmd.results import (
    BASELINE,
    compare_runs,
    format_table,
    load_records,
    provenance_note,
    summarize,
    tidy,
    with_maps,
    with_weights,
    without_overrides,
)

MANIFOLD = ("intra", "inter", "random", "decoupled", "full")


def records(experiment: str, root: Path | None = None) -> list[Record]:
    """The stored records of an experiment; those that had to be left out are named on the page."""
    with contextlib.redirect_stderr(io.StringIO()):  # the problems are shown below instead
        found, problems = load_records(experiment, root)
    if problems:
        lines = "\n".join(f"- {line}" for line in problems).replace(f"{results_dir()}/", "")
        many = ":class: dropdown\n" if len(problems) > 3 else ""
        say(
            f":::{{admonition}} Records of {experiment}: {len(problems)} "
            f"problem{'s' if len(problems) > 1 else ''}\n{many}\n{lines}\n:::"
        )
    return found


class Results:
    """An experiment's records, and the parts of a page about them.

    The book is built at any stage of an experiment, so a part stays away where its records are
    missing. A setting after a variant's name makes it an ablation: it is in the tables, and no part
    of the main answer nor of the curves.
    """

    def __init__(self, experiment: str):
        self.experiment = experiment
        self.records = records(experiment)
        self.runs = tidy(self.records)
        self.summary = summarize(self.runs)
        self.main = self.summary.loc[[not split_variant(v)[1] for v in self.summary["variant"]]]
        self.main_records = without_overrides(self.records)
        self.note = provenance_note(self.records)

    def answer(self, start: str = "After") -> None:
        """Does each manifold variant help? Goes on from ``start`` with the number of epochs."""
        if self.main.empty:
            say(
                f":::{{warning}}\nThere are no runs of `{self.experiment}` yet. Make them with "
                f"`snakemake --cores 2 --config experiment={self.experiment}`, "
                "then build the book again.\n:::"
            )
            return
        epochs = sorted(
            {r.config.epochs for r in self.main_records if not is_teacher(r.config.variant)}
        )
        say(f"{start} {' or '.join(map(str, epochs))} epochs, {verdicts(self.main)}")

    def baseline(self) -> None:
        """How far the seeds of soft distillation lie apart, which the differences inherit."""
        top1 = self.runs[self.runs["variant"] == BASELINE]["top1"]
        if len(top1) > 1:
            say(f"The seeds of `{BASELINE}` end between {min(top1):.0f} and {max(top1):.0f} %.")

    def second_look(self) -> None:
        """What seeds that were added in sight of the others found, and what the others had."""
        added = load_experiment(self.experiment).added_seeds
        late = self.runs["seed"].isin(added)
        if not late.any() or late.all():
            return
        parts = [summarize(self.runs[rows]) for rows in (~late, late)]
        first, then = (f"{len(_better(part))} of {len(_compared(part))}" for part in parts)
        say(
            f"Seeds {', '.join(map(str, added))} were added when the others had been seen. The "
            f"others alone had found {first} better, and these alone find {then}; where one looks "
            "twice, intervals of 95 % hold the truth less often than that."
        )

    def accuracy(self) -> None:
        """The table of all variants."""
        if len(self.summary):
            table(format_table(self.summary), self.note)

    def forest(self) -> None:
        """The paired differences, as a figure."""
        if self.summary["pairs"].any():
            figure(plots.forest(self.summary), self.note)

    def decoupling(self) -> None:
        """The full loss against the three terms that the paper decouples it into."""
        direct = summarize(self.runs, baseline="decoupled")
        for row in direct.itertuples():
            if row.variant == "full" and row.pairs > 1:
                sure = abs(row.difference) > row.difference_ci
                say(
                    "The paper decouples the full loss into three terms. Is anything lost or won "
                    f"by that? `full` against `decoupled`: "
                    f"{points(row.difference, row.difference_ci)} over {row.pairs} seeds, which "
                    f"{'excludes' if sure else 'does not exclude'} zero."
                )

    def teacher(self) -> None:
        """How good the teacher is that the students learn from."""
        for record in self.main_records:
            if is_teacher(record.config.variant):
                say(
                    f"The teacher ends at {record.last.val.top1:.1f} % of the validation and "
                    f"{record.test.last.top1:.1f} % of the test images."
                )

    def curves(self) -> None:
        """Validation accuracy by epoch."""
        if self.main_records:
            figure(plots.learning_curves(self.main_records), provenance_note(self.main_records))

    def layers(self) -> None:
        """How alike the relations of student and teacher are, layer by layer."""
        measured = [record for record in self.main_records if record.relations]
        if measured:
            figure(plots.layer_similarity(measured), provenance_note(measured))

    def speed(self) -> None:
        """Accuracy against images per second, and where the time of the runs went."""
        if len(self.main):
            say("Accuracy on the test images against the images that training takes in a second:")
            figure(plots.speed(self.main), provenance_note(self.main_records))
        timed = [record for record in self.main_records if record.timing.parts]
        if not timed:
            return
        say(
            "Where the time of a run goes, in percent, means over seeds. Preparation reads the "
            "data, builds the networks and makes the first step, which on a GPU compiles them; the "
            "forward passes are those of teacher and student, with the losses."
        )
        rows = pd.DataFrame(
            {
                "variant": r.config.variant,
                "minutes": r.timing.seconds / 60,
                "images/s": r.timing.images_per_second,
                **{part: 100 * r.timing.parts[part] / r.timing.seconds for part in PARTS},
                "peak": 100 * (r.timing.share_of_peak or float("nan")),  # not of a CPU
            }
            for r in timed
        )
        means = rows.groupby("variant", sort=False).mean().reset_index()
        shown = {"variant": means["variant"], "minutes": means["minutes"].map("{:.1f}".format)}
        shown["images/s"] = means["images/s"].map("{:,.0f}".format)
        shown |= {part: means[part].map("{:.0f}".format) for part in PARTS}
        if means["peak"].notna().any():
            say(
                "The share of the peak compares the operations that the passes of both networks "
                "take, as counted, with those that the GPU could make in the time of the steps, at "
                "the rate that its vendor states for matrix products."
            )
            shown["of the peak, %"] = means["peak"].map("{:.1f}".format).replace("nan", "–")
        table(pd.DataFrame(shown), provenance_note(timed))

    def weights(self) -> None:
        """Which networks are stored, and which of the students is best on validation images."""
        kept = with_weights(self.records)
        if not kept:
            say(f"*There are no stored weights of `{self.experiment}`.*")
            return
        best, best_kept = map(_best_student, (self.main_records, kept))
        if best is not None:
            said = f"The best student of `{self.experiment}` on validation images is {_named(best)}"
            if best is best_kept:
                said += ", whose weights are stored"
            elif best_kept is not None:
                said += f"; of those whose weights are stored, {_named(best_kept)}"
            say(f"{said}.")
        rows = [
            {
                "variant": record.config.variant,
                "parameters, millions": f"{record.parameters / 1e6:.2f}",
                "file, MB": f"{_weights_mb(record):.1f}",
                "validation top-1, %": f"{record.last.val.top1:.1f}",
                "test top-1, %": f"{record.test.last.top1:.1f}",
            }
            for record in kept
        ]
        table(pd.DataFrame(rows), provenance_note(kept))

    def relation_maps(self) -> None:
        """What teacher and students relate in one image, where their weights are stored."""
        pictured = with_maps(self.records)
        if not pictured:
            say(f"*`{self.experiment}` has no stored weights of runs that compare layers.*")
            return
        students = {record.config.variant: record.config for record in pictured}
        try:
            maps = plots.trained_relation_maps(students, _images(pictured[0].config))
        except FmdError as error:  # the teacher's weights are kept elsewhere
            say(f"*There are no relation maps: {error}*")
        else:
            figure(maps, provenance_note(pictured))


def _best_student(records: list[Record]) -> Record | None:
    """By validation accuracy after the last epoch, whose weights are the ones that are stored."""
    students = [record for record in records if not is_teacher(record.config.variant)]
    return max(students, key=lambda record: record.last.val.top1, default=None)


def _named(record: Record) -> str:
    return f"`{record.config.variant}` with seed {record.config.seed}"


def _weights_mb(record: Record) -> float:
    return record.config.path("weights", ".safetensors").stat().st_size / 1e6


def _images(config: RunConfig):
    """The test images of a run's data; for data that may not be passed on, a photograph instead."""
    import torch  # takes seconds to load, and only the relation maps need it
    from PIL import Image
    from safetensors import safe_open
    from sklearn.datasets import load_sample_image

    from fmd.data import TINY_MEAN, TINY_STD, ImageData, Split, load_data

    if config.data != "tiny-imagenet":
        return load_data(config.data)
    size = config.model_args["img_size"]
    photograph = Image.fromarray(load_sample_image("flower.jpg"))
    side = min(photograph.size)
    left, top = ((length - side) // 2 for length in photograph.size)
    square = photograph.crop((left, top, left + side, top + side)).resize((size, size))
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    split = Split(pixels, torch.zeros(1, dtype=torch.int64))
    with safe_open(config.path("weights", ".safetensors"), framework="pt") as weights:
        classes = weights.get_slice("head.weight").get_shape()[0]
    return ImageData("photograph", split, split, split, classes, TINY_MEAN, TINY_STD, lambda x: x)


def reproductions() -> list[Path]:
    """Folders of results that were made anew elsewhere."""
    return sorted((results_dir() / "reproductions").glob("*"))


def made_anew(experiment: str) -> None:
    """Each of :func:`reproductions` beside these results."""
    ours = without_overrides(records(experiment))
    for folder in reproductions():
        theirs = without_overrides(records(experiment, folder))
        runs = {"here": tidy(ours), "anew": tidy(theirs)}
        parts = {name: summarize(frame) for name, frame in runs.items()}
        if any(part.empty for part in parts.values()):
            continue
        better = {name: f"{len(_better(p))} of {len(_compared(p))}" for name, p in parts.items()}
        teachers = [{r.teacher.fingerprint for r in found if r.teacher} for found in (ours, theirs)]
        verdicts = compare_runs(runs["anew"], runs["here"]).set_index("variant")["verdict"]
        agree = verdicts[parts["anew"]["variant"]].value_counts()
        say(
            f"Made anew on another device, {theirs[0].device}"
            + (", the teacher as well" if teachers[0] != teachers[1] else "")
            + ". Mean accuracies, these against those: "
            + ", ".join(f"{verdict} for {count} variants" for verdict, count in agree.items())
            + ". Better than soft distillation alone, of the variants with manifold terms: "
            f"{better['here']} in the results that this book is built from, {better['anew']} anew."
        )
        shown = [
            format_table(part).set_index("variant").filter(regex="epoch|difference")
            for part in parts.values()
        ]
        both = shown[0].join(shown[1].add_suffix(", anew"), how="inner")
        note = f"{provenance_note(ours)}; anew: {provenance_note(theirs)}"
        table(both.reset_index(), note)


def points(difference: float, half_width: float) -> str:
    """'+1.2 ± 0.3 points', with a true minus sign."""
    return f"{plots.plus_minus(difference, half_width, '+')} points"


def _compared(summary: pd.DataFrame) -> pd.DataFrame:
    """The variants with manifold terms whose difference to soft distillation has an interval."""
    return summary[summary["variant"].isin(MANIFOLD) & summary["difference_ci"].notna()]


def _better(summary: pd.DataFrame) -> pd.DataFrame:
    rows = _compared(summary)
    return rows[rows.difference > rows.difference_ci]


def verdicts(summary: pd.DataFrame) -> str:
    """Does each manifold variant help beyond soft distillation? In words, from a summary.

    Args:
        summary: from :func:`fmd.results.summarize`, against ``soft-kd``.

    Returns:
        Markdown that goes on from 'After n epochs,'. A difference counts where its 95 % interval
        excludes zero.
    """
    rows = _compared(summary)
    if rows.empty:
        return "there are too few runs to say whether the manifold terms help."
    low, high = rows.difference - rows.difference_ci, rows.difference + rows.difference_ci
    groups = {
        "better than soft distillation alone": _better(summary),
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
    seeds = plots.span(sorted(set(rows["pairs"])))
    return (
        f"of the variants with manifold terms, {'; '.join(said)}. These are differences of test "
        f"top-1 to `soft-kd` at equal seeds, with 95 % intervals over {seeds} seeds, not corrected "
        "for the number of variants."
    )


def headline(summary: pd.DataFrame) -> str:
    """Does the paper's method, ``decoupled``, help beyond soft distillation? For a title.

    Args:
        summary: from :func:`fmd.results.summarize`, against ``soft-kd``.
    """
    if summary.empty:
        return "not run yet"
    rows = summary[(summary["variant"] == "decoupled") & (summary["pairs"] > 0)]
    if rows.empty:
        return "too few runs yet"
    row = rows.iloc[0]
    if row.pairs == 1:
        return f"{plots.number(row.difference, '+')} points in one pair of runs, no interval yet"
    measured = f"{points(row.difference, row.difference_ci)} over {row.pairs} seeds"
    if abs(row.difference) <= row.difference_ci:
        return f"not distinguishable from zero, {measured}"
    return f"{'yes' if row.difference > 0 else 'no, it harms'}, {measured}"
