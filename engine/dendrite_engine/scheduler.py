"""Which branches advance in the next forward pass, and by how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dendrite_engine.jobs import Job
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True, eq=False)
class Lane:
    """One branch of one running job; this base class only wants next-token logits.

    Attributes:
        job, index: the job and the branch's place in it.
        branch, handle: the branch.
        arrival: submission order, the last tie-breaker.
        last_served: step in which it last had rows in a forward pass.
    """

    job: Job
    index: int
    branch: Branch
    handle: int
    arrival: int
    last_served: int = -1

    @property
    def value(self) -> float:
        """What the job says that the branch is worth; 0 where it says nothing."""
        values = self.job.values
        return 0.0 if values is None else values[self.index]


@dataclass(frozen=True, slots=True, eq=False)
class Waiting:
    """Lanes that need logits; one object serves as long as they stay the same.

    Attributes:
        lanes: the lanes.
        handles: their branch handles, i64 [n].
    """

    lanes: tuple[Lane, ...]
    handles: np.ndarray


@dataclass(frozen=True, slots=True)
class Selection:
    """The scheduler's choice for one step.

    Attributes:
        chosen: places of the lanes that get rows, i64 [n]; None: all of them, in order.
        handles: their branch handles, i64 [n].
        quotas: tokens each may compute, i32 [n].
        stale: lanes whose branch is gone; nothing is chosen where there are any.
    """

    chosen: np.ndarray | None
    handles: np.ndarray
    quotas: np.ndarray
    stale: tuple[Lane, ...] = ()


class Scheduler:
    """Continuous batching: decoding branches get one row each, prompts join in chunks.

    Order: priority (higher first), then least recently served, then value (higher first), then
    arrival; so no lane starves among equals, and a search's values decide who of them waits. While
    anything decodes, prompts get at most `prefill_chunk` rows of a step, which bounds how long a
    step can make the others wait.

    Attributes:
        max_batch_tokens: rows of a step at most.
    """

    def __init__(self, max_batch_tokens: int, prefill_chunk: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._prefill_chunk = prefill_chunk
        self._step = 0
        self._ones = np.ones(max_batch_tokens, np.int32)
        # All of these were served in step `_all_served`; written into them when it matters.
        self._served: Waiting | None = None
        self._all_served = -1

    def next_batch(self, waiting: Waiting, core: Any) -> Selection:
        """Choose rows for the lanes that need logits.

        Where every lane needs one row and all fit, the order does not matter and nothing is done
        per lane; else O(n log n).
        """
        self._step += 1
        handles = waiting.handles
        pending = core.pending(handles)
        # As an unsigned number the -1 of a stale handle is the largest of all.
        fits = len(handles) <= self.max_batch_tokens
        if fits and not np.count_nonzero(pending.view(np.uint32) > 1):
            self._serve_all(waiting)
            return Selection(None, handles, self._ones[: len(handles)])
        gone = np.flatnonzero(pending < 0)
        if len(gone):
            stale = tuple(waiting.lanes[place] for place in gone.tolist())
            return Selection(gone[:0], handles[:0], pending[:0], stale)
        return self._choose(waiting, pending.tolist())

    def rest(self) -> None:
        """Nothing is left to do: keep no lane, and with it no branch and no engine, alive."""
        self._write_served()

    def _serve_all(self, waiting: Waiting) -> None:
        if waiting is not self._served:
            self._write_served()
            self._served = waiting
        self._all_served = self._step

    def _write_served(self) -> None:
        for lane in () if self._served is None else self._served.lanes:
            lane.last_served = self._all_served
        self._served = None

    def _choose(self, waiting: Waiting, counts: list[int]) -> Selection:
        self._write_served()
        lanes = waiting.lanes
        keys = [(-lane.job.priority, lane.last_served, -lane.value, lane.arrival) for lane in lanes]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        places, quotas = self._share(order, counts)
        for place in places:
            lanes[place].last_served = self._step
        chosen = np.array(places, np.int64)
        return Selection(chosen, waiting.handles[chosen], np.array(quotas, np.int32))

    def _share(self, order: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int]]:
        left = self.max_batch_tokens
        decoding = min(counts) <= 1
        prefill_left = min(left, self._prefill_chunk) if decoding else left
        places: list[int] = []
        quotas: list[int] = []
        for place in order:
            want = max(counts[place], 1)
            quota = min(want, left, prefill_left) if want > 1 else min(want, left)
            if quota <= 0:
                continue
            places.append(place)
            quotas.append(quota)
            left -= quota
            if want > 1:
                prefill_left -= quota
        return places, quotas
