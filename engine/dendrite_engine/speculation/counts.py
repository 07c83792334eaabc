"""The books of speculative decoding."""

from __future__ import annotations

import threading
from collections import OrderedDict

from dendrite_engine.types import DraftCounts, SpeculationStats

_MAX_BRANCHES = 1024


class Counts:
    """Counts for the engine and for each of the branches that were drafted for last."""

    def __init__(self) -> None:
        self._total = DraftCounts()
        self._branches: OrderedDict[int, DraftCounts] = OrderedDict()
        self._lock = threading.Lock()

    def add(
        self,
        branch_id: int,
        *,
        steps: int = 0,
        proposed: int = 0,
        accepted: int = 0,
        no_room: int = 0,
    ) -> None:
        """Count something of one branch."""
        more = DraftCounts(steps, proposed, accepted, no_room)
        with self._lock:
            self._total = self._total.plus(more)
            self._branches[branch_id] = self._branches.get(branch_id, DraftCounts()).plus(more)
            self._branches.move_to_end(branch_id)
            if len(self._branches) > _MAX_BRANCHES:
                self._branches.popitem(last=False)

    def read(self) -> SpeculationStats:
        """A reading; from any thread."""
        with self._lock:
            return SpeculationStats(self._total, dict(self._branches))
