"""Records: written whole or not at all, read only if whole and unedited."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest

from fmd.errors import FmdError
from fmd.records import finished, provenance, read_record, write_atomically, write_record


@pytest.fixture
def path(tiny) -> Path:
    """The record of a finished run."""
    return tiny.teacher_run().path("runs", ".json")


def test_round_trip(path):
    record = read_record(path)
    content = path.read_text()
    path.unlink()
    assert write_record(record) == path and path.read_text() == content


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99])
def test_record_cut_short(path, tiny, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    for call in (lambda: read_record(path), lambda: finished(tiny.teacher_run())):
        with pytest.raises(
            FmdError, match=r"not a whole record .*delete it and run again"
        ) as caught:
            call()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda r: r["config"].update(lr=0.123),
            "was edited, or made .*: its settings do not match its key",
        ),
        (lambda r: r["config"].update(lr=-1.0), "config.lr: Input should be greater than 0"),
        (lambda r: r.update(extra=1), "extra: Extra inputs are not permitted"),
        (lambda r: r.pop("commit"), "commit: Field required"),
        (lambda r: r["epochs"][0]["val"].update(loss=None), "epochs.0.val.loss: Input should be"),
        (lambda r: r.update(schema_version=2), "schema_version: Input should be 1"),
    ],
)
def test_edited_record(path, edit, message):
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(FmdError, match=message) as caught:
        read_record(path)
    assert "\n" not in str(caught.value)


def test_record_that_cannot_be_read(tmp_path):
    with pytest.raises(FmdError, match=r"no record at .*the run has not finished"):
        read_record(tmp_path / "seed-0.json")
    with pytest.raises(FmdError, match=r"cannot read .*Is a directory"):
        read_record(tmp_path)


def test_finished_tells_this_run_from_others(path, tiny):
    config = tiny.teacher_run()
    assert finished(config) == read_record(path)
    assert finished(tiny.run("none")) is None
    with pytest.raises(FmdError, match=r"other settings \(lr: 0.005 -> 1.0\): move it away"):
        finished(config.model_copy(update={"lr": 1.0}))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("where", ["tempfile.mkstemp", "os.fsync", "os.replace"])
def test_failed_write_leaves_what_was_there(tmp_path, monkeypatch, where, code):
    target = tmp_path / "seed-0.json"
    write_atomically(target, "before")

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(FmdError) as caught:
            write_atomically(target, "after")
    assert os.strerror(code) in str(caught.value) and "FMD_RESULTS" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["seed-0.json"]  # no half-written file either
    write_atomically(target, "after")
    assert target.read_text() == "after"


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(FmdError, match=r"cannot write .*runs/seed-0.json"):
        write_atomically(tmp_path / "runs" / "seed-0.json", "text")
    assert (tmp_path / "runs").read_text() == "a file"


def test_provenance(monkeypatch):
    monkeypatch.setenv("FMD_COMMIT", "abc")
    monkeypatch.setenv("FMD_DIRTY", "1")
    told = provenance()
    assert (told["commit"], told["dirty"]) == ("abc", True)
    assert {"python", "torch", "timm", "numpy"} <= told["versions"].keys()


def test_provenance_without_a_repository(monkeypatch, tmp_path):
    for name in ("FMD_COMMIT", "FMD_DIRTY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("fmd.records.ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    told = provenance()
    assert (told["commit"], told["dirty"]) == ("unknown", True)


def test_only_changed_code_and_experiments_are_dirty(monkeypatch, tmp_path):
    for name in ("FMD_COMMIT", "FMD_DIRTY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("fmd.records.ROOT", tmp_path)

    def git(*words):
        options = ("user.name=a", "user.email=a@b.c", "commit.gpgsign=false")
        who = [word for option in options for word in ("-c", option)]
        return subprocess.check_output(["git", "-C", tmp_path, *who, *words], text=True).strip()

    for name in ("fmd/a.py", "experiments/a.yaml", "notebooks/a.ipynb", "results/a.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    for name in ("notebooks/a.ipynb", "results/a.json"):
        (tmp_path / name).write_text("after")
        told = provenance()
        assert (told["commit"], told["dirty"]) == (git("rev-parse", "HEAD"), False)
    for name in ("fmd/new.py", "experiments/a.yaml"):
        (tmp_path / name).write_text("after")
        assert provenance()["dirty"] is True
        git("stash", "-qu")
        assert provenance()["dirty"] is False
