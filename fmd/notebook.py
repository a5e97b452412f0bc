"""What the notebooks share: parameters checked before anything runs, and a live curve."""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
from IPython.display import display
from pydantic import ConfigDict, create_model

from fmd.config import ROOT, RunConfig, _validate
from fmd.errors import FmdError, nearest
from fmd.logs import log_folder, read_log
from fmd.plots import RC, STYLES, Figure
from fmd.records import Epoch, Record, finished

# Loss terms in the colours of the variants that they make up.
TERM_STYLES = STYLES | {
    "loss": ("#000000", "-"),
    "base": STYLES["teacher"],
    "logit": STYLES["soft-kd"],
}


def check_parameters(namespace: dict[str, Any]) -> None:
    """Refuse unknown parameters and wrong types; call it in the cell after the parameters.

    The last cell run that has annotated literals (``epochs: int = None``) says which parameters
    there are. Any other literal assigned in it, or in a cell run since, such as the one that
    Papermill injects, must be one of them: Papermill itself only warns.

    Args:
        namespace: the notebook's ``globals()``.

    Raises:
        FmdError: a name that is no parameter, or a value of another type; None is allowed where it
            is the default.
    """
    assigned: set[str] = set()
    declared: dict[str, Any] = {}
    for source in reversed(namespace["In"][:-1]):
        assignments = _literal_assignments(source)
        assigned |= assignments.keys()
        declared = {name: field for name, field in assignments.items() if field is not None}
        if declared:
            break
    for name in assigned - declared.keys():
        # A name left behind would be refused again after it was corrected by hand.
        del namespace[name]
        raise FmdError(f"unknown parameter '{name}'{nearest(name, declared)}")
    model = create_model("Parameters", __config__=ConfigDict(strict=True), **declared)
    _validate(model, {name: namespace[name] for name in declared}, "parameters")


def _literal_assignments(source: str) -> dict[str, Any]:
    """Names of a cell of nothing but ``name[: type] = literal``; to each its type for pydantic."""
    try:
        statements = ast.parse(source).body
        found = {}
        for statement in statements:
            default = ast.literal_eval(statement.value)
            if isinstance(statement, ast.AnnAssign):
                kind = getattr(builtins, statement.annotation.id)
                found[statement.target.id] = (kind | None if default is None else kind, ...)
            else:
                found.update({target.id: None for target in statement.targets})
    except (SyntaxError, ValueError, AttributeError):  # a cell that does something else
        return {}
    return found


class LiveCurve:
    """Losses and validation accuracy, redrawn in place while a run goes on.

    Give it to ``train(..., on_epoch=LiveCurve(config.epochs))``. It draws at most every two
    seconds, and always after the last epoch.
    """

    EVERY = 2.0

    def __init__(self, epochs: int):
        self.epochs = epochs
        self._display = None
        self._next = 0.0

    def __call__(self, done: list[Epoch]) -> None:
        if time.monotonic() < self._next and len(done) < self.epochs:
            return
        figure = self.draw(done)
        if self._display is None:
            self._display = display(figure, display_id=True)
        else:
            self._display.update(figure)
        self._next = time.monotonic() + self.EVERY

    @mpl.rc_context(RC)
    def draw(self, done: list[Epoch]) -> Figure:
        figure = Figure(figsize=(8.4, 3.2), dpi=100, layout="constrained", facecolor="white")
        left, right = figure.subplots(ncols=2)
        epochs = [epoch.epoch + 1 for epoch in done]
        for name in done[-1].train:
            color, line, *_ = TERM_STYLES[name]
            values = [epoch.train[name] for epoch in done]
            left.plot(epochs, values, color=color, linestyle=line, label=name)
        left.set(ylabel="training loss", ylim=(0, None))
        left.legend()
        right.plot(epochs, [epoch.val.top1 for epoch in done], color="#000000", marker=".")
        right.set(ylabel="validation top-1 (%)", title=f"last epoch: {done[-1].val.top1:.1f} %")
        for axes in (left, right):
            axes.set(xlabel="epoch", xlim=(0.5, self.epochs + 0.5))
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.alt = (
            f"Training losses and validation accuracy after {len(done)} of {self.epochs} epochs: "
            f"loss {done[-1].train['loss']:.3f}, validation top-1 {done[-1].val.top1:.1f} %."
        )
        return figure


def launch(config: RunConfig, words: list[str], processes: int = 1) -> subprocess.Popen | None:
    """Start a run in processes of its own, which go on when the notebook is closed.

    Args:
        config: the run.
        words: arguments of ``python -m fmd.train`` that make just this run.
        processes: how many share it, one a GPU.

    Returns:
        The process; None if the run is finished, or one that was launched before still runs.
    """
    folder = log_folder(config)
    if finished(config) is not None or running(config):
        return None
    folder.mkdir(parents=True, exist_ok=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    command = [sys.executable, *(torchrun if processes > 1 else ()), "-m", "fmd.train", *words]
    with open(folder / "output.txt", "a") as output:
        process = subprocess.Popen(
            [*command, "--log"], stdout=output, stderr=output, cwd=ROOT, start_new_session=True
        )
    (folder / "process").write_text(str(process.pid))
    return process


def running(config: RunConfig) -> bool:
    """Whether a process that :func:`launch` started for the run is still there."""
    try:
        process = int((log_folder(config) / "process").read_text())
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
    except FileNotFoundError:
        return False
    except ChildProcessError:  # launched before the notebook was opened
        pass
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def follow(config: RunConfig, every: float = 10.0) -> Record:
    """Draw a launched run's curves until it ends; interrupting this leaves the run alone.

    Raises :class:`FmdError` with the last line of its output if the run ended without a record.
    """
    curve, seen = LiveCurve(config.epochs), 0
    line = display("starting", display_id=True)
    output = log_folder(config) / "output.txt"
    while True:
        alive = running(config)
        epochs = read_log(config)
        if len(epochs) > seen:
            curve(epochs)
            seen = len(epochs)
        last = _last_line(output)
        line.update(last)
        record = finished(config)
        if record is not None:
            return record
        if not alive:
            raise FmdError(f"the run has ended without a record: {last} (all of it: {output})")
        time.sleep(every)


def _last_line(output: Path) -> str:
    text = output.read_text(errors="replace") if output.exists() else ""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing said yet"])[-1]
