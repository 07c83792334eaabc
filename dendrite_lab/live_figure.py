"""Keeps a plotly FigureWidget up to date from a thread, without flooding the front end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from dendrite_lab.comm_guard import answer_on_sender

INTERVAL = 0.4  # seconds between updates at least


class LiveFigure:
    """One thread that reads values and writes those that changed into a figure.

    Args:
        widget: a `go.FigureWidget`.
        read: new values in the form that `Figure.update` takes: data and layout.
        ended: whether what is shown has ended: one last update, then the thread stops.
        name: of the thread.
    """

    def __init__(
        self, widget: Any, read: Callable[[], dict[str, Any]], ended: Callable[[], bool], name: str
    ) -> None:
        self.widget, self._read, self._ended = widget, read, ended
        self._stop = threading.Event()
        self._last: dict[str, Any] = {}
        self.updates = 0
        self.error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, name=f"dendrite-lab plot ({name})", daemon=True
        )

    def start(self) -> LiveFigure:
        """Fill the figure now and follow from here on."""
        self.update()
        self._thread.start()
        return self

    def stop(self, timeout: float = 5.0) -> None:
        """Stop following; the figure keeps what it shows."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    @property
    def running(self) -> bool:
        """Whether the figure is still being updated."""
        return self._thread.is_alive()

    def update(self) -> bool:
        """Read once and write what changed; returns whether anything did."""
        values = self._read()
        if _same(values, self._last):
            return False
        self._last = values
        with self.widget.batch_update():
            for trace, new in zip(self.widget.data, values["data"], strict=True):
                trace.update(new)
            self.widget.layout.update(values["layout"])
        self.updates += 1
        return True

    def _work(self) -> None:
        try:
            while not self._stop.wait(INTERVAL):
                last = self._ended()
                if self.widget.comm is None:  # the figure was closed
                    return
                self.update()
                if last:
                    return
        except Exception as error:  # shown in the figure: a thread has nobody to raise to
            self.error = error
            self._show(error)

    def _show(self, error: Exception) -> None:
        if self.widget.comm is not None and not self._stop.is_set():
            with self.widget.batch_update():
                self.widget.layout.title.text = f"updates stopped: {type(error).__name__}: {error}"


def follow(
    widget: Any, read: Callable[[], dict[str, Any]], ended: Callable[[], bool], name: str
) -> LiveFigure:
    """Keep `widget` up to date; the `LiveFigure` is also its attribute `live`."""
    answer_on_sender(widget)
    live = LiveFigure(widget, read, ended, name)
    # FigureWidget refuses unknown attributes through its own __setattr__; the thread must be
    # reachable.
    object.__setattr__(widget, "live", live)
    return live.start()


def _same(a: Any, b: Any) -> bool:
    """Equality that looks into arrays and takes NaN as equal to NaN."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        x, y = np.asarray(a), np.asarray(b)
        if x.shape != y.shape:
            return False
        if x.dtype.kind == "f" and y.dtype.kind == "f":
            return bool(np.array_equal(x, y, equal_nan=True))
        return bool(np.array_equal(x, y))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
