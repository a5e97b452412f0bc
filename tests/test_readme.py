"""Every command of the README is run, or, where it needs the network, checked piece by piece."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import kernels
import pytest
import yaml

from fmd.config import ROOT, load_experiment

BIN = Path(sys.executable).parent


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        joined = block.replace("\\\n", " ")
        lines += [
            re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines() if line.strip()
        ]
    return lines


# How each command is tested; one that is not listed fails the test below.
CHECKED_ELSEWHERE = {
    "python3 -m venv .venv && . .venv/bin/activate": "the Makefile does so before any test runs",
    "pip install -e '.[all]'": "the Makefile does so before any test runs",
    "export FMD_RESULTS=$PWD/reproduction": "set for the commands below",
    "jupyter-book build . --path-output build/book -W -n --keep-going --all": "tests/book",
    "pytest -n 2": "this is it",
    "pip install snakemake-executor-plugin-slurm": "needs the network",
    "export OMP_NUM_THREADS=1": "set for all commands here",
    "export FMD_DATA=~/data": "set for the commands below",
    "python -m fmd.train imagenet decoupled --dry-run": "test_photo_runs.py, with random weights",
    "torchrun --nproc-per-node 8 -m fmd.train imagenet decoupled --seed 0": "test_photo_runs.py",
}
RUN_DRY = {
    "make reproduce": "make -n reproduce",
    "make test": "make -n test",
} | {
    f"snakemake {options}": f"snakemake -n {options}"
    for options in ("--cores 2 --config experiment=digits", "--cores 2")
}


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_readme_command(command, tmp_path):
    if command in CHECKED_ELSEWHERE or command.startswith("cp -R results/."):
        return
    if command.startswith("snakemake --executor slurm"):
        # All but the plugin's own is parsed; test_snakefile.py runs it where it is installed.
        command = command.replace("--executor slurm --slurm-requeue", "-n --cores 16")
    command = RUN_DRY.get(command, command)
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    if command.startswith(("python -m fmd", "papermill")) and "--help" not in command:
        # Stored records answer at once; what is written beside them goes to a copy.
        results = tmp_path / "results"
        subprocess.run(["cp", "-R", str(ROOT / "results"), str(results)], check=True)
        environment["FMD_RESULTS"] = str(results)
    command = command.replace("build/", f"{tmp_path}/")
    done = kernels.run(command, shell=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]


def test_a_reproduction_without_make_starts_from_what_make_starts_from(tmp_path):
    (copy,) = (command for command in commands() if command.startswith("cp -R results/."))
    (tmp_path / "results").symlink_to(ROOT / "results")
    subprocess.run(["bash", "-ec", copy], cwd=tmp_path, check=True)
    left = {path.relative_to(tmp_path / "reproduction") for path in tmp_path.rglob("*digits*")}
    # What others made anew stays: nothing takes it for a run of this reproduction.
    assert {path.name for path in left if path.parts[0] != "reproductions"} == {
        "digits-long",
        "digits-long.csv",
        "digits-long-runs.csv",
    }


def test_readme_names_both_commands_first():
    assert commands()[:2] == ["make reproduce", "make test"]


def test_python_example_of_the_readme_runs():
    import torch

    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    # The same code with untrained weights and two small images.
    source = source.replace("pretrained=True", "img_size=32, patch_size=16")
    source = source.replace('"deit_tiny_patch16_224"', '"deit_tiny_patch16_224", img_size=32')
    names = {"images": torch.rand(2, 3, 32, 32), "labels": torch.tensor([1, 2])}
    exec(source, names)
    assert torch.isfinite(names["losses"]["loss"])
    assert {"loss", "base", "logit", "intra", "inter", "random"} <= names["losses"].keys()


def test_conda_environment_installs_the_package_with_all_extras():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(item for item in environment["dependencies"] if isinstance(item, dict))["pip"]
    assert pip == ["-e .[all]"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "all" in project["optional-dependencies"]


def test_ci_runs_the_readme_command():
    assert shlex.split((ROOT / ".ci/run").read_text().splitlines()[-1]) == ["make", "test"]


def test_readme_variants_exist():
    text = (ROOT / "README.md").read_text()
    experiment = load_experiment("digits")
    assert set(re.findall(r"variant (\S+)", " ".join(commands()))) <= set(experiment.variants)
    assert "experiments/" in text
