"""The graph of runs: experiment -> teacher -> variants x seeds -> table and figures.

    snakemake -n                                   what would run
    snakemake --cores 2                            run it, one core a run
    snakemake --cores 2 --config experiment=NAME   another experiment
    snakemake --executor slurm --jobs 50 ...       the same on a cluster

Further settings of --config: cores=16 reserves that many for each run, to decode photographs;
max_minutes=600 ends a run that long after its start, with a checkpoint and without its record, which
Snakemake counts as failed: --retries starts it again, and it goes on.

A run is done when its record exists; editing code or notebooks does not repeat it (GPU hours).
"""

import re
import shlex
import signal
import sys
import threading
import time

from fmd.config import load_experiment, own_teacher, results_dir
from fmd.errors import FmdError, nearest
from fmd.records import finished

try:
    for name in config:
        if name not in (known := ("experiment", "cores", "max_minutes")):
            raise FmdError(f"--config has no setting '{name}'{nearest(name, known)}")
    CORES = config.get("cores", 1)
    if not isinstance(CORES, int):
        raise FmdError(f"--config cores={CORES} is no whole number")
    EXPERIMENT = load_experiment(config.get("experiment", "digits"))
    SEEDS = list(EXPERIMENT.seeds)
    RUNS = [EXPERIMENT.run(v, s) for v in EXPERIMENT.variants for s in SEEDS]
    TEACHERS = {(run.variant, run.seed): own_teacher(run) for run in RUNS}
    DONE = [run for run in RUNS if finished(run)]  # refuses half records and other settings
except FmdError as error:
    sys.exit(f"error: {error}")

NAME = EXPERIMENT.name
RESULTS = results_dir()
try:
    RESULTS.mkdir(parents=True, exist_ok=True)
except OSError as error:
    sys.exit(f"error: cannot write {RESULTS}: {error.strerror}. Set FMD_RESULTS to another folder")
PYTHON = shlex.quote(sys.executable)
# One thread computes, so the numbers are the same however many cores a run has.
ENVIRONMENT = f"OMP_NUM_THREADS=1 FMD_RESULTS={shlex.quote(str(RESULTS))}"
PAPERMILL = f"{ENVIRONMENT} {PYTHON} -m papermill --no-progress-bar --log-level WARNING"
LIMIT = f" -p max_minutes {config['max_minutes']}" if "max_minutes" in config else ""
# Papermill's traceback stays in the log; its last line says what was wrong.
TO_LOG = " > {log:q} 2>&1 || (grep -v '^$' {log:q} | tail -n 1 >&2; exit 1)"


def teacher_record(wildcards):
    teacher = TEACHERS[wildcards.variant, int(wildcards.seed)]
    return [] if teacher is None else ancient(str(teacher.path("runs", ".json")))


def report_progress(every=15):
    """Say how many runs are done and what remains, from the records alone."""
    todo = [run.path("runs", ".json") for run in RUNS if run not in DONE]
    started = time.monotonic()
    while True:
        time.sleep(every)
        done = sum(path.exists() for path in todo)
        elapsed = time.monotonic() - started
        left = f"about {elapsed / done * (len(todo) - done) / 60:.1f} min left" if done else "…"
        print(f"== {NAME}: {done} of {len(todo)} runs done in {elapsed / 60:.1f} min, {left}", flush=True)
        if done == len(todo):
            return


def hang_up(*_):
    """End in order when the terminal closes: Snakemake would leave its lock behind."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal may send it twice
    signal.raise_signal(signal.SIGTERM)


onstart:
    # Not under nohup; and jobs of a cluster do not end with the terminal.
    if workflow.local_exec and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, hang_up)
    if len(DONE) < len(RUNS):
        threading.Thread(target=report_progress, daemon=True).start()


localrules:
    all,
    table,  # takes seconds: no job of a cluster


rule all:
    input:
        f"{RESULTS}/tables/{NAME}.csv",
        [str(run.path("runs", ".json")) for run in RUNS],  # the table alone may be older


rule teacher:
    output:
        f"{RESULTS}/runs/{{experiment}}/teacher/seed-{{seed}}.json",
    log:
        f"{RESULTS}/notebooks/{{experiment}}/teacher-{{seed}}.log",
    params:
        notebook=f"{RESULTS}/notebooks/{{experiment}}/teacher-{{seed}}.ipynb",
    threads: CORES
    priority: 10
    shell:
        PAPERMILL + " notebooks/train_teacher.ipynb {params.notebook:q}"
        " -p experiment {wildcards.experiment} -p seed {wildcards.seed}" + LIMIT + TO_LOG


rule student:
    input:
        teacher_record,
    output:
        f"{RESULTS}/runs/{NAME}/{{variant}}/seed-{{seed}}.json",
    log:
        f"{RESULTS}/notebooks/{NAME}/{{variant}}-{{seed}}.log",
    params:
        notebook=f"{RESULTS}/notebooks/{NAME}/{{variant}}-{{seed}}.ipynb",
    wildcard_constraints:
        variant="|".join(map(re.escape, EXPERIMENT.variants)),
        seed=r"\d+",
    threads: CORES
    shell:
        PAPERMILL + " notebooks/distill.ipynb {params.notebook:q}"
        f" -p experiment {NAME} -p variant {{wildcards.variant}} -p seed {{wildcards.seed}}"
        + LIMIT + TO_LOG


rule table:
    input:
        [ancient(str(run.path("runs", ".json"))) for run in RUNS],
    output:
        f"{RESULTS}/tables/{NAME}.csv",
    shell:
        f"{ENVIRONMENT} {PYTHON} -m fmd.results {NAME}"
