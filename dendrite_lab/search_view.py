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
    """Follows one search handle; reads only its thread-safe accessors."""

    def __init__(self) -> None:
        self.handle: Any | None = None
        self._version = 0
        self._values: dict[int, dict[int, Values]] = {}  # branch id -> end position -> values
        self._best: set[int] = set()

    def watch(self, handle: Any | None) -> None:
        """Follow `handle` from now on; None forgets all values."""
        self.handle = handle
        self._version = 0
        self._values.clear()
        self._best.clear()

    def poll(self) -> list[tuple[int, int]]:
        """(branch id, end position) of the nodes whose values changed since the last call."""
        if self.handle is None:
            return []
        self._version, rows = self.handle.changed_since(self._version)
        changed: list[tuple[int, int]] = []
        for row in rows:
            if row.branch_id:
                values = Values(row.visits, _finite(row.value), _finite(row.uct))
                self._values.setdefault(row.branch_id, {})[row.end] = values
                changed.append((row.branch_id, row.end))
        return changed

    def of(self, piece: Piece) -> Values:
        """Values of the deepest search node that ends inside `piece`."""
        ends = self._values.get(piece.key)
        if not ends:
            return _NONE
        inside = [end for end in ends if piece.start < end <= piece.end or end == piece.end]
        return ends[max(inside)] if inside else _NONE

    def summary(self) -> dict[str, Any] | None:
        """Counters of the search for the status line, None without one."""
        if self.handle is None:
            return None
        stats = self.handle.stats()
        return {
            "state": str(self.handle.state),
            "iterations": stats.iterations,
            "nodes": stats.nodes,
            "tokens": stats.tokens,
        }


def _finite(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else float(value)
