"""One process or many: what ``torchrun`` starts, sums over all, and one message for all."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fmd.errors import FmdError, run_main


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
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise FmdError(f"no device '{device}': {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FmdError(f"no device '{device}': torch sees no GPU; leave --device out, or give cpu")
    if not _launched():
        return Processes(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def _launched() -> bool:
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def average(sums: Tensor) -> None:
    """Mean over the processes, in place: each saw its own share of every batch."""
    if dist.is_initialized():
        dist.all_reduce(sums)
        sums /= dist.get_world_size()


def total(number: float, device: torch.device) -> float:
    """Sum of a number over the processes."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(value)
    return value.item()


def any_past(moments: list[float | None], device: torch.device) -> list[bool]:
    """Which moments have passed for the slowest process, so that all decide alike."""
    now = time.monotonic()
    past = [moment is not None and now > moment for moment in moments]
    if not dist.is_initialized():
        return past
    flags = torch.tensor(past, dtype=torch.uint8, device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def run_together(main) -> None:
    """:func:`fmd.errors.run_main` for a run of several processes, of which one speaks for all.

    The first process to fail prints its line. Whatever then happens to the others, which wait for
    it in vain, is not worth a line; ``torchrun`` ends them.
    """
    if not _launched():
        run_main(main)
        return
    rank = os.environ["RANK"]
    store, *_ = next(dist.rendezvous("env://"))
    words = dist.PrefixStore("fmd/first-error", store)
    try:
        main()
    except FmdError as error:
        message = " ".join(str(error).split())
    except (RuntimeError, dist.DistError) as error:
        # torch raises both of its own faults and of a connection that another process has closed
        if "onnection" not in str(error) and "socket" not in str(error).lower():
            raise
        message = (
            "another process of this run has ended; the next call goes on from the last checkpoint"
        )
    else:
        return
    if words.add("count", 1) == 1:
        os.write(2, f"error: {message} (process {rank})\n".encode())
    os._exit(1)  # an orderly exit would wait for the others
