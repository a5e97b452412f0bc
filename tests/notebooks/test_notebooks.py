"""The stored notebooks are clean, and each runs top to bottom by Papermill on a tiny experiment."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from types import SimpleNamespace

import kernels
import nbformat
import pytest
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from fmd.config import ROOT
from fmd.records import read_record
from fmd.results import format_run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TESTS = ROOT / "tests"
BIN = Path(sys.executable).parent

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code(path: Path) -> dict[str, ast.Module]:
    """The parsed code cells, by id; shell and magic lines as the calls IPython makes of them."""
    transform = TransformerManager().transform_cell
    cells = [cell for cell in read(path).cells if cell.cell_type == "code"]
    return {cell.id: ast.parse(transform(cell.source)) for cell in cells}


def parameters(path: Path) -> list[str]:
    return [line.target.id for line in code(path)["parameters"].body]


def repository() -> dict:
    return yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]


def test_the_notebooks_are_there():
    stems = [path.stem for path in NOTEBOOKS]
    assert stems == ["distill", "imagenet", "manifold_losses", "quickstart", "train_teacher"]


@each
def test_stored_without_outputs_widgets_or_random_ids(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)?", cell.id), "ids are words, the same in every save"
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@each
def test_opens_with_title_and_badge(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source)
    owner_and_name = repository()["url"].removeprefix("https://github.com/")
    target = (
        f"https://colab.research.google.com/github/{owner_and_name}"
        f"/blob/{repository()['branch']}/notebooks/{path.name}"
    )
    assert f"({target})" in first.source


@each
def test_clones_the_public_address_only_where_the_package_is_missing(path):
    install = read(path).cells[1]
    assert install.id == "install"
    assert re.findall(r"git clone .*(https\S+)", install.source) == [repository()["url"]]
    guarded = [line for line in install.source.splitlines() if re.match(r"\s*[!%]", line)]
    assert all(line.startswith("    ") for line in guarded) and len(guarded) == 2
    others = [cell.source for cell in read(path).cells if cell.id != "install"]
    assert not any(re.search(r"^\s*[!%]", source, re.M) for source in others)


@each
def test_imports_only_what_is_declared(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["notebooks"], "fmd"]
    declared = {re.match(r"[\w-]+", line).group().lower() for line in lines}
    distributions = packages_distributions()
    nodes = [node for tree in code(path).values() for node in ast.walk(tree)]
    modules = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    for top in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names:
        names = {name.lower() for name in distributions[top]}
        assert names & declared, f"{path.name} imports {top}, which pyproject.toml does not name"


@each
def test_every_parameter_is_used(path):
    trees = [tree for name, tree in code(path).items() if name != "parameters"]
    used = {n.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert set(parameters(path)) <= used


@pytest.fixture
def papermill(tmp_path, teacher_results):
    """Runs a notebook from a shell, in another folder, on the experiment and teacher ``tiny``."""
    shutil.copytree(teacher_results, tmp_path / "results")
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    # The kernel reads tests/experiments instead of experiments/.
    (startup / "tiny.py").write_text(
        f"import fmd.config, pathlib\nfmd.config.ROOT = pathlib.Path({str(TESTS)!r})\n"
    )
    environment = os.environ | {
        "FMD_RESULTS": str(tmp_path / "results"),
        "FMD_COMMIT": "0" * 40,
        "FMD_DIRTY": "",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
        notebook = ROOT / "notebooks" / f"{name}.ipynb"
        options = ["--no-progress-bar", "--log-level", "ERROR", "-p", "experiment", "tiny"]
        command = ["papermill", notebook, "out.ipynb", *options, *arguments]
        return kernels.run(command, cwd=tmp_path, env=environment)

    run.folder = tmp_path
    run.results = tmp_path / "results"
    return run


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outputs(run) -> dict[str, list]:
    """Outputs of the executed notebook, by cell id."""
    return {
        cell.get("id"): cell.get("outputs", []) for cell in read(run.folder / "out.ipynb").cells
    }


def said(run) -> str:
    """What the executed notebook has printed."""
    return "".join(
        o.text for cell in outputs(run).values() for o in cell if o.output_type == "stream"
    )


def assert_clean(run, done: subprocess.CompletedProcess):
    assert done.returncode == 0, done.stderr[-2000:]
    assert "WARNING" not in done.stderr.replace("[IPKernelApp] WARNING", "")
    for name, cell in outputs(run).items():
        for output in cell:
            assert output.output_type != "error", name
            assert output.get("name") != "stderr", f"{name} says {output.get('text')}"


def assert_shows(run, record):
    """The live curve, the table and the plots of a training notebook."""
    cells = outputs(run)
    assert any("svg+xml" in str(output) for output in cells["train"]), "no live curve"
    assert cells["table"][0].data["text/plain"] == repr(format_run(record))
    assert "svg+xml" in cells["curve"][0].data["text/html"]
    assert bool(cells.get("similarity")) == (record.relations is not None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "arguments"),
    [
        ("train_teacher", "teacher+epochs=1", []),
        ("distill", "none+epochs=1+lr=0.002", ["-p", "variant", "none", "-p", "lr", "0.002"]),
    ],
)
def test_training_notebook_runs_and_leaves_its_record(papermill, name, variant, arguments):
    assert_clean(papermill, papermill(name, "-p", "epochs", "1", *arguments))
    record = read_record(papermill.results / "runs" / "tiny" / variant / "seed-0.json")
    assert len(record.epochs) == 1
    assert_shows(papermill, record)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stored"), [("quickstart", True), ("quickstart", False), ("manifold_losses", False)]
)
def test_reading_notebook_runs_and_touches_no_stored_result(papermill, name, stored):
    if not stored:
        shutil.rmtree(papermill.results)
    before = files(papermill.results)
    done = papermill(name, "-p", "epochs", "8")
    assert_clean(papermill, done)
    assert files(papermill.results) == before
    if name == "quickstart":
        cells = outputs(papermill)
        assert bool(cells["teacher"][:-1]) == (not stored), "a stored teacher needs no curve"
        networks, top1, *_ = cells["table"][0].data["text/plain"].splitlines()
        assert networks.split() == ["teacher", "none", "soft-kd", "full"]
        told = re.findall(
            r": ([\d.]+) % of the test", str(cells["teacher"]) + str(cells["students"])
        )
        assert len(told) == 4
        assert re.fullmatch(r"test top-1, last epoch \(%\) +" + " +".join(told), top1)
        maps = cells["relations"][0].data["text/html"]
        assert "svg+xml" in maps
        assert re.search(r"untrained [\d.]+, none [\d.]+, soft-kd [\d.]+, full [\d.]+\.", maps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "epoch", "1"], "unknown parameter 'epoch' (did you mean 'epochs'?"),
        (["-p", "max_minutes", "soon"], "max_minutes = 'soon': input should be a valid number"),
        (["-p", "variant", "ful"], "no variant 'ful' (did you mean 'full'?"),
    ],
)
def test_bad_input_ends_in_one_clear_line_before_training(papermill, arguments, message):
    before = files(papermill.results)
    done = papermill("distill", *arguments)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("FmdError: ")
    assert message in done.stderr.strip().splitlines()[-1]
    (error,) = [o for cell in outputs(papermill).values() for o in cell if o.output_type == "error"]
    assert len(error.traceback) == 1
    assert files(papermill.results) == before


@pytest.mark.slow
def test_missing_teacher_is_named(papermill):
    shutil.rmtree(papermill.results)
    done = papermill("distill")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("FmdError: the teacher tiny/seed-0 is not trained yet")
    assert not files(papermill.results)


@pytest.mark.slow
def test_time_limit_pauses_and_the_next_call_goes_on(papermill):
    record = papermill.results / "runs" / "tiny" / "full+epochs=2" / "seed-0.json"
    arguments = ["-p", "variant", "full", "-p", "epochs", "2"]
    paused = papermill("distill", *arguments, "-p", "max_minutes", "0")
    assert paused.returncode == 0, paused.stderr[-2000:]
    assert "time is up" in said(papermill)
    assert not record.exists()
    assert not outputs(papermill)["table"], "cells after the pause are not run"
    assert_clean(papermill, papermill("distill", *arguments))
    assert read_record(record).timing.resumed == 1
    assert_shows(papermill, read_record(record))


@pytest.mark.slow
def test_launched_run_is_followed_and_found_again(tmp_path):
    environment = os.environ | {
        "FMD_RESULTS": str(tmp_path / "results"),
        "FMD_COMMIT": "0" * 40,
        "FMD_DIRTY": "",
        "OMP_NUM_THREADS": "1",
    }
    words = ("experiment", "digits", "variant", "none", "settings", "epochs=2 data_fraction=0.2")
    options = [part for pair in zip(words[::2], words[1::2]) for part in ("-p", *pair)]
    run = SimpleNamespace(folder=tmp_path)

    def papermill(*more):
        path = ROOT / "notebooks" / "imagenet.ipynb"
        command = [BIN / "papermill", path, "out.ipynb", "--no-progress-bar", *options, *more]
        command += ["--log-level", "ERROR", "-p", "every", "0.5"]
        return kernels.run(command, cwd=tmp_path, env=environment)

    assert_clean(run, papermill())
    assert "evaluation, checkpoint, resume and record work" in said(run)
    assert not files(tmp_path / "results")
    assert_clean(run, papermill("-p", "dry_run", "False"))
    (path,) = (tmp_path / "results" / "runs").rglob("seed-0.json")
    first = outputs(run)
    assert any("svg+xml" in str(output) for output in first["train"]), "no live curve"
    assert first["table"][0].data["text/plain"] == repr(format_run(read_record(path)))
    before = path.stat().st_mtime_ns
    assert_clean(run, papermill("-p", "dry_run", "False"))  # opened again
    assert path.stat().st_mtime_ns == before
    assert outputs(run)["table"][0].data == first["table"][0].data
    events = list((tmp_path / "results" / "logs").rglob("events.out.tfevents.*"))
    assert len(events) == 1

    failing = [word.replace("data_fraction=0.2", "lr=1e9 opt=sgd") for word in options]
    options[:] = failing
    done = papermill("-p", "dry_run", "False")
    assert done.returncode == 1
    assert "the run has ended without a record: error: not finite" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "imagenet", "train_teacher"])
def test_help_lists_every_parameter_with_type_and_purpose(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    done = subprocess.run(
        [BIN / "papermill", "--help-notebook", path], capture_output=True, text=True, check=True
    )
    for parameter in parameters(path):
        pattern = rf"^  {parameter}: (str|int|float|bool) \(default .*\)\s+\w+"
        assert re.search(pattern, done.stdout, re.M), parameter
    assert "Unable to parse" not in done.stdout + done.stderr
