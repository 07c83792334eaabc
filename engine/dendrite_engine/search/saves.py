"""Requests to save a running search, served by its own thread between two batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

from dendrite_engine.errors import SearchError

Written = dict[str, int]
Save = Callable[[str | os.PathLike[str]], Written]


class SaveQueue:
    """Paths to save to, and futures of those who wait. Any thread adds, one serves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[str | os.PathLike[str], Future[Written]]] = []
        self._closed: Save | None = None

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, path: str | os.PathLike[str]) -> Future[Written]:
        """Ask for a save; after `close` it is carried out here and now."""
        done: Future[Written] = Future()
        with self._lock:
            save = self._closed
            if save is None:
                self._waiting.append((path, done))
        if save is not None:
            _carry_out(save, path, done)
        return done

    def serve(self, save: Save) -> None:
        """Carry out what was asked for so far."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for path, done in waiting:
            _carry_out(save, path, done)

    def close(self, save: Save) -> None:
        """Carry out what is left; what comes later is carried out by who asks."""
        with self._lock:
            self._closed = save
        self.serve(save)


def _carry_out(save: Save, path: str | os.PathLike[str], done: Future[Written]) -> None:
    try:
        done.set_result(save(path))
    except Exception as error:  # goes to who asked, not into the search
        done.set_exception(error)


def refuse(_path: str | os.PathLike[str]) -> Written:
    """Stands for saving a search that failed."""
    raise SearchError("save: the search failed; there is nothing to go on with")
