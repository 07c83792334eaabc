"""CUDA graphs without a GPU: what would be captured is called again instead."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from dendrite_engine.device.graphs import GraphCache


class Recorded:
    """A graph that calls again what it would have captured."""

    def __init__(self, launch: Callable[[], None]) -> None:
        self.replay = launch


class RecordedGraphs(GraphCache):
    """Captures without a GPU.

    Attributes:
        refused: the graph, counted from 0, that can't be captured; -1: none.
    """

    def __init__(self) -> None:
        super().__init__(is_on=False, reason="")
        self.is_on, self.reason = True, "on: recorded"
        self.refused = -1
        self._count = itertools.count()

    def _captured(self, launch: Callable[[], None]) -> Recorded:
        if next(self._count) == self.refused:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        return Recorded(launch)
