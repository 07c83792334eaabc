"""The handle of a running search: wait, pause, step, stop, steer and watch."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Literal

from dendrite_engine.errors import SearchError
from dendrite_engine.search.base import Search
from dendrite_engine.search.budget import Budget, Usage
from dendrite_engine.search.checks import flag, number, whole
from dendrite_engine.search.result import SearchResult
from dendrite_engine.search.saves import SaveQueue, refuse
from dendrite_engine.search.session import EventCallback, SearchSession
from dendrite_engine.search.stats import SearchStats
from dendrite_engine.search.tree import Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

HandleState = Literal["running", "paused", "done", "failed", "stopped"]


class SearchHandle:
    """Controls a search that runs on a thread of its own. Made by `Engine.search`.

    All methods may be called from any thread and return at once, but for `wait`, `wait_paused`.
    Those that change the search take effect before its next batch, so at the next select.

    Example:
        >>> handle = engine.search(root, MCTS(width=3))      # doctest: +SKIP
        >>> handle.pause(); handle.step(); handle.resume()   # doctest: +SKIP
        >>> print(handle.wait().text)                        # doctest: +SKIP
    """

    def __init__(self, session: SearchSession, *, paused: bool = False) -> None:
        self._session = session
        self._cond = threading.Condition()  # guards everything below
        self._paused = paused
        self._permits = 0  # batches that may run although paused
        self._stepping = False  # one of them is running
        self._parked = False  # the thread waits, nothing is in flight
        self._stopping = False
        self._changes: list[Callable[[], None]] = []
        self._options = session.algorithm  # with changes that are still to be applied
        self._applying = False  # changes are being carried out
        self._saves = SaveQueue()
        self._final: HandleState | None = None
        self._outcome: SearchResult | BaseException | None = None
        self._future: concurrent.futures.Future[SearchResult] = concurrent.futures.Future()
        self._future.set_running_or_notify_cancel()  # a cancelled await must not cancel the search
        self._thread = threading.Thread(
            target=self._run, name=f"dendrite-search-{session.root.id}", daemon=True
        )

    def start(self) -> SearchHandle:
        """Begin; called once by `start_search`."""
        self._thread.start()
        return self

    # -- outcome --------------------------------------------------------------------------------

    @property
    def state(self) -> HandleState:
        """`running`, `paused`, `done`, `stopped` (by `stop`) or `failed`."""
        with self._cond:
            if self._final is not None:
                return self._final
            held = self._paused and not self._permits and not self._stepping
            return "paused" if held else "running"

    @property
    def result(self) -> SearchResult:
        """What the search found.

        Raises:
            SearchError: it has not ended.
            Exception: what made it fail.
        """
        with self._cond:
            outcome = self._outcome
        if outcome is None:
            raise SearchError("the search has not ended; call wait(), or stop() it")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def wait(self, timeout: float | None = None) -> SearchResult:
        """Block until the search ends and return its result. A paused search does not end.

        Args:
            timeout: seconds to wait at most; `None` waits for ever.

        Raises:
            TimeoutError: the search had not ended by then; it goes on.
            SearchError: called from the search's own thread, which would wait for itself.
            Exception: what made the search fail.
        """
        if threading.current_thread() is self._thread:
            return self.result
        try:
            return self._future.result(timeout)
        except concurrent.futures.TimeoutError:
            if self._future.done():  # the search itself failed with a TimeoutError
                raise
            raise TimeoutError(f"the search did not end within {timeout} s; it goes on") from None

    def __await__(self) -> Generator[Any, None, SearchResult]:
        return asyncio.shield(asyncio.wrap_future(self._future)).__await__()

    # -- control --------------------------------------------------------------------------------

    def pause(self) -> None:
        """Hold the search after the batch in flight; `wait_paused` waits for that."""
        with self._cond:
            self._paused, self._permits, self._stepping = True, 0, False
            self._cond.notify_all()

    def resume(self) -> None:
        """Let a paused search go on."""
        with self._cond:
            self._paused, self._permits, self._stepping = False, 0, False
            self._cond.notify_all()

    def step(self, n: int = 1) -> None:
        """Run `n` batches and pause; `wait_paused` waits for the pause.

        Raises:
            InvalidArgument: n is not a positive integer.
        """
        whole("n", n, 1)
        with self._cond:
            self._permits = self._permits + n if self._paused else n
            self._paused = True
            self._cond.notify_all()

    def wait_paused(self, timeout: float | None = None) -> bool:
        """Block until nothing is in flight: the search is paused or has ended.

        Returns:
            Whether that is so; `False` when `timeout` seconds passed before.
        """
        with self._cond:
            return self._cond.wait_for(self._is_quiet, timeout)

    def _is_quiet(self) -> bool:
        idle = self._parked and self._paused and not self._permits and not self._stopping
        return self._final is not None or (idle and not self._changes and not self._applying)

    def stop(self) -> None:
        """End the search after the forward in flight; its result is the best found so far."""
        with self._cond:
            if self._final is not None or self._stopping:
                return
            self._stopping = True
            self._cond.notify_all()
        self._session.runner.cancel()

    def save(self, path: str | os.PathLike[str]) -> dict[str, int]:
        """Write the search to one file, from which `Engine.resume_search` goes on.

        While the search runs it is written between two batches. One that has ended can be saved as
        well, to go on with a larger budget. A crash while saving leaves the old file whole.

        Returns:
            `bytes` written, `nodes`, and `branches` that a resumed search will make again.

        Raises:
            SearchError: the state holds something that can't be stored, the search failed, or this
                is its own thread, which would wait for itself.
        """
        if threading.current_thread() is self._thread:
            raise SearchError("save: a search can't wait for itself; call it from another thread")
        done = self._saves.add(path)
        with self._cond:
            self._cond.notify_all()
        return done.result()

    # -- steering -------------------------------------------------------------------------------

    def set(self, **changes: Any) -> bool:
        """Change options of the algorithm while it runs, such as `exploration` and `width`.

        Returns:
            Whether the search was still there to take them.

        Raises:
            InvalidArgument: an option is unknown, fixed while the search runs, or has a bad value.
        """
        with self._cond:
            self._options = options = self._options.with_options(**changes)
            return self._enqueue(lambda: self._session.set_options(options, changes))

    def prune(self, branch: Branch | int) -> bool:
        """Take a branch and all below it out of the search and prune it.

        Returns:
            Whether the search was still there to take it.

        Raises:
            InvalidArgument: the branch is not part of this search, or is its root.
        """
        node = self._session.node_of(branch)
        if node.parent is None:
            raise SearchError("the root of a search can't be pruned out of it; stop() the search")
        return self._enqueue(lambda: self._session.drop(node))

    def advance(self, branch: Branch | int) -> bool:
        """Go on below a branch only, with what is known there; all else is pruned.

        Returns:
            Whether the search was still there to take it.

        Raises:
            InvalidArgument: the branch is not part of this search.
            SearchError: the algorithm can't, or the branch is no longer below its root.
        """
        node = self._session.node_of(branch)
        self._session.algorithm.check_advance(self._session.state, node)
        return self._enqueue(lambda: self._session.advance(node))

    def boost(self, branch: Branch | int, amount: float) -> bool:
        """Add `amount` to the score by which a branch is picked (UCT units; negative to avoid it).

        Returns:
            Whether the search was still there to take it.

        Raises:
            InvalidArgument: the branch is not part of this search, or the amount is not finite.
        """
        number("amount", amount)
        node = self._session.node_of(branch)
        return self._enqueue(lambda: self._session.boost(node, amount))

    def pin(self, branch: Branch | int, pinned: bool = True) -> bool:
        """Keep a branch alive whatever the search thinks of it, also after its end; or no longer.

        Returns:
            Whether the search was still there to take it.

        Raises:
            InvalidArgument: the branch is not part of this search.
        """
        flag("pinned", pinned)
        node = self._session.node_of(branch)
        return self._enqueue(lambda: self._session.pin(node, pinned))

    def _enqueue(self, change: Callable[[], None]) -> bool:
        with self._cond:
            if self._final is not None:
                return False
            self._changes.append(change)
            self._cond.notify_all()
            return True

    # -- watching -------------------------------------------------------------------------------

    @property
    def root(self) -> Branch:
        """The branch that the search started from."""
        return self._session.root

    @property
    def algorithm(self) -> Search[Any]:
        """The options in force."""
        return self._session.algorithm

    @property
    def budget(self) -> Budget:
        """The limits."""
        return self._session.meter.budget

    @property
    def best(self) -> Branch | None:
        """Branch of the best node so far, where it is alive."""
        with self._session.lock:
            branch = self._session.algorithm.best(self._session.state).branch
        return branch if branch is not None and branch.is_alive else None

    @property
    def tree(self) -> Tree:
        """The search tree; walk it while the search is paused or has ended, else read `stats()`."""
        tree: Tree = self._session.state.tree
        return tree

    def usage(self) -> Usage:
        """What the search has spent so far, in the units of its budget."""
        return self._session.usage()

    def stats(self) -> SearchStats:
        """Visits, values, priors and UCT scores of all nodes, as columns. O(changed) and a copy."""
        return self._session.stats_since(-1)

    def changed_since(self, version: int) -> SearchStats:
        """`stats()` of the nodes that changed after the reading with this `version`. O(changed)."""
        return self._session.stats_since(version)

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        """Call `callback(SearchEvent)` for what the search does from now on, on its thread.

        A callback that raises is removed and logged; the search goes on.

        Returns:
            A function that ends the subscription.
        """
        return self._session.subscribe(callback)

    def __repr__(self) -> str:
        usage = self.usage()
        return (
            f"SearchHandle({self.algorithm.name}, {self.state}, {usage.nodes} nodes, "
            f"{usage.tokens} tokens, {usage.seconds:.1f} s)"
        )

    # -- the search's thread --------------------------------------------------------------------

    def _run(self) -> None:
        session = self._session
        try:
            start = {"state": "running", "algorithm": session.algorithm.name}
            session.emit("search", session.root.id, start)
            reason = self._loop()
            self._saves.serve(session.save)  # the branches still live
            result = session.conclude(reason)
            final: HandleState = "stopped" if reason == "stopped" else "done"
            self._end(final, result, {"reason": reason, "best": result.node.branch_id})
        except BaseException as error:  # handed to whoever waits
            session.abandon()
            self._end("failed", error, {"error": f"{type(error).__name__}: {error}"})

    def _loop(self) -> str:
        """Run batches as they are allowed; returns why the search ends."""
        while self._gate():
            reason = self._session.batch()
            with self._cond:
                self._stepping = False
            if reason is not None:
                return reason
        return "stopped"

    def _gate(self) -> bool:
        """Apply changes and wait for leave to run a batch; `False` when the search is to stop."""
        while True:
            changes, verdict = self._next()
            for change in changes:
                self._session.apply(change)
            if changes:
                with self._cond:
                    self._applying = False
                    self._cond.notify_all()
            if verdict == "save":
                self._saves.serve(self._session.save)
            elif verdict in ("paused", "running"):
                self._session.emit("search", self._session.root.id, {"state": verdict})
            elif not changes:
                return verdict == "go"

    def _next(self) -> tuple[list[Callable[[], None]], str]:
        """What the thread does next; waits on the condition where there is nothing."""
        with self._cond:
            while True:
                if self._changes:
                    changes, self._changes, self._applying = self._changes, [], True
                    return changes, "change"
                if self._saves:
                    return [], "save"
                if self._stopping:
                    return [], "stop"
                if not self._paused or self._permits:
                    if self._parked:
                        self._parked = False
                        return [], "running"
                    if self._paused:
                        self._permits -= 1
                        self._stepping = True
                    return [], "go"
                if not self._parked:
                    self._parked = True
                    self._cond.notify_all()
                    return [], "paused"
                self._cond.wait()

    def _end(
        self, final: HandleState, outcome: SearchResult | BaseException, data: dict[str, Any]
    ) -> None:
        """Publish the outcome: first the state, then the event, then to those who wait."""
        with self._cond:
            self._final, self._outcome = final, outcome
        self._saves.close(refuse if final == "failed" else self._session.save)
        self._session.emit("search", self._session.root.id, {"state": final, **data})
        with self._cond:
            self._cond.notify_all()
        if isinstance(outcome, BaseException):
            self._future.set_exception(outcome)
        else:
            self._future.set_result(outcome)
