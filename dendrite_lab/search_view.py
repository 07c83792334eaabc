"""Visits, values and scores of a running search, keyed by the branches they belong to."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dendrite_lab.tree_model import Piece


class Values(NamedTuple):
    """Search statistics of one node; NaN where there are none."""

    visits: int = 0
    value: float = math.nan
    uct: float = math.nan
    best: bool = False


_NONE = Values()


class SearchView:
    """Follows one search handle; calls only its accessors that are safe from any thread."""

    def __init__(self) -> None:
        self.handle: Any | None = None
        self._version = -1
        self._values: dict[int, Values] = {}  # by branch id
        self._best = 0

    def watch(self, handle: Any | None) -> None:
        """Follow `handle` from now on; None forgets all values."""
        self.handle = handle
        self._version = -1
        self._values.clear()
        self._best = 0

    def poll(self) -> list[int]:
        """Branches whose values changed since the last call. O(changed)."""
        if self.handle is None:
            return []
        fresh = self.handle.changed_since(self._version)
        self._version = fresh.version
        columns = (fresh.branch_id, fresh.visits, fresh.value, fresh.uct)
        changed = []
        for branch_id, visits, value, uct in zip(*(c.tolist() for c in columns), strict=True):
            self._values[branch_id] = Values(visits, _finite(value), _finite(uct))
            changed.append(branch_id)
        return changed + self._poll_best()

    def _poll_best(self) -> list[int]:
        best = self.handle.best if self.handle is not None else None
        now = 0 if best is None else best.id
        if now == self._best:
            return []
        changed, self._best = [self._best, now], now
        return changed

    def of(self, piece: Piece) -> Values:
        """Values of the search node whose branch ends with this piece."""
        if not piece.tip:
            return _NONE
        values = self._values.get(piece.key, _NONE)
        return values._replace(best=True) if piece.key == self._best and values.visits else values

    def summary(self) -> dict[str, Any] | None:
        """State and counters of the search for the status line, None without one."""
        if self.handle is None:
            return None
        usage = self.handle.usage()
        return {
            "state": str(self.handle.state),
            "iterations": usage.iterations,
            "nodes": usage.nodes,
            "tokens": usage.tokens,
        }


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
