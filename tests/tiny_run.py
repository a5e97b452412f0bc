"""Run tests/experiments/tiny.yaml in processes of their own, to be killed or to run as ranks.

python tests/tiny_run.py train tiny none ...     the arguments of fmd.train
python tests/tiny_run.py kill WHERE:N... -- ...  the same once for each WHERE:N, ended by SIGKILL
                                                 at the Nth call of it, and once more to the end
python tests/tiny_run.py die RANK WHERE:N -- ... under torchrun, one process ended by SIGKILL
python tests/tiny_run.py full N -- ...           the disk is full from the Nth file on
"""

import errno
import importlib
import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny import use_tiny

import fmd.train
from fmd.data import load_data
from fmd.processes import run_together
from fmd.task import ManifoldDistillationTask

PLACES = {
    "step": (ManifoldDistillationTask, "forward"),
    "evaluation": (fmd.train, "evaluate"),
    "replace": (os, "replace"),  # a file is written but not yet in its place
    "record": (fmd.train, "write_record"),
    "unlink": (Path, "unlink"),  # the record exists, its checkpoint as well
}


def main() -> None:
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    use_tiny(patch, Path(os.environ["FMD_RESULTS"]))
    patch.setattr(fmd.train, "CHECKPOINT_SECONDS", 0)
    command, *arguments = sys.argv[1:]
    if command == "kill":
        split = arguments.index("--")
        points, arguments = arguments[:split], arguments[split + 1 :]
        # Forked from a process that has loaded all but trained nothing yet, each starts at once.
        load_data("digits")
        importlib.import_module("torch._dynamo")

        for point in points:
            pid = os.fork()
            if pid == 0:
                arm(patch, *point.split(":"))
                break
            status = os.waitpid(pid, 0)[1]
            if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
                sys.exit(f"was not killed at {point}")
    if command == "die":
        rank, point, _, *arguments = arguments
        patch.setattr(fmd.train, "CHECK_EVERY", 1)
        patch.setattr(fmd.train, "CHECKPOINT_SECONDS_WITHIN", 0)
        if rank == os.environ["RANK"]:
            arm(patch, *point.split(":"))
    if command == "full":
        count, _, *arguments = arguments
        fill_disk(patch, int(count))
    sys.argv[1:] = arguments
    run_together(fmd.train.main)


def arm(patch: pytest.MonkeyPatch, place: str, count: str) -> None:
    owner, name = PLACES[place]
    original, calls = getattr(owner, name), itertools.count(1)

    def deadly(*args, **kwargs):
        if next(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    patch.setattr(owner, name, deadly)


def fill_disk(patch: pytest.MonkeyPatch, count: int) -> None:
    original, calls = os.fsync, itertools.count(1)

    def full(handle):
        if next(calls) >= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    patch.setattr(os, "fsync", full)


if __name__ == "__main__":
    main()
