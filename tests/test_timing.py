"""Where the time of a run goes: all of it is counted, and on a GPU nothing waits for that."""

import time
from types import SimpleNamespace

import pytest
import torch

import fmd.timing
from fmd.records import PARTS, STEP_PARTS
from fmd.timing import Stopwatch


def test_on_a_cpu_each_part_gets_the_time_since_the_last():
    started = time.monotonic()
    watch = Stopwatch(torch.device("cpu"))
    watch.lap("forward")  # of the first step, which counts as preparation
    time.sleep(0.02)
    watch.settle("preparation")
    time.sleep(0.03)
    watch.lap("forward")
    time.sleep(0.01)
    watch.lap("backward")
    watch.settle("evaluation")
    elapsed = time.monotonic() - started
    assert watch.seconds.keys() == set(PARTS)
    assert watch.seconds["preparation"] >= 0.02
    assert watch.seconds["forward"] >= 0.03
    assert watch.seconds["backward"] >= 0.01
    assert watch.seconds["update"] == watch.seconds["batches"] == 0
    assert sum(watch.seconds.values()) == pytest.approx(elapsed, abs=5e-3)


class Gpu:
    """A GPU that needs ``cost`` seconds for each thing it is given, and a host that needs none."""

    def __init__(self, monkeypatch):
        self.clock = self.done = 0.0  # of the host; when the GPU is done with all it was given
        self.waits = 0
        clock = SimpleNamespace(monotonic=lambda: self.clock)
        monkeypatch.setattr(fmd.timing, "time", clock)
        monkeypatch.setattr(fmd.timing, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())

    def work(self, cost: float) -> None:
        self.done = max(self.done, self.clock) + cost

    def synchronize(self, device=None) -> None:
        self.waits += 1
        self.clock = max(self.clock, self.done)


class Event:
    def record(self, stream: Gpu) -> None:
        self.time = max(stream.done, stream.clock)

    def elapsed_time(self, end) -> float:
        return 1000 * (end.time - self.time)


def test_on_a_gpu_parts_are_its_own_time_and_only_settling_waits(monkeypatch):
    gpu = Gpu(monkeypatch)
    watch = Stopwatch(torch.device("cuda"))
    costs = dict(zip(STEP_PARTS, (1.0, 5.0, 10.0, 2.0)))
    for step in range(4):
        for part, cost in costs.items():
            gpu.work(cost)
            watch.lap(part)
        if step == 0:
            gpu.clock += 7.0  # compiles
            watch.settle("preparation")
    assert gpu.waits == 1
    assert watch.seconds["preparation"] == 18.0 and watch.seconds["forward"] == 0.0
    gpu.synchronize()  # the loop looks at the losses
    gpu.clock += 0.5  # the host alone
    watch.settle("update")
    expected = {part: 3 * cost for part, cost in costs.items()}
    expected["update"] += 0.5
    assert {part: watch.seconds[part] for part in STEP_PARTS} == pytest.approx(expected)

    gpu.clock += 3.0  # the host decodes while the GPU has nothing to do
    gpu.work(1.0)
    watch.lap("batches")
    gpu.work(5.0)
    watch.lap("forward")
    watch.settle("update")
    gpu.clock += 4.0
    watch.settle("checkpoints")
    assert watch.seconds["batches"] == pytest.approx(expected["batches"] + 4.0)
    assert watch.seconds["checkpoints"] == pytest.approx(4.0)
    assert sum(watch.seconds.values()) == pytest.approx(gpu.clock)
