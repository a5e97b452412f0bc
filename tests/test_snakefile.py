"""The graph of runs: what it plans, what it never repeats, and that it reproduces a stored run."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from fmd.config import ROOT, load_experiment
from fmd.records import read_record

pytestmark = pytest.mark.slow
DIGITS = load_experiment("digits")


def snakemake(results, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "--nolock", *arguments],
        cwd=ROOT,
        env=os.environ | {"FMD_RESULTS": str(results)},
        capture_output=True,
        text=True,
    )


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


def test_unknown_experiment_is_one_line(tmp_path):
    done = snakemake(tmp_path, "-n", "--config", "experiment=digit")
    assert done.returncode != 0
    assert "error: no experiment 'digit' (did you mean 'digits'?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.timeout(300)
def test_a_missing_run_is_made_again_with_the_stored_numbers(stored):
    path = stored / "runs/digits/none/seed-0.json"
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
