"""What the notebooks share: parameters checked before anything runs, and a live curve."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import matplotlib as mpl
from IPython.display import display
from pydantic import ConfigDict, create_model

from fmd.config import RunConfig, _validate
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

TAIL = 2**16  # bytes of a run's output that are looked at


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
    for name in (assigned & namespace.keys()) - declared.keys():
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
        figure = Figure(figsize=(8.4, 3.2))
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
    if finished(config) is not None or running(config):
        return None
    folder = log_folder(config)
    output = folder / "output.txt"
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    # After "--" torchrun takes no option for one of its own: --log could be short for --log-dir.
    start = (*torchrun, "-m", "--") if processes > 1 else ("-m",)
    command = [sys.executable, *start, "fmd.train", *words, "--log"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "process", "a") as lock:
            if not _lock(lock, shared=False):  # another notebook was faster
                return None
            if output.exists():
                output.replace(folder / "output.1.txt")
            with open(output, "w") as said:
                # The run inherits the lock, and with it the lock lasts and ends.
                process = subprocess.Popen(
                    command,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                    pass_fds=[lock.fileno()],
                )
            lock.truncate(0)
            lock.write(f"{process.pid}\n")  # for whoever wants to end the run
    except OSError as error:
        raise FmdError(f"cannot launch from {folder}: {error.strerror}; set FMD_RESULTS") from error
    return process


def running(config: RunConfig) -> bool:
    """Whether a run that :func:`launch` started is under way, whoever started it.

    Its lock tells. Its number would not: after a restart another process may have that number.
    """
    try:
        with open(log_folder(config) / "process") as lock:
            return not _lock(lock, shared=True)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _lock(file: TextIO, *, shared: bool) -> bool:
    """Lock an open file; False if another process holds a lock that does not go with it."""
    import fcntl  # not on Windows, where the other notebooks run without

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
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
    """The last error of a launch's output, else its last line; of a long one the end is read."""
    if not output.exists():
        return "nothing said yet"
    with open(output, "rb") as file:
        file.seek(max(output.stat().st_size - TAIL, 0))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["nothing said yet"])[-1]
