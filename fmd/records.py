"""The record of a run: settings, provenance, results. A run is done when its record exists."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fmd.config import ROOT, RunConfig, results_dir
from fmd.errors import FmdError

# The time of a run by what it went to. The parts of a step are what images per second count.
STEP_PARTS = ("batches", "forward", "backward", "update")
PARTS = ("preparation", *STEP_PARTS, "evaluation", "checkpoints")
SOURCES = ("fmd", "experiments")  # folders that a run's numbers follow from


class Base(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Accuracy(Base):
    """Percent of the images of a split, and mean cross-entropy."""

    top1: float
    top5: float
    loss: float


class Epoch(Base):
    """One pass over the training images: mean losses, learning rate at its end, validation."""

    epoch: int
    lr: float
    train: dict[str, float]
    val: Accuracy
    val_ema: Accuracy | None = None


class Evaluation(Base):
    """The test images, read once after training."""

    last: Accuracy
    best: Accuracy
    ema: Accuracy | None = None
    agreement: float | None = None  # with the teacher's answers, last student, percent


class Relations(Base):
    """Unweighted manifold losses per layer pair on fixed validation images."""

    student_layers: list[int]
    teacher_layers: list[int]
    before: dict[str, list[float]]
    after: dict[str, list[float]]


class Teacher(Base):
    run: str
    fingerprint: str
    val_top1: float | None  # of its answers on validation images; none if it gives features alone


class Timing(Base):
    """What the numbers do not depend on; left out when two records are compared."""

    seconds: float  # wall time of training and evaluation, without interruptions
    # Of these seconds, by PARTS. A call that stopped early does not know what its last checkpoint
    # took, which is in neither.
    parts: dict[str, float] | None = None
    images_per_second: float  # training images, validation and checkpoints left out
    share_of_peak: float | None = None  # of the GPU's rate of matrix products, where it is known
    peak_memory_mb: float
    resumed: int  # how often the run went on from a checkpoint
    finished: str


class Record(Base):
    schema_version: Literal[1] = 1
    config: RunConfig
    key: str
    commit: str
    dirty: bool
    versions: dict[str, str]
    device: str
    precision: str
    world_size: int
    data: dict[str, Any]
    parameters: int
    teacher: Teacher | None
    fingerprint: str  # of the last weights
    epochs: list[Epoch]
    best_epoch: int
    test: Evaluation
    relations: Relations | None
    timing: Timing

    @property
    def last(self) -> Epoch:
        return self.epochs[-1]

    @property
    def best(self) -> Epoch:
        return self.epochs[self.best_epoch]


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all; raises :class:`FmdError` if the folder takes no files."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            os.unlink(temporary)
        raise FmdError(
            f"cannot write {path}: {error.strerror}. Free the place or set FMD_RESULTS to another "
            "folder; what was written before is untouched"
        ) from error


def write_record(record: Record) -> Path:
    path = record.config.path("runs", ".json")
    write_atomically(path, record.model_dump_json(indent=1) + "\n")
    return path


def read_record(path: Path) -> Record:
    """Read and validate a record; raises :class:`FmdError` naming the file if it is not whole."""
    try:
        record = Record.model_validate_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise FmdError(f"no record at {path}: the run has not finished") from None
    except OSError as error:
        raise FmdError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise FmdError(
            f"{path} is not a whole record ({where}: {first['msg']}): delete it and run again"
        ) from None
    if record.key != record.config.key:
        raise FmdError(
            f"{path} was edited, or made when runs had other settings: its settings do not match "
            "its key; delete it and run again"
        )
    return record


def finished(config: RunConfig) -> Record | None:
    """The valid record of just this run, or None if it has not finished.

    Raises :class:`FmdError` if a record of other settings, or half a record, is in its place.
    """
    path = config.path("runs", ".json")
    if not path.exists():
        return None
    record = read_record(path)
    if record.key != config.key:
        raise FmdError(
            f"{path} holds a run with other settings ({changed_settings(record.config, config)}): "
            "move it away to run again, or give the setting as an override"
        )
    return record


def changed_settings(old: RunConfig, new: RunConfig) -> str:
    """'lr: 0.1 -> 0.2; …', for messages."""
    before, after = old.model_dump(), new.model_dump()
    return "; ".join(f"{k}: {before[k]!r} -> {after[k]!r}" for k in after if before[k] != after[k])


def read_benchmark(name: str, command: str | None = None, root: Path | None = None) -> dict:
    """Stored measurements of ``benchmarks/`` in a results folder, by default the one in use.

    Raises :class:`FmdError`, with the command that makes them, if there are none or half a file.
    """
    path = (root or results_dir()) / "benchmarks" / f"{name}.json"
    command = command or f"python -m fmd.benchmark {name}"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FmdError(f"no measurements at {path}: run {command}") from None
    except ValueError:
        raise FmdError(f"{path} is not whole: delete it and run {command}") from None


def write_benchmark(name: str, content: dict) -> Path:
    """Store measurements where :func:`read_benchmark` finds them; returns the file."""
    path = results_dir() / "benchmarks" / f"{name}.json"
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    return path


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of what was measured several times."""
    return {
        name: statistics.median(values),
        f"{name}_low": min(values),
        f"{name}_high": max(values),
    }


def provenance() -> dict[str, Any]:
    """Commit, dirty flag and versions of what the numbers were made with.

    Dirty is what they follow from, ``SOURCES``, not a notebook that was saved with its outputs.
    """

    def git(*args: str) -> str:
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    # A machine without the repository says what it runs through the environment.
    commit = os.environ.get("FMD_COMMIT") or head or "unknown"
    dirty = os.environ.get("FMD_DIRTY")
    if dirty is None:
        dirty = git("status", "--porcelain", "--", *SOURCES) if head else "unknown"
    packages = ("torch", "torchvision", "timm", "numpy", "pydantic", "safetensors")
    return {
        "commit": commit,
        "dirty": dirty not in ("", "0", "false") or commit == "unknown",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in packages},
    }
