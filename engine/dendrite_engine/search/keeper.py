"""The keeper: makes and prunes the branches of a search tree, and counts those it made."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

from dendrite_engine.errors import (
    BudgetExceeded,
    ContextTooLong,
    EngineClosed,
    GrammarError,
    OutOfPages,
    StaleBranch,
)
from dendrite_engine.search.base import State
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.tree.branch import Branch

    # a branch, the tokens to append to it, and their log-probabilities
    Growth = tuple[Branch, Sequence[int], Sequence[float]]

# errors that end one branch and leave the others alone
BRANCH_ERRORS = (OutOfPages, BudgetExceeded, StaleBranch, ContextTooLong, GrammarError)


class BranchKeeper:
    """Owns the branches that a search made: nothing it forked can leak.

    Args:
        engine: where the branches live.

    Attributes:
        live: branches made here and not pruned here, by id.
    """

    def __init__(self, engine: Engine) -> None:
        self.live: dict[int, Branch] = {}
        self._engine = engine

    def fork_end(self, node: Node, key: int | None = None) -> Branch:
        """Fork a node's branch where the node ends, also when somebody has extended it since.

        Args:
            node: whose branch to fork.
            key: replaces the key that the engine draws the fork's tokens by.

        Raises:
            StaleBranch: the branch was pruned, or rolled back behind the node's end.
            BudgetExceeded: the engine holds `max_branches` already.
        """
        branch, end = node.branch, node.span[1]
        if branch is None:
            raise StaleBranch(f"branch {node.branch_id} was pruned while its node was searched")
        held = branch.num_tokens
        if held < end:
            raise StaleBranch(
                f"branch {branch.id} was rolled back to {held} tokens; its node ends at {end}"
            )
        fork = branch.fork(1)[0] if held == end else branch.fork(1, at=end)[0]
        if key is not None:
            # the engine's own key counts the forks of a branch, so a second search from the same
            # root would draw other tokens than the first
            fork._key = key
        return self.keep(fork)

    def keep(self, branch: Branch) -> Branch:
        """Count a branch as made by this search."""
        self.live[branch.id] = branch
        return branch

    def extend(self, rows: Sequence[Growth]) -> list[Exception | None]:
        """Append chosen tokens to branches; returns the error of each that could not take them."""
        if not rows:
            return []
        branches, tokens, logprobs = zip(*rows, strict=True)
        wanted = [b.num_tokens + len(t) if b.is_alive else 0 for b, t, _ in rows]
        try:
            self._engine.extend(branches, tokens, logprobs)
        except BRANCH_ERRORS:
            # the batch stopped at some branch; go on one by one with those that did not get theirs
            return [self._extend_one(row, n) for row, n in zip(rows, wanted, strict=True)]
        return [None] * len(rows)

    def _extend_one(self, row: Growth, wanted: int) -> Exception | None:
        branch, tokens, logprobs = row
        try:
            if branch.num_tokens != wanted:
                self._engine.extend([branch], [tokens], [logprobs])
        except BRANCH_ERRORS as error:
            return error
        return None

    def settle(
        self, state: State, lock: AbstractContextManager[object] | None = None
    ) -> list[tuple[Node, Exception]]:
        """Make the branches of planned nodes, prune unwanted ones.

        The first planned child of a node about to be released takes its branch over; the others
        fork.

        Args:
            state: the search's state.
            lock: held while nodes change, not while the engine works.

        Returns:
            Nodes whose branch could not be made, and why; the caller drops them from the search.
        """
        guard = nullcontext() if lock is None else lock
        with guard:
            grown, failed = self._plant(state)
        errors = self.extend([(b, n.token_ids, n.logprobs) for n, b in grown])
        failed += [(n, e) for (n, _), e in zip(grown, errors, strict=True) if e is not None]
        with guard:
            unwanted = state.tree.take_unwanted()
        for branch in unwanted:
            self.prune(branch)
        return failed

    def _plant(
        self, state: State
    ) -> tuple[list[tuple[Node, Branch]], list[tuple[Node, Exception]]]:
        """Give planned nodes a branch that ends where their parent ends."""
        tree = state.tree
        families: dict[int, list[Node]] = {}
        for node in tree.planned:
            if node.parent is not None:
                families.setdefault(node.parent.id, []).append(node)
        tree.planned = []
        leaving = {node.id for node in tree.released}
        grown: list[tuple[Node, Branch]] = []
        failed: list[tuple[Node, Exception]] = []
        for parent_id, children in families.items():
            parent = tree.nodes[parent_id]
            above = parent.branch_id  # gone once a child takes the branch over
            heir = children[0] if parent_id in leaving else None
            for child in sorted(children, key=lambda c: c is heir):
                try:
                    if child is heir and parent.branch is not None:
                        tree.hand_over(parent, child)
                    else:
                        tree.attach(child, self.fork_end(parent))
                except BRANCH_ERRORS as error:  # noqa: PERF203 one failure is one child's
                    failed.append((child, error))
            grown += [(child, child.branch) for child in children if child.branch is not None]
            ids = [child.branch_id for child in children]
            state.notes.append(("expand", above, {"children": ids}))
        return grown, failed

    def regrow(self, tree: Tree, node: Node) -> bool:
        """Give a node whose branch was released a new one: its tokens forced below a live ancestor.

        Returns:
            Whether it has a live branch now; `False` where no ancestor lives or the pages don't
            suffice.
        """
        if node.branch is not None and node.branch.is_alive:
            return True
        tokens, logprobs = list(node.token_ids), list(node.logprobs)
        above = node.parent
        while above is not None and (above.branch is None or not above.branch.is_alive):
            tokens[:0], logprobs[:0] = above.token_ids, above.logprobs
            above = above.parent
        if above is None:
            return False
        try:
            fresh = self.fork_end(above)
        except BRANCH_ERRORS:
            return False
        if tokens and self.extend([(fresh, tokens, logprobs)])[0] is not None:
            self.prune(fresh)
            return False
        tree.attach(node, fresh)
        return True

    def prune(self, branch: Branch) -> int:
        """Prune a branch that was made here.

        Returns:
            Pages freed.
        """
        self.live.pop(branch.id, None)
        with suppress(EngineClosed):  # a closed engine has freed all pages already
            return branch.prune()
        return 0

    def prune_all(self, keep: Collection[int] = ()) -> int:
        """Prune every branch made here whose id is not in `keep`.

        Returns:
            Pages freed.
        """
        return sum(self.prune(b) for i, b in list(self.live.items()) if i not in keep)
