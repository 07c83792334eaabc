"""The runner's answer to a shortage of pages: what works need, and whose branches go for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dendrite_engine.search.base import Outcome
from dendrite_engine.tree.draws import draws_of

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.search.keeper import BranchKeeper
    from dendrite_engine.search.work import Work


class Shortage:
    """The steps that `pressure.run_in_parts` needs, for the works of a runner.

    Args:
        engine: whose pages they are.
        keeper: releases branches and makes them again.
    """

    def __init__(self, engine: Engine, keeper: BranchKeeper) -> None:
        self._engine = engine
        self._keeper = keeper

    def admit(self, works: Sequence[Work]) -> list[Work]:
        """Works whose node has its branch, made again where it had been released."""
        keeper = self._keeper
        if not keeper.released:  # never short of pages so far: nothing to foresee
            return list(works)
        nodes = {work.trial.node.id: work.trial.node for work in works}
        need = self._need(works) - self._available()
        if need > 0:  # rather than to find out half-way through the decoding
            keeper.relieve(need, {node.branch_id for node in nodes.values()})
        lost = {
            node.id
            for node in nodes.values()
            if node.branch is not None
            and node.branch.id in keeper.parked
            and not keeper.revive(node)
        }
        return [work for work in works if work.trial.node.id not in lost]

    def reset(self, work: Work) -> None:
        """Bring a work that fell short of pages back to its beginning; its draws stay."""
        branch = work.outcome.branch
        if branch is not None:
            if work.key is None and branch.is_alive:
                work.key = draws_of(branch).key
            self._keeper.prune(branch)
        work.outcome = Outcome(work.trial.id)
        work.short_rollout = False

    def give_up(self, work: Work) -> None:
        """End a work for which nothing can make room, and let go of its pages."""
        outcome = work.outcome
        if work.short_rollout and outcome.finish_reason != "out_of_pages":
            return  # its child was made, and valued by what there was of the rollout
        if outcome.finish_reason is None:
            outcome.finish_reason = "out_of_pages"
            outcome.error = f"node {work.trial.node.id} can't be made again: no pages"
        if outcome.branch is not None:
            self._keeper.prune(outcome.branch)

    def relieve(self, works: Sequence[Work], finished: Sequence[Work]) -> int:
        """Release branches in favour of works; children of finished ones may go as well."""
        protect = {work.trial.node.branch_id for work in works}
        extra = [
            (work.outcome.value or 0.0, work.outcome.branch)
            for work in finished
            if work.outcome.branch is not None and work.outcome.branch.is_alive
        ]
        return self._keeper.relieve(self._need(works), protect, extra)

    def _need(self, works: Sequence[Work]) -> int:
        """Pages that these works take at most."""
        keeper = self._keeper
        nodes = {work.trial.node.id: work.trial.node for work in works}
        missing = [tokens for n in nodes.values() if (tokens := keeper.missing_tokens(n))]
        return sum(keeper.pages_for(tokens) for tokens in [*missing, *(w.tokens for w in works)])

    def _available(self) -> int:
        stats = self._engine.stats()
        return stats.pages_total - stats.pages_live  # cached pages are given back when needed
