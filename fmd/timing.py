"""Where the time of a run goes, measured without making the host wait for the device."""

from __future__ import annotations

import time

import torch

from fmd.processes import synchronize
from fmd.records import PARTS


class Stopwatch:
    """Seconds that a run has spent on each of ``fmd.records.PARTS``.

    On a CPU the clock tells. A GPU works through what the host gave it long before, so there the
    ends of parts are events among its work, and they are read once the host has waited for it.

    Args:
        device: where the run computes.

    Attributes:
        seconds: of each part, up to the last :meth:`settle`.
    """

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        self._since = time.monotonic()
        self._running = False
        self._start: torch.cuda.Event | None = None
        self._ends: list[tuple[str, torch.cuda.Event]] = []

    def lap(self, part: str) -> None:
        """What was done since the last call was this part of a step. Waits for nothing.

        Calls before the first :meth:`settle` are ignored: that one books all time up to then under
        its own part, compilation included, which is not what a step costs.
        """
        if not self._running:
            return
        if self._device.type == "cuda":
            self._ends.append((part, self._event()))
        else:
            self.settle(part)

    def settle(self, part: str) -> None:
        """The same where the host has waited for the device, or does now.

        On a GPU the part gets what the laps since the last settling do not account for, so that
        all parts add up to the time of the clock.
        """
        synchronize(self._device)
        now = time.monotonic()
        rest = now - self._since
        for name, end in self._ends:
            spent = self._start.elapsed_time(end) / 1000
            self.seconds[name] += spent
            rest -= spent
            self._start = end
        self.seconds[part] += rest
        self._since, self._running = now, True
        self._ends.clear()
        if self._device.type == "cuda":
            self._start = self._event()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
