"""The command: see :mod:`fmd.benchmark`."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

from fmd import benchmark
from fmd.benchmark.losses import losses
from fmd.benchmark.precision import precision
from fmd.benchmark.step import step
from fmd.benchmark.variance import variance
from fmd.errors import run_main
from fmd.processes import device_name, join
from fmd.records import provenance, write_benchmark

BENCHMARKS = {"losses": losses, "precision": precision, "variance": variance, "step": step}


def run(name: str, *, quick: bool = False, device: str | torch.device | None = None) -> Path:
    """Run a benchmark and write its rows, with provenance and device; returns the file.

    Args:
        name: one of ``losses``, ``precision``, ``variance``, ``step``.
        quick: tiny sizes that show nothing but that all of it runs; written to ``<name>-quick``.
        device: a GPU if there is one, else the CPU.

    Raises:
        FmdError: no such device, or a run of the digits that the features come from is not among
            the results.
    """
    device = join(device).device
    code = provenance()
    start = time.monotonic()
    rows = BENCHMARKS[name](device, quick)
    record = {
        "benchmark": name,
        "quick": quick,
        **code,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
    return write_benchmark(f"{name}-quick" if quick else name, record)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd.benchmark", description=benchmark.__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--device")
    args = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notes would break the bar
    print(run(args.name, quick=args.quick, device=args.device))


if __name__ == "__main__":
    run_main(main)
