"""The keeper: makes, releases and prunes the branches of a search tree, and knows its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import (
    BudgetExceeded,
    ContextTooLong,
    EngineClosed,
    GrammarError,
    OutOfPages,
    StaleBranch,
)
from dendrite_engine.search.base import State
from dendrite_engine.search.pressure import least_worth
from dendrite_engine.search.tree import Node, Tree
from dendrite_engine.tree.draws import Draws, draws_of, set_draws

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
        parked: draws of branches released for want of pages, by the id that they had.
        released: branches released for want of pages so far.
        remade: branches made again so far.
        notes: `(branch id, data)` of trace events about that, not written yet.
        lock: held while nodes change.
        worth: worth of a node's K/V; what is worth least is released first.
    """

    def __init__(self, engine: Engine) -> None:
        self.live: dict[int, Branch] = {}
        self.parked: dict[int, Draws] = {}
        self.released = 0
        self.remade = 0
        self.notes: list[tuple[int, dict[str, Any]]] = []
        self.lock: AbstractContextManager[object] = nullcontext()
        self.worth = plain_worth
        self._engine = engine
        self._tree: Tree | None = None

    def adopt(self, tree: Tree) -> None:
        """Release branches of this tree where pages run short."""
        self._tree = tree

    def fork_end(self, node: Node, key: Any = None, *, counted: bool = True) -> Branch:
        """Fork a node's branch where the node ends, also when somebody has extended it since.

        Args:
            node: whose branch to fork.
            key: replaces the key that the engine draws the fork's tokens by.
            counted: whether the keys of later forks depend on this one; those of a branch made
                again must not.

        Raises:
            StaleBranch: the branch was pruned, or no longer holds the node's tokens.
            BudgetExceeded: the engine holds `max_branches` already.
        """
        branch = held_by(node)
        held, end = branch.num_tokens, node.span[1]
        before = None if counted else draws_of(branch)
        fork = branch.fork(1)[0] if held == end else branch.fork(1, at=end)[0]
        if key is not None:
            # the engine's own key counts the forks of a branch, so a second search from the same
            # root would draw other tokens than the first
            fork._key = key
        if before is not None:
            set_draws(branch, before)
        return self.keep(fork)

    def keep(self, branch: Branch) -> Branch:
        """Count a branch as made by this search."""
        self.live[branch.id] = branch
        return branch

    def extend(self, rows: Sequence[Growth]) -> list[Exception | None]:
        """Append chosen tokens to branches; returns the error of each that could not take them.

        A token whose log-probability is NaN was forced, and has none in the branch.
        """
        if not rows:
            return []
        wanted = [b.num_tokens + len(t) if b.is_alive else 0 for b, t, _ in rows]
        if any(_is_mixed(row) for row in rows):
            return [self._extend_one(row, n) for row, n in zip(rows, wanted, strict=True)]
        branches, tokens, logprobs = zip(*rows, strict=True)
        try:
            self._engine.extend(branches, tokens, [_known(row) for row in logprobs])
        except BRANCH_ERRORS:
            # the batch stopped at some branch; go on one by one with those that did not get theirs
            return [self._extend_one(row, n) for row, n in zip(rows, wanted, strict=True)]
        return [None] * len(rows)

    def _extend_one(self, row: Growth, wanted: int) -> Exception | None:
        branch, tokens, logprobs = row
        try:
            if branch.num_tokens != wanted:
                start = 0
                for forced, run in itertools.groupby(logprobs, math.isnan):
                    values = list(run)
                    part = tokens[start : start + len(values)]
                    self._engine.extend([branch], [part], [None if forced else values])
                    start += len(values)
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
        self.adopt(state.tree)
        with guard:
            grown, failed = self._plant(state)
        lost = self._extend_nodes(grown)
        with guard:
            unwanted = state.tree.take_unwanted()
        for branch in unwanted:
            self.prune(branch)
        short = [pair for pair, error in lost if isinstance(error, OutOfPages)]
        failed += [(n, e) for (n, _), e in lost if not isinstance(e, OutOfPages)]
        if short:  # again, with the pages of what is worth less; else they wait for their turn
            need = sum(self.pages_for(len(node.token_ids)) for node, _ in short)
            self.relieve(need, {branch.id for _, branch in short})
            for (node, branch), error in self._extend_nodes(short):
                if isinstance(error, OutOfPages):
                    self._park([(node, branch)])
                else:
                    failed.append((node, error))
        return failed

    def _extend_nodes(
        self, grown: Sequence[tuple[Node, Branch]]
    ) -> list[tuple[tuple[Node, Branch], Exception]]:
        """Append the tokens of nodes to their branches; returns those that could not take them.

        A branch that was released again before it got its tokens is made anew with them.
        """
        grown = [pair for pair in grown if pair[1].id not in self.parked]
        errors = self.extend([(b, n.token_ids, n.logprobs) for n, b in grown])
        return [(pair, e) for pair, e in zip(grown, errors, strict=True) if e is not None]

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
            self.revive(parent, make_room=True)
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
            fresh = self.fork_end(above, counted=False)
        except BRANCH_ERRORS:
            return False
        if tokens and self.extend([(fresh, tokens, logprobs)])[0] is not None:
            self.prune(fresh)
            return False
        with self.lock:
            tree.attach(node, fresh)
        return True

    # -- when pages run short -------------------------------------------------------------------

    def pages_for(self, tokens: int) -> int:
        """Pages that a fork takes for so many tokens, the copy of a partial one included."""
        page_size: int = self._engine.config.page_size
        return -(-tokens // page_size) + 1

    def relieve(
        self, pages: int, protect: Collection[int], extra: Iterable[tuple[float, Branch]] = ()
    ) -> int:
        """Release the branches worth least until so many pages are free of them.

        Args:
            pages: wanted.
            protect: ids of branches to leave alone.
            extra: worth and branch of children that have no node yet.

        Returns:
            Branches released; 0 where there is nothing left to release.
        """
        if self._tree is None:
            return 0
        chosen: list[tuple[Node | None, Branch]] = []
        freed = 0
        with self.lock:
            for node, branch in least_worth(self._tree, self.live, protect, self.worth, extra):
                if not branch.is_alive:
                    continue
                chosen.append((node, branch))
                freed += self._park(chosen[-1:])
                if freed >= pages:
                    break
        return len(chosen)

    def _park(self, released: Sequence[tuple[Node | None, Branch]]) -> int:
        """Release branches, to be made again when the search returns to them; returns pages."""
        freed = 0
        for _, branch in released:
            draws = draws_of(branch)
            freed += self.prune(branch)
            self.parked[branch.id] = draws
        self.released += len(released)
        nodes = [node.id for node, _ in released if node is not None]
        data = {"state": "released", "branches": len(released), "nodes": nodes, "pages": freed}
        self.notes.append((released[0][1].id, data))
        return freed

    def revive(self, node: Node, *, make_room: bool = False) -> bool:
        """Make the branch of a released node again, with the draws that it had.

        Args:
            node: any node; one that was not released is left as it is.
            make_room: release others for it where the pages don't suffice.

        Returns:
            Whether the node's branch can be forked.
        """
        gone = node.branch
        if gone is None or gone.is_alive or gone.id not in self.parked or self._tree is None:
            return gone is not None and gone.is_alive
        while not self.regrow(self._tree, node):
            need = self.pages_for(self.missing_tokens(node))
            protect = {step.branch_id for step in node.path()}
            if not make_room or not self.relieve(need, protect):
                return False
        self._revived(node, self.parked.pop(gone.id))
        return True

    def _revived(self, node: Node, draws: Draws) -> None:
        if node.branch is not None:
            set_draws(node.branch, draws)
        self.remade += 1
        self.notes.append((node.branch_id, {"state": "remade", "node": node.id}))

    def missing_tokens(self, node: Node) -> int:
        """Tokens to compute again before the node has a branch; 0 where it has one."""
        missing, above = 0, node
        while above.parent is not None and (above.branch is None or not above.branch.is_alive):
            missing += len(above.token_ids)
            above = above.parent
        return missing

    def draws(self, tree: Tree) -> dict[int, Draws]:
        """Draws by node id, of nodes that have a branch or had it released for a time."""
        found: dict[int, Draws] = {}
        for node in tree.nodes:
            branch = node.branch
            if branch is not None and branch.is_alive:
                found[node.id] = draws_of(branch)
            elif branch is not None and branch.id in self.parked:
                found[node.id] = self.parked[branch.id]
        return found

    def remake(self, tree: Tree, node: Node, draws: Draws) -> None:
        """Give a node of a checkpoint its branch, or let it count as released for want of pages."""
        if self.regrow(tree, node) or tree.root.branch is None:
            return
        stand_in = tree.root.branch.fork(1)[0]  # takes no page
        stand_in.prune()
        self.parked[stand_in.id] = draws
        self.released += 1
        tree.attach(node, stand_in)

    def prune(self, branch: Branch) -> int:
        """Prune a branch that was made here.

        Returns:
            Pages freed.
        """
        self.live.pop(branch.id, None)
        self.parked.pop(branch.id, None)
        with suppress(EngineClosed):  # a closed engine has freed all pages already
            return branch.prune()
        return 0

    def prune_all(self, keep: Collection[int] = ()) -> int:
        """Prune every branch made here whose id is not in `keep`.

        Returns:
            Pages freed.
        """
        return sum(self.prune(b) for i, b in list(self.live.items()) if i not in keep)


def plain_worth(node: Node) -> float:
    """Worth of a node where no algorithm says otherwise; see `Search.worth`."""
    return node.value if node.visits else node.score or 0.0


def held_by(node: Node) -> Branch:
    """The node's branch, which still holds the node's tokens; it may go on after them.

    Raises:
        StaleBranch: it was pruned, or somebody else has changed it before the node's end.
    """
    branch, end = node.branch, node.span[1]
    if branch is None:
        raise StaleBranch(f"branch {node.branch_id} was pruned while its node was searched")
    held = branch.num_tokens
    if held < end:
        raise StaleBranch(
            f"branch {branch.id} was rolled back to {held} tokens; its node ends at {end}"
        )
    own = branch._tokens(node.start)[: len(node.token_ids)] if node.token_ids else []
    if tuple(own) != node.token_ids:
        raise StaleBranch(
            f"branch {branch.id} was rolled back and extended: its tokens from {node.start} to "
            f"{end} are no longer those of its node"
        )
    return branch


def _known(logprobs: Sequence[float]) -> Sequence[float] | None:
    """Log-probabilities of chosen tokens; `None` for a run of forced ones."""
    return None if math.isnan(logprobs[0]) else logprobs


def _is_mixed(row: Growth) -> bool:
    """Whether some of the tokens were forced and some chosen."""
    forced = [math.isnan(value) for value in row[2]]
    return any(forced) and not all(forced)
