"""Forward passes: from the lanes that wait to the logits of those that are finished by one."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dendrite_engine.cache.pages import PageGuard
from dendrite_engine.errors import StaleBranch
from dendrite_engine.runner import Runner
from dendrite_engine.scheduler import Selection
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import LogitsRow


@dataclass(frozen=True, slots=True)
class Flight:
    """A forward pass that was launched; with a device its logits may not be there yet.

    Attributes:
        chosen: places of its lanes among those that waited, i64 [n]; None: all of them, in order.
        logits: fp32 [R, vocab]; a later forward pass may overwrite them.
        rows: row of each lane in logits, i64 [n]; -1: it needs more forward passes.
        held: tokens that each branch held when it was planned, i32 [n]; only where it has a row.
    """

    chosen: np.ndarray | None
    logits: torch.Tensor
    rows: np.ndarray
    held: np.ndarray


class ForwardPass:
    """Plans and launches forward passes, and keeps the books of the pages they write.

    Attributes:
        is_async: a pass is launched, not done, when `launch` returns.
        step_ms: times of the last passes, in ms.
    """

    def __init__(self, core: Any, runner: Runner, trace: Trace, guard: PageGuard | None) -> None:
        self._core, self._runner = core, runner
        self._trace, self._guard = trace, guard
        self.is_async = runner.is_async
        self.step_ms: deque[float] = deque(maxlen=256)

    def launch(self, selection: Selection) -> Flight | None:
        """Start the pass over these lanes; None when one of them was pruned this moment."""
        try:
            plan = self._core.plan(selection.handles, selection.quotas)
        except StaleBranch:
            return None
        if plan.num_tokens == 0:
            plan.cancel()
            return None
        self._guard_before()
        try:
            logits, rows = self._runner.run(plan)
        except BaseException:
            plan.cancel()
            raise
        copies = plan.copies
        if len(copies):
            self._trace.append("copy", 0, {"pages": copies.tolist()})
        held = plan.positions.take(plan.logits_row) + 1
        plan.commit()  # what is launched later reads the pages after they were written
        self._guard_after()
        if last_ms := self._runner.last_ms:  # of a device: of the pass before, 0 before the first
            self.step_ms.append(last_ms)
        return Flight(selection.chosen, logits, rows, held)

    @property
    def median_ms(self) -> float:
        """Median of `step_ms`, 0 before the first."""
        recent = list(self.step_ms)
        return statistics.median(recent) if recent else 0.0

    def diagnose(self, error: Exception) -> Exception:
        """See Runner.diagnose."""
        return self._runner.diagnose(error)

    def _guard_before(self) -> None:
        if self._guard is not None:
            taken, freed, _ = self._core.debug_events()
            self._guard.before_step(taken, freed, self._core.debug_unsealed())

    def _guard_after(self) -> None:
        if self._guard is not None:
            taken, freed, sealed = self._core.debug_events()
            # Pages that changed hands while the step ran were not written by it for their new
            # holder.
            self._guard.before_step(taken, freed, [])
            self._guard.after_step([page for page in sealed if page not in {*taken, *freed}])


def gather_rows(rows: Sequence[LogitsRow]) -> tuple[torch.Tensor, np.ndarray]:
    """Logits fp32 [R, vocab] that hold all these rows, and the place of each in them, i64 [n]."""
    first = rows[0].tensor
    if all(row.tensor is first for row in rows):
        return first, np.array([row.row for row in rows], np.int64)
    return torch.stack([row.tensor[row.row] for row in rows]), np.arange(len(rows))
