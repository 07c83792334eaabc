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


@dataclass(frozen=True, slots=True)
class Selection:
    """The scheduler's choice for one step.

    Attributes:
        lanes: lanes that get rows.
        handles: their branch handles, i64 [n].
        quotas: tokens each may compute, i32 [n].
        stale: lanes whose branch is gone.
    """

    lanes: list[Lane]
    handles: np.ndarray
    quotas: np.ndarray
    stale: list[Lane]


class Scheduler:
    """Continuous batching: decoding branches get one row each, prompts join in chunks.

    Order: priority (higher first), then least recently served, then arrival; so no lane starves
    among equals. While anything decodes, prompts get at most `prefill_chunk` rows of a step, which
    bounds how long a step can make the others wait.
    """

    def __init__(self, max_batch_tokens: int, prefill_chunk: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._prefill_chunk = prefill_chunk
        self._step = 0

    def next_batch(self, lanes: Sequence[Lane], core: Any) -> Selection:
        """Choose rows for the lanes that need logits; O(n log n)."""
        self._step += 1
        handles = np.array([lane.handle for lane in lanes], np.int64)
        pending = core.pending(handles)
        stale = [lane for lane, count in zip(lanes, pending, strict=True) if count < 0]
        alive = [(lane, int(n)) for lane, n in zip(lanes, pending, strict=True) if n >= 0]
        alive.sort(key=lambda item: (-item[0].job.priority, item[0].last_served, item[0].arrival))
        chosen, quotas = self._share(alive)
        for lane in chosen:
            lane.last_served = self._step
        return Selection(
            chosen,
            np.array([lane.handle for lane in chosen], np.int64),
            np.array(quotas, np.int32),
            stale,
        )

    def _share(self, alive: list[tuple[Lane, int]]) -> tuple[list[Lane], list[int]]:
        left = self._max_batch_tokens
        decoding = any(count <= 1 for _, count in alive)
        prefill_left = min(left, self._prefill_chunk) if decoding else left
        chosen: list[Lane] = []
        quotas: list[int] = []
        for lane, count in alive:
            want = max(count, 1)
            quota = min(want, left, prefill_left) if want > 1 else min(want, left)
            if quota <= 0:
                continue
            chosen.append(lane)
            quotas.append(quota)
            left -= quota
            if want > 1:
                prefill_left -= quota
        return chosen, quotas
