"""The graph of runs: what it plans, what it never repeats, and that it reproduces a stored run."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import kernels
import pytest
from background import start, wait_for

from fmd.config import ROOT, load_experiment
from fmd.records import read_record

pytestmark = pytest.mark.slow
DIGITS = load_experiment("digits")


def call(results, *arguments, **environment) -> dict:
    """How Snakemake is started."""
    # On a cluster --cores would limit the cores of a job.
    cores = () if "--executor" in arguments else ("--cores", "1")
    return {
        "args": [sys.executable, "-m", "snakemake", *cores, "--nolock", *arguments],
        "cwd": ROOT,
        "env": os.environ | {"FMD_RESULTS": str(results)} | environment,
    }


def snakemake(results, *arguments, **environment):
    options = call(results, *arguments, **environment)
    return kernels.run(options.pop("args"), **options)


def planned(done: subprocess.CompletedProcess) -> dict[str, int]:
    assert done.returncode == 0, done.stderr
    jobs = re.findall(r"^(teacher|student|table)\s+(\d+)$", done.stdout + done.stderr, re.MULTILINE)
    return {rule: int(count) for rule, count in jobs}


@pytest.fixture
def stored(tmp_path):
    """A copy of the stored results of digits."""
    shutil.copytree(ROOT / "results" / "tables", tmp_path / "tables")
    for kind in ("runs", "weights"):
        source = ROOT / "results" / kind / "digits"
        if not source.is_dir():
            pytest.skip(f"no stored results/{kind}/digits: make results")
        shutil.copytree(source, tmp_path / kind / "digits")
    return tmp_path


def test_from_nothing_all_runs_are_planned_once(tmp_path):
    runs = len(DIGITS.variants) * len(DIGITS.seeds)
    assert planned(snakemake(tmp_path, "-n")) == {"teacher": 1, "student": runs, "table": 1}


def test_runs_with_a_record_are_not_repeated(stored):
    (stored / "tables" / "digits.csv").touch()
    assert planned(snakemake(stored, "-n")) == {}
    record = DIGITS.run("none", 1).path("runs", ".json").relative_to(ROOT / "results")
    (stored / record).unlink()
    assert planned(snakemake(stored, "-n")) == {"student": 1, "table": 1}


def test_half_a_record_is_named_and_nothing_is_planned(stored):
    path = stored / "runs/digits/none/seed-0.json"
    path.write_bytes(path.read_bytes()[:1000])
    done = snakemake(stored, "-n")
    assert done.returncode != 0
    assert re.search(rf"error: {re.escape(str(path))} is not a whole record", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("experiment=digit", "no experiment 'digit' (did you mean 'digits'?"),
        ("max_minute=5", "--config has no setting 'max_minute' (did you mean 'max_minutes'?"),
        ("cores=many", "--config cores=many is no whole number"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, setting, message):
    done = snakemake(tmp_path, "-n", "--config", setting)
    assert done.returncode != 0
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    done = snakemake(tmp_path / "file" / "results", "-n")
    assert done.returncode != 0
    assert f"error: cannot write {tmp_path}/file/results: Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_fails_says_why(tmp_path):
    options = ("--retries", "0", "--config", "experiment=tiny-imagenet")
    done = snakemake(tmp_path, *options, FMD_DATA="")
    assert done.returncode != 0
    assert "FmdError: set FMD_DATA to the folder that holds" in done.stderr


def test_cores_and_time_limit_reach_every_run(tmp_path):
    options = ["-n", "--printshellcmds", "--cores", "16", "--config", "experiment=imagenet"]
    experiment = load_experiment("imagenet")
    runs = len(experiment.variants) * len(experiment.seeds)
    plain = snakemake(tmp_path, *options)
    assert planned(plain)["student"] == runs
    assert "threads:" not in plain.stdout + plain.stderr and "max_minutes" not in plain.stdout
    done = snakemake(tmp_path, *options, "cores=16", "max_minutes=600")
    told = done.stdout + done.stderr
    assert told.count("threads: 16") == runs
    commands = re.findall(r"OMP_NUM_THREADS=1 .* -m papermill .* -p max_minutes 600 >", told)
    assert len(commands) == runs


@pytest.fixture
def tiny_record(tmp_path, monkeypatch):
    """The place of a run that takes seconds, for ``--config experiment=tiny``."""
    # Every Python of the graph, the notebooks' kernels included, reads tests/experiments.
    (tmp_path / "sitecustomize.py").write_text(
        f"import fmd.config, pathlib\nfmd.config.ROOT = pathlib.Path({str(ROOT / 'tests')!r})\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "results/runs/tiny/none/seed-0.json"


def test_a_run_that_stops_for_time_is_retried_and_goes_on(tmp_path, tiny_record):
    # Without any time left, each start makes one of the three epochs. That takes more retries than
    # the profile's one: the command line wins. (Two; more if a kernel's port is taken.)
    done = snakemake(
        tmp_path / "results",
        *("--config", "experiment=tiny", "max_minutes=0"),
        *("--retries", "4", "--latency-wait", "0", str(tiny_record)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("missing") >= 2
    assert read_record(tiny_record).timing.resumed == 2


def started(results, *arguments) -> subprocess.Popen:
    """Snakemake in the background."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return start(**call(results, *arguments), **silent)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGHUP])
def test_a_run_that_ends_early_after_its_record_is_done(tmp_path, tiny_record, kind):
    options = (str(tiny_record), "--config", "experiment=tiny")
    graph = started(tmp_path / "results", *options)
    wait_for(tiny_record, graph, seconds=60)  # the notebook goes on to draw its figures
    os.killpg(graph.pid, kind)
    graph.wait(60)
    assert planned(snakemake(tmp_path / "results", "-n", *options)) == {}


def test_a_terminal_that_closes_ends_all_in_order(tmp_path, tiny_record):
    graph = started(tmp_path / "results", str(tiny_record), "--config", "experiment=tiny")
    wait_for(tmp_path / "results/notebooks/tiny/none-0.log", graph, seconds=60)
    for _ in range(50):  # a terminal may say so more than once
        os.killpg(graph.pid, signal.SIGHUP)
        time.sleep(0.01)
    # A signal's number would be negative, and Snakemake's lock left behind.
    assert graph.wait(60) == 1
    assert not tiny_record.exists()


SBATCH = """#!/bin/sh
printf '%s\\n' "$@" > {log}
exit 1
"""


@pytest.mark.parametrize("page", ["README.md", "book/reproduce.md", "book/imagenet.md"])
def test_slurm_is_asked_for_what_the_page_says(tmp_path, page):
    pytest.importorskip(
        "snakemake_executor_plugin_slurm", reason="pip install snakemake-executor-plugin-slurm"
    )
    text = (ROOT / page).read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^snakemake (--executor slurm .*)$", text, re.MULTILINE)
    words = shlex.split(command)
    log = tmp_path / "sbatch.txt"
    for tool, script in {"sbatch": SBATCH.format(log=log), "sacct": "", "sacctmgr": ""}.items():
        (tmp_path / tool).write_text(script or "#!/bin/sh\n")
        (tmp_path / tool).chmod(0o755)
    once = ["--jobs", "1", "--retries", "0", "--slurm-init-seconds-before-status-checks", "1"]
    done = snakemake(
        tmp_path / "results",
        *(*words, *once, "--slurm-logdir", str(tmp_path)),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert log.exists(), done.stderr[-3000:]
    asked = log.read_text().splitlines()
    settings = dict(word.split("=") for word in words if "=" in word)
    assert "--requeue" in asked
    assert f"--gres={settings['gres']}" in asked
    assert f"--cpus-per-task={settings.get('cores', 1)}" in asked
    for option, name in {"-p": "slurm_partition", "-t": "runtime", "--mem": "mem_mb"}.items():
        assert asked[asked.index(option) + 1] == settings[name]


@pytest.mark.timeout(300)
def test_a_missing_run_is_made_again_with_the_stored_numbers(stored):
    # Of the variants whose seeds lie close together: those of none are 25 points apart.
    path = stored / "runs/digits/full/seed-0.json"
    before = read_record(path)
    path.unlink()
    done = snakemake(stored, "--quiet", "rules")
    assert done.returncode == 0, done.stderr[-3000:]
    after = read_record(path)
    assert (stored / "tables/digits.csv").is_file()
    # Another processor may round differently; the first epoch is still the same to that.
    assert after.epochs[0].train == pytest.approx(before.epochs[0].train, rel=1e-3)
    assert after.data == before.data
    assert abs(after.test.last.top1 - before.test.last.top1) < 5
