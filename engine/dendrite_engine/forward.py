"""Forward passes: from the lanes that wait to the logits of those that are finished by one."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from dendrite_engine.ahead import AheadPlan, foresee, pages_needed
from dendrite_engine.attention.base import Plan
from dendrite_engine.cache.pages import PageGuard
from dendrite_engine.errors import StaleBranch
from dendrite_engine.runner import Runner
from dendrite_engine.scheduler import Selection
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import LogitsRow


class Wanted(NamedTuple):
    """Rows of a branch whose logits are wanted besides its last one.

    Attributes:
        handle: the branch.
        start: position of the first of these rows.
        size: how many.
    """

    handle: int
    start: int
    size: int


class Extra(NamedTuple):
    """What became of a Wanted.

    Attributes:
        handle: the branch.
        rows: row of the logits for each, i64 [size]; -1: not computed by this pass.
    """

    handle: int
    rows: np.ndarray


class _WithRows:
    """A plan that asks for the logits of more rows; all else is the plan's own."""

    def __init__(self, plan: Plan, rows: np.ndarray) -> None:
        self._plan = plan
        self.logits_row = np.concatenate((plan.logits_row, rows.astype(np.int32)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)


@dataclass(frozen=True, slots=True)
class Flight:
    """A forward pass that was launched; with a device its logits may not be there yet.

    Attributes:
        chosen: places of its lanes among those that waited, i64 [n]; None: all of them, in order.
        logits: fp32 [R, vocab]; a later forward pass may overwrite them.
        rows: row of each lane in logits, i64 [n]; -1: it needs more forward passes.
        held: tokens that each branch held when it was planned, i32 [n]; only where it has a row.
        plan: what it computes, closed.
        extra: rows of the logits that were wanted on top.
    """

    chosen: np.ndarray | None
    logits: torch.Tensor
    rows: np.ndarray
    held: np.ndarray
    plan: Plan
    extra: Sequence[Extra] = ()


class EveryRow:
    """A plan that wants logits after every token it computes, not only after the last ones.

    Args:
        plan: the plan; each of its branches gets logits.
        counts: tokens that it computes of each branch, i32 [n].

    Attributes:
        logits_row: rows of the first branch's tokens, then of the second's, ..., i32 [sum(counts)].
    """

    def __init__(self, plan: Plan, counts: np.ndarray) -> None:
        self._plan = plan
        ends = np.cumsum(counts)
        first = plan.logits_row - counts + 1  # a branch's tokens are one run of rows
        offsets = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        self.logits_row = (np.repeat(first, counts) + offsets).astype(np.int32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plan, name)


@dataclass(frozen=True, slots=True)
class Ahead:
    """A forward pass that was launched before the tokens that it computes were known.

    Attributes:
        plan: what was foreseen.
        logits: fp32 [R, vocab].
        rows: row in logits of each branch of the step before, i64 [n]; -1: it was not to go on.
    """

    plan: AheadPlan
    logits: torch.Tensor
    rows: np.ndarray


class ForwardPass:
    """Plans and launches forward passes, and keeps the books of the pages they write.

    Attributes:
        is_async: a pass is launched, not done, when `launch` returns.
        step_ms: times of the last passes, in ms.
        num_ahead, num_in_vain: passes launched ahead, and those of them that nobody asked for.
    """

    def __init__(self, core: Any, runner: Runner, trace: Trace, guard: PageGuard | None) -> None:
        self._core, self._runner = core, runner
        self._trace, self._guard = trace, guard
        self.is_async = runner.is_async
        self.step_ms: deque[float] = deque(maxlen=256)
        self.num_ahead = self.num_in_vain = 0

    def launch(
        self, selection: Selection, wanted: Sequence[Wanted] = (), *, every_row: bool = False
    ) -> Flight | None:
        """Start the pass over these lanes; None when one of them was pruned this moment.

        With `every_row`, `rows` and `held` of the flight have an entry for each token computed: all
        quotas must be what the lanes need.
        """
        try:
            plan: Plan = self._core.plan(selection.handles, selection.quotas)
        except StaleBranch:
            return None
        if every_row:
            plan = cast("Plan", EveryRow(plan, selection.quotas))
        if plan.num_tokens == 0:
            plan.cancel()
            return None
        self._guard_before()
        places = self._find_rows(plan, wanted)
        try:
            logits, rows = self._runner.run(_with_rows(plan, places))
        except BaseException:
            plan.cancel()
            raise
        copies = plan.copies
        if len(copies):
            self._trace.append("copy", 0, {"pages": copies.tolist()})
        held = plan.positions.take(plan.logits_row) + 1
        plan.commit()  # what is launched later reads the pages after they were written
        self._guard_after()
        self._note_time()
        lanes = len(plan.logits_row)
        extra = _extras(wanted, places, rows[lanes:]) if len(rows) > lanes else ()
        return Flight(selection.chosen, logits, rows[:lanes], held, plan, extra)

    def _find_rows(self, plan: Plan, wanted: Sequence[Wanted]) -> np.ndarray:
        """Row in the plan of every row wanted, or -1, i64 [m]: the one that writes its slot."""
        if not wanted:
            return np.zeros(0, np.int64)
        order = np.argsort(plan.slots, kind="stable")
        slots, size, found = plan.slots[order], self._core.page_size, []
        for handle, start, count in wanted:
            try:
                _, pages, _ = self._core.page_tables([handle])
            except StaleBranch:
                found.append(np.full(count, -1, np.int64))
                continue
            positions = np.arange(start, start + count)
            mine = pages[positions // size] * size + positions % size
            places = np.minimum(np.searchsorted(slots, mine), len(slots) - 1)
            found.append(np.where(slots[places] == mine, order[places], -1))
        return np.concatenate(found)

    def launch_ahead(
        self, flight: Flight, goes_on: np.ndarray, order: np.ndarray | None, drawn: torch.Tensor
    ) -> Ahead | None:
        """Start the pass behind a flight before its tokens are known; None where that can't be.

        Args:
            flight: it computes one token of each branch, and all of them get logits.
            goes_on: which branches compute another one, in the order of `drawn`, bool [n].
            order: places in the flight of the branches in the order of `drawn`; None: the same.
            drawn: their tokens, on the device, i32 [n].
        """
        if self._guard is not None:  # it would find K and V that no plan wrote
            return None
        plan = flight.plan
        of_branch = plan.logits_row if order is None else plan.logits_row[order]
        need = pages_needed(plan, of_branch[goes_on], self._core.page_size)
        free = self._core.peek_free(need)
        if len(free) < need:
            return None
        foreseen = foresee(plan, of_branch, goes_on, free, self._core.page_size)
        if foreseen is None:
            return None
        logits, rows = self._runner.run(foreseen, drawn)
        self.num_ahead += 1
        self._note_time()
        every = np.full(len(goes_on), -1, np.int64)
        every[goes_on] = rows
        return Ahead(foreseen, logits, every)

    def settle(self, ahead: Ahead, selection: Selection, places: np.ndarray) -> Flight | None:
        """The pass that was launched ahead, as the flight of these lanes; None: it is of no use.

        Args:
            ahead: the pass.
            selection: all lanes that wait, with one token each.
            places: of the lanes among the branches of the step before, i64 [n].
        """
        try:
            plan = self._core.plan(selection.handles, selection.quotas)
        except StaleBranch:
            return None
        if not ahead.plan.agrees(plan, places):
            plan.cancel()
            return None
        held = plan.positions.take(plan.logits_row) + 1
        plan.commit()
        return Flight(None, ahead.logits, ahead.rows[places], held, plan)

    def _note_time(self) -> None:
        if last_ms := self._runner.last_ms:  # of a device: of the pass before, 0 before the first
            self.step_ms.append(last_ms)

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


def _with_rows(plan: Plan, places: np.ndarray) -> Any:
    asked = places[places >= 0]
    return _WithRows(plan, asked) if len(asked) else plan


def _extras(wanted: Sequence[Wanted], places: np.ndarray, rows: np.ndarray) -> list[Extra]:
    """Rows of the logits i64 [asked] as one entry for each Wanted."""
    every = np.full(len(places), -1, np.int64)
    every[places >= 0] = rows
    ends = np.cumsum([item.size for item in wanted])
    return [
        Extra(item.handle, every[end - item.size : end])
        for item, end in zip(wanted, ends.tolist(), strict=True)
    ]


def gather_rows(rows: Sequence[LogitsRow]) -> tuple[torch.Tensor, np.ndarray]:
    """Logits fp32 [R, vocab] that hold all these rows, and the place of each in them, i64 [n]."""
    first = rows[0].tensor
    if all(row.tensor is first for row in rows):
        return first, np.array([row.row for row in rows], np.int64)
    return torch.stack([row.tensor[row.row] for row in rows]), np.arange(len(rows))
