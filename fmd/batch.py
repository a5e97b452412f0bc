"""Fill a number of minutes with an experiment's runs, the most important first.

    python -m fmd.batch tiny-imagenet --max-minutes 25
    python -m fmd.batch tiny-imagenet --dry-run

The order is the experiment's ``order``: stages in turn, within a stage seed by seed. Without one it
is the teachers, then all variants of the first seed, then of the next. Runs that have a record are
skipped; when time is up the current run is checkpointed, and the next call goes on exactly.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
import traceback
from statistics import median

from fmd.config import Experiment, RunConfig, Stage, load_experiment, own_teacher
from fmd.errors import FmdError, OutOfTime, run_main
from fmd.records import Record, finished


def plan(experiment: Experiment) -> list[RunConfig]:
    """All runs of an experiment in order of importance; raises :class:`FmdError`."""
    all_students = Stage(variants=tuple(experiment.variants), seeds=experiment.seeds)
    runs = []
    for stage in experiment.order or (all_students,):
        source = load_experiment(stage.experiment) if stage.experiment else experiment
        runs += [
            source.run(variant, seed, **stage.overrides)
            for seed in stage.seeds
            for variant in stage.variants
        ]
    if experiment.order:
        return runs
    teachers = {teacher.name: teacher for run in runs if (teacher := own_teacher(run))}
    return [*teachers.values(), *runs]


def run_batch(
    runs: list[RunConfig], max_minutes: float | None = None, device: str | None = None
) -> list[str]:
    """Train what has no record yet, in order, until time is up, which is said.

    Returns one line for each run that failed; the others go on, for a weight that makes one run
    diverge says nothing about the next.

    Raises :class:`FmdError` for a device that is not there, and what a teacher's run raises: the
    runs after it need one.
    """
    # Only here: the book lists what is done and missing without loading torch.
    import torch

    from fmd.processes import deadline, join
    from fmd.train import train

    join(device)  # with one that is not there, every run would fail
    end = deadline(max_minutes)
    failures, preparations = [], []
    for run in runs:
        try:
            if finished(run) is not None:
                continue
            left = None if end is None else (end - time.monotonic()) / 60
            # A run that would only be prepared (on a GPU: compiled) is left to the next call.
            if left is not None and left <= min(preparations, default=0) / 60:
                print("time is up between two runs; the same call goes on with the next")
                break
            # Each run is a new graph; the compiler gives up after a few unless told to forget.
            torch.compiler.reset()
            record = train(run, device=device, max_minutes=left)
        except OutOfTime as stop:  # the expected end of a call, not an error
            print(stop)
            break
        except Exception as error:  # a compiler's and a GPU's are of many types
            if run.variant == "teacher":
                raise
            said = " ".join(str(error).split())
            if not isinstance(error, FmdError):
                traceback.print_exc()  # nobody foresaw it
                said = textwrap.shorten(f"{type(error).__name__}: {said}", 200)
            failures.append(f"{run.name}: {said}")
            print(f"failed: {failures[-1]}", flush=True)
        else:
            preparation = record.timing.parts["preparation"] / (1 + record.timing.resumed)
            preparations.append(preparation)  # the first one of all decodes the images as well
            print(f"{run.name}: test top-1 {record.test.last.top1:.2f} %", flush=True)
    return failures


def report(runs: list[RunConfig]) -> str:
    """What is done, what remains, and how long that takes if it goes on as before."""
    lines, records, todo = [], [], []
    for run in runs:
        try:
            record = finished(run)
            state = "started" if run.path("checkpoints", ".pt").exists() else "to do"
        except FmdError as error:
            record, state = None, f"failed  {error}"
        if record is None:
            todo.append(run)
        else:
            records.append(record)
            state = f"done    test top-1 {record.test.last.top1:.2f} %"
        lines.append(f"{run.name:48} {state}")
    lines.append(f"{len(records)} of {len(runs)} runs done")
    seconds = [_estimate(run, records) for run in todo]
    if todo and None not in seconds:
        lines[-1] += f", about {max(sum(seconds) / 60, 1):.0f} min remain"
    return "\n".join(lines)


def _estimate(run: RunConfig, records: list[Record]) -> float | None:
    """Seconds of a run from the time a pass took in runs of the same model, else of any."""
    passes = [(r.config.model, r.timing.seconds / _passes(r.config)) for r in records]
    alike = [seconds for model, seconds in passes if model == run.model]
    known = alike or [seconds for _, seconds in passes]
    return median(known) * _passes(run) if known else None


def _passes(run: RunConfig) -> float:
    return run.epochs * run.data_fraction


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmd.batch",
        description="Train an experiment's runs, the most important first, for some minutes.",
    )
    parser.add_argument("experiment")
    parser.add_argument("--max-minutes", type=float, help="checkpoint and end after this long")
    parser.add_argument("--device")
    parser.add_argument("--dry-run", action="store_true", help="say what is done and what remains")
    args = parser.parse_args()
    runs = plan(load_experiment(args.experiment))
    failures = [] if args.dry_run else run_batch(runs, args.max_minutes, args.device)
    print(report(runs))
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    run_main(main)
