"""A search in progress: algorithm, state, runner and meter, advanced a batch at a time.

The session knows no threads of its own. One thread calls `batch`, `apply` and `conclude`; any
thread may read through the methods that take the lock, which is never held while the engine works.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dendrite_engine.errors import InvalidArgument, SearchError
from dendrite_engine.search.base import Outcome, Search
from dendrite_engine.search.budget import Budget, Clock, Meter, Usage
from dendrite_engine.search.driver import Runner
from dendrite_engine.search.evaluators import Evaluator
from dendrite_engine.search.result import FoundText, SearchResult
from dendrite_engine.search.stats import SearchStats, StatsTable
from dendrite_engine.search.tree import Node, Tree
from dendrite_engine.search.work import reason_of

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.trace import Kind
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.tree.draws import Draws


class SearchEvent(NamedTuple):
    """One thing that a search did; the same goes into `engine.trace`.

    Attributes:
        kind: select, expand, evaluate, backpropagate, budget, error or search.
        branch_id: the branch that it is about.
        data: details, JSON-serialisable.
    """

    kind: Kind
    branch_id: int
    data: dict[str, Any]


EventCallback = Callable[[SearchEvent], None]


class SearchSession:
    """Runs one algorithm from one root branch.

    Args:
        engine: where the branches live.
        root: the branch to search from; it is never changed or pruned.
        algorithm: options of the search.
        budget: limits.
        evaluator: values branches, where the algorithm wants values.
        clock: seconds from any origin.
        resumed: it goes on from a checkpoint, so its budget may be spent already.

    Raises:
        InvalidArgument: the budget can't pay for the first batch.

    Attributes:
        algorithm: the options in force.
        state: tree and statistics.
        lock: held while they change.
        keeper: makes and prunes the branches.
        evaluator: as it was given.
        at_end: draws of the nodes that had a branch before `conclude` pruned most; `None` before.
    """

    def __init__(
        self,
        engine: Engine,
        root: Branch,
        algorithm: Search[Any],
        *,
        budget: Budget,
        evaluator: Evaluator | None = None,
        clock: Clock = time.monotonic,
        resumed: bool = False,
    ) -> None:
        self.algorithm = algorithm
        self.state = algorithm.init(root)
        self.lock = threading.RLock()
        self.root = root
        self.evaluator = evaluator
        self.runner = Runner(engine, root, evaluator)
        self.keeper = self.runner.keeper
        self.at_end: dict[int, Draws] | None = None
        self.keeper.lock = self.lock
        self.keeper.adopt(self.state.tree)
        self.keeper.worth = lambda node: self.algorithm.worth(self.state, node)
        self.meter = Meter(budget, clock=clock, page_size=engine.config.page_size)
        if not resumed:
            self.meter.check_start(algorithm.plan(self.state))
        self._engine = engine
        self._table = StatsTable()
        self._callbacks: list[EventCallback] = []
        self._pages_before = engine.stats().pages_live if budget.pages is not None else 0

    # -- the search's thread --------------------------------------------------------------------

    def batch(self) -> str | None:
        """Ask, run and tell one batch.

        Returns:
            Why the search ends here, or `None` where it goes on.

        Raises:
            Exception: the engine or the evaluator can't go on.
        """
        self._measure_pages()
        with self.lock:
            allowed, short = self.meter.allow(self.algorithm.plan(self.state))
            trials = self.algorithm.ask(self.state, allowed) if short is None else []
        self._flush()
        if short is not None:
            return short
        if not trials:
            return self.state.reason or "exhausted"
        before = len(self.state.tree)
        self.meter.begin()
        try:
            outcomes = self.runner.run(trials)
            with self.lock:
                self.algorithm.tell(self.state, outcomes)
            self._settle()
        finally:
            self.meter.end()
        self._account(outcomes, len(self.state.tree) - before)
        return self._verdict(outcomes)

    def _settle(self) -> None:
        """Make planned branches, prune unwanted ones; nodes that can't grow leave the search."""
        failed = self.runner.settle(self.state, self.lock)
        with self.lock:
            for node, error in failed:
                self.algorithm.lose(self.state, node, reason_of(error))
        for node, error in failed:
            self.emit("error", node.branch_id, {"node": node.id, "error": str(error)})
        if failed:
            self.runner.settle(self.state, self.lock)

    def _measure_pages(self) -> None:
        if self.meter.budget.pages is not None:
            self.meter.pages = max(0, self._engine.stats().pages_live - self._pages_before)

    def _account(self, outcomes: Sequence[Outcome], new_nodes: int) -> None:
        self.meter.nodes += new_nodes
        self.meter.iterations += len(outcomes)
        self.meter.tokens += sum(outcome.tokens_used for outcome in outcomes)
        self.meter.compute = self.meter.tokens + self.runner.evaluator_tokens
        self._measure_pages()
        for outcome in outcomes:
            if outcome.error is not None:
                branch_id = 0 if outcome.branch is None else outcome.branch.id
                data = {"trial": outcome.trial_id, "error": outcome.error}
                self.emit("error", branch_id, {**data, "finish_reason": outcome.finish_reason})
        self._flush()
        self.emit("budget", self.root.id, self.meter.columns())

    def _verdict(self, outcomes: Sequence[Outcome]) -> str | None:
        reason: str | None = self.state.reason
        no_pages = all(outcome.finish_reason == "out_of_pages" for outcome in outcomes)
        return "pages" if no_pages and reason in (None, "exhausted") else reason

    def apply(self, change: Callable[[], None]) -> None:
        """Carry out a change from outside between two batches, then do what it asks of branches."""
        with self.lock:
            change()
        self._settle()
        self._flush()

    def conclude(self, reason: str) -> SearchResult:
        """End the search: keep the path to the best node, prune the rest."""
        keeper, tree = self.keeper, self.state.tree
        with self.lock:
            self.at_end = keeper.draws(tree)
            best = self.algorithm.best(self.state)
            keep = {node.branch_id for node in best.path()}
            keep |= {
                node.branch_id
                for node in tree.nodes
                if node.pinned or (self.algorithm.keep_tree and node.branch is not None)
            }
        keeper.prune_all(keep)
        # where the pool can't hold the best path, the longest part of it that fits
        best = next((n for n in reversed(best.path()) if keeper.regrow(tree, n)), best)
        for node in tree.nodes if self.algorithm.keep_tree else ():
            keeper.revive(node)
        self._forget_pruned()
        self._flush()
        return self._result(best, reason)

    def _result(self, best: Node, reason: str) -> SearchResult:
        tokens = self.state.tree.tokens(best)
        usage = self.meter.usage()
        alive = best.branch is not None and best.branch.is_alive
        return SearchResult(
            best=best.branch if alive else None,
            text=self._engine.tokenizer.decode(tokens, skip_special=True),
            value=best.value if best.score is None else best.score,
            nodes=usage.nodes,
            iterations=usage.iterations,
            tokens=usage.tokens,
            compute=usage.compute,
            seconds=usage.seconds,
            reason=reason,
            token_ids=tuple(tokens),
            node=best,
            found=self._found(),
            _prune=self.abandon,
            released=self.keeper.released,
            remade=self.keeper.remade,
        )

    def save(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """Write everything to a file; see `SearchHandle.save`. Only between two batches."""
        from dendrite_engine.search.checkpoint import save_search

        with self.lock:
            written = save_search(self, path)
        self.emit("search", self.root.id, {"state": "saved", **written})
        return written

    def note_resumed(self, branches: int) -> None:
        """Say in the trace that the search goes on, and with how many branches made again."""
        data = {"state": "resumed", "nodes": len(self.state.tree), "branches": branches}
        self.state.note("search", self.state.tree.root, data)

    def _found(self) -> tuple[FoundText, ...]:
        algorithm, state = self.algorithm, self.state
        with self.lock:
            nodes = [
                (n, state.tree.tokens(n), algorithm.rank(state, n)) for n in algorithm.found(state)
            ]
        decode = self._engine.tokenizer.decode
        return tuple(
            FoundText(decode(tokens, skip_special=True), value, tuple(tokens), node)
            for node, tokens, value in nodes
        )

    def abandon(self) -> int:
        """Prune every branch that the search made.

        Returns:
            Pages freed.
        """
        freed = self.runner.keeper.prune_all()
        self._forget_pruned()
        return freed

    def _forget_pruned(self) -> None:
        live = self.runner.keeper.live
        with self.lock:
            for node in self.state.tree.nodes[1:]:
                if node.branch is not None and node.branch_id not in live:
                    node.branch = None
                    self.state.tree.dirty.add(node.id)

    # -- events ---------------------------------------------------------------------------------

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        """Call `callback` with every later event; returns a function that ends it."""
        self._callbacks.append(callback)

        def unsubscribe() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return unsubscribe

    def emit(self, kind: Kind, branch_id: int, data: dict[str, Any]) -> None:
        """Write an event to the engine's trace and tell the subscribers; never under the lock."""
        self._engine.trace.append(kind, branch_id, data)
        event = SearchEvent(kind, branch_id, data)
        for callback in tuple(self._callbacks):
            try:
                callback(event)
            except Exception as error:  # noqa: PERF203 a listener must not end the search
                self._callbacks.remove(callback)
                text = f"on_event callback raised {type(error).__name__}: {error}; it was removed"
                self._engine.trace.append("error", branch_id, {"error": text})

    def _flush(self) -> None:
        with self.lock:
            notes, self.state.notes = self.state.notes, []
        for kind, branch_id, data in notes:
            self.emit(kind, branch_id, data)
        pressure, self.keeper.notes = self.keeper.notes, []
        for branch_id, data in pressure:
            self.emit("search", branch_id, data)

    # -- any thread -----------------------------------------------------------------------------

    def stats_since(self, version: int) -> SearchStats:
        """Columns of the nodes that changed after `version` (-1: all). O(changed)."""
        with self.lock:
            algorithm, state = self.algorithm, self.state
            self._table.refresh(state.tree, lambda node: algorithm.rank(state, node))
            keeper = self.keeper
            return self._table.since(version, released=keeper.released, remade=keeper.remade)

    def usage(self) -> Usage:
        """What was spent so far."""
        return self.meter.usage()

    def node_of(self, branch: Branch | int) -> Node:
        """The node of a branch, given itself or its id.

        Raises:
            InvalidArgument: the branch is not part of this search.
        """
        branch_id = branch if isinstance(branch, int) else getattr(branch, "id", None)
        with self.lock:
            tree: Tree = self.state.tree
        node = tree.by_branch.get(branch_id) if branch_id is not None else None
        if node is None:
            raise InvalidArgument(f"branch {branch!r} is not part of this search")
        return node

    # -- changes, called through `apply` --------------------------------------------------------

    def set_options(self, algorithm: Search[Any], changes: dict[str, Any]) -> None:
        """Go on with other options."""
        self.algorithm = algorithm
        self.state.tree.dirty.update(range(len(self.state.tree)))  # every score may move
        self.state.note("search", self.state.tree.root, {"state": "set", "changes": changes})

    def drop(self, node: Node) -> None:
        """Take a subtree out of the search; the root's own branch stays."""
        self.state.note("search", node, {"state": "steer", "verb": "prune"})
        self.algorithm.drop(self.state, node)

    def advance(self, node: Node) -> None:
        """Make a node the root of what is searched from here on."""
        try:
            self.algorithm.advance(self.state, node)
        except SearchError as error:  # pruned since it was asked for
            self.state.note("error", node, {"error": str(error)})
        else:
            self.state.note("search", node, {"state": "steer", "verb": "advance"})

    def boost(self, node: Node, amount: float) -> None:
        """Add to the score by which a node is picked."""
        node.bonus += amount
        self.state.tree.dirty.add(node.id)
        self.state.note("search", node, {"state": "steer", "verb": "boost", "amount": amount})

    def pin(self, node: Node, pinned: bool) -> None:
        """Keep a node's branch alive whatever the search thinks of it, or no longer."""
        node.pinned = pinned
        self.state.note("search", node, {"state": "steer", "verb": "pin", "pinned": pinned})
