"""One process or many: what ``torchrun`` starts, sums over all, and one message for all."""

from __future__ import annotations

import os
import platform
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fmd.errors import FmdError, run_main

OTHER_ENDED = (
    "another process of this run has ended, or the run was told to; the next call goes on from the "
    "last checkpoint"
)


@dataclass(frozen=True)
class Processes:
    """This process among those of a run, and its device."""

    rank: int
    world: int
    device: torch.device


def join(device: str | torch.device | None = None) -> Processes:
    """The group that ``torchrun`` describes, or this process alone; a GPU where there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # The full loss needs float64, which torch's other devices may lack.
    if not re.fullmatch(r"cpu|cuda(:\d+)?", str(device)):
        raise FmdError(f"no device '{device}' here: cpu or cuda")
    device = torch.device(device)
    # A driver may know of GPUs that torch cannot use.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise FmdError(f"no device '{device}': torch can use {gpus} GPUs; leave --device out")
    if not _launched():
        return Processes(0, 1, device)
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= gpus:
            raise FmdError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes but {gpus} GPUs: "
                "give torchrun --nproc-per-node as many as there are"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def _launched() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def device_name(device: torch.device) -> str:
    """What a record calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({_processor()})"


def _processor() -> str:
    """Its name where the system tells it, else its kind: the last bits of results depend on it."""
    told = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", told.read_text() if told.exists() else "", re.M)
    return named[1] if named else platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def average(sums: Tensor) -> None:
    """Mean over the processes, in place: each saw its own share of every batch."""
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums /= dist.get_world_size()


def gather(value) -> list:
    """Every process's value, by rank."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def deadline(max_minutes: float | None) -> float | None:
    """The moment that is so many minutes away; none for no limit."""
    if max_minutes is None:
        return None
    if not max_minutes >= 0:
        raise FmdError(f"max_minutes = {max_minutes:g}: give 0 or more minutes")
    return time.monotonic() + 60 * max_minutes


def any_past(*moments: float | None) -> list[bool]:
    """Which moments have passed for any process, so that all decide alike."""
    now = time.monotonic()
    past = [moment is not None and now > moment for moment in moments]
    return [any(flags) for flags in zip(*gather(past))]


def run_together(main) -> None:
    """:func:`fmd.errors.run_main` for a run of several processes, of which one speaks for all.

    The first process that fails, or is told to end because another one died, prints its line;
    what then happens to those that wait for it in vain is not worth one.
    """
    if not _launched():
        run_main(main)
        return
    store, *_ = next(dist.rendezvous("env://"))
    words = dist.PrefixStore("fmd/first-error", store)

    def end(message: str) -> None:
        if words.add("count", 1) == 1:
            os.write(2, f"error: {message} (process {os.environ['RANK']})\n".encode())
        os._exit(1)  # an orderly exit would wait for the others

    _on_termination(lambda: end(OTHER_ENDED))
    try:
        main()
    except FmdError as error:
        end(" ".join(str(error).split()))
    except RuntimeError as error:
        # Of a connection that a process closed by dying, gloo raises a plain RuntimeError.
        if not isinstance(error, dist.DistError) and "onnection" not in str(error):
            raise
        end(OTHER_ENDED)


def _on_termination(act) -> None:
    """Call ``act`` on SIGTERM even while the main thread waits inside torch for another process.

    Python's own handlers run in the main thread, which does not return from there; the number of
    the signal is written to a pipe at once, and a thread reads it.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    process = os.getpid()

    def wait() -> None:
        while True:
            if os.read(reading, 1)[0] == signal.SIGTERM and os.getpid() == process:
                act()

    threading.Thread(target=wait, daemon=True).start()
