"""What make itself adds to the commands that it runs."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from background import start, wait_for

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_an_interrupted_reproduction_says_that_nothing_is_lost(tmp_path):
    for name in ("Makefile", "pyproject.toml", "experiments"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "results").mkdir()
    snakemake = tmp_path / ".venv" / "bin" / "snakemake"
    snakemake.parent.mkdir(parents=True)
    snakemake.write_text("#!/bin/sh\necho $* > starting\nmv starting started\nexec sleep 30\n")
    snakemake.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    run = start(
        ["make", "reproduce"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(tmp_path / "started", run, seconds=20)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said, _ = run.communicate(timeout=20)
    assert "nothing is lost, the same call goes on" in said and "failed" not in said
    assert run.returncode != 0
    # The number of cores is the machine's, not OpenMP's.
    cores = len(os.sched_getaffinity(0))
    assert f"on {cores} cores" in said
    assert f"--cores {cores}" in (tmp_path / "started").read_text()

    snakemake.write_text("#!/bin/sh\nexit 1\n")
    run = subprocess.run(["make", "reproduce"], cwd=tmp_path, capture_output=True, text=True)
    assert "== failed, see above" in run.stdout and "nothing is lost" not in run.stdout
