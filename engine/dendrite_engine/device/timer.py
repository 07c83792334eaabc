"""Times forward passes without ever waiting for one."""

from __future__ import annotations

import time
from collections import deque

import torch

_MAX_PENDING = 16


class StepTimer:
    """Measures what lies between `start` and `stop` in the order of the device.

    Attributes:
        last_ms: the time of the last pass that is known to be done; 0 before the first.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.last_ms = 0.0
        self._on_gpu = on_gpu
        self._began = 0.0
        self._open: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """The next pass begins here."""
        if not self._on_gpu:
            self._began = time.perf_counter()
            return
        self._open = self._free.pop() if self._free else (_event(), _event())
        self._open[0].record()

    def stop(self) -> None:
        """It ends here."""
        if not self._on_gpu:
            self.last_ms = (time.perf_counter() - self._began) * 1e3
        elif self._open is not None:
            self._open[1].record()
            self._pending.append(self._open)
            self._open = None

    def poll(self) -> None:
        """Take note of the passes that are done by now."""
        pending = self._pending
        while pending and (pending[0][1].query() or len(pending) > _MAX_PENDING):
            pair = pending.popleft()
            if pair[1].query():
                self.last_ms = pair[0].elapsed_time(pair[1])
            self._free.append(pair)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
