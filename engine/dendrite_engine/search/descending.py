"""Base of the searches that walk down from the root to the node that gets the next child."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from dendrite_engine.errors import SearchError
from dendrite_engine.search.checks import number, whole
from dendrite_engine.search.expanding import ExpandingSearch, ExpandingState
from dendrite_engine.search.tree import Node


@dataclass(slots=True)
class DescendingState(ExpandingState):
    """State of such a search.

    Attributes:
        leader: node with the highest score so far, `None` before the first.
    """

    leader: Node | None = None


D = TypeVar("D", bound=DescendingState)


@dataclass(frozen=True, kw_only=True)
class DescendingSearch(ExpandingSearch[D], Generic[D]):
    """Options of walking down, and what all such searches do with nodes they are done with.

    A node is exhausted when its text has ended, or all attempts were made and all children are
    exhausted; select never returns to it, so its branch is pruned unless it lies on the path to the
    leader.

    Args:
        parallel: nodes selected, and children written, in a batch.
        target: end as soon as a node's value reaches this; `None` never.
    """

    parallel: int = 4
    target: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("parallel", self.parallel, 1)
        if self.target is not None:
            number("target", self.target)

    # -- select ---------------------------------------------------------------------------------

    @abstractmethod
    def _choices(self, state: D, node: Node) -> Iterator[Node]:
        """Where to go from a node, best first: to a child, or `node` itself to expand it.

        Lazily: the first choice nearly always does.
        """

    def _select(self, state: D) -> Node | None:
        """The node to expand next; backs out of subtrees where everything is in flight."""
        root = state.tree.root
        path = [(root, self._choices(state, root))]
        while path:
            node, choices = path[-1]
            choice = next(choices, None)
            if choice is None:
                # everything below is in flight, or a smaller width left nothing to try
                self._close(state, path.pop()[0])
            elif choice is node:
                return node
            else:
                path.append((choice, self._choices(state, choice)))
        return None

    def _can_expand(self, state: D, node: Node) -> bool:
        return (
            node.branch is not None
            and not node.exhausted
            and (self.max_depth is None or node.depth < self.max_depth)
            and node.attempts < self._allowed(state, node)
        )

    def _allowed(self, state: D, node: Node) -> int:
        """Attempts at children that a node may have by now."""
        return self.attempts_allowed(state, node)

    @staticmethod
    def _count_in_flight(node: Node, step: int) -> None:
        node.in_flight += step
        above: Node | None = node
        while above is not None:
            above.virtual += step
            above = above.parent

    # -- steering -------------------------------------------------------------------------------

    def drop(self, state: D, node: Node) -> None:
        """Take a subtree out; the best node is found anew when it was in there. O(subtree)."""
        state.tree.drop(node)
        if state.leader is not None and state.leader.status == "pruned":
            self._find_leader(state)
        if node.parent is not None:
            self._close(state, node.parent)

    def check_advance(self, state: D, node: Node) -> None:
        """Require a living node below the root.

        Raises:
            SearchError: it is not.
        """
        if node.status == "pruned" or state.tree.root not in node.path()[:-1]:
            raise SearchError(
                f"can't advance to node {node.id} ({node.status}): it must be alive and below the "
                f"root, node {state.tree.root.id}"
            )

    def advance(self, state: D, node: Node) -> None:
        """Make `node` the root: all that is not below it is dropped, statistics stay. O(tree).

        What the search writes is still counted from the first root. Advance between two batches:
        outcomes under way elsewhere are lost.
        """
        self.check_advance(state, node)
        path = node.path()
        for above, kept in itertools.pairwise(path[path.index(state.tree.root) :]):
            above.exhausted = True
            for child in above.children:
                if child is not kept:
                    state.tree.drop(child)
        state.tree.root = node
        if state.leader is not None and node not in state.leader.path():
            self._find_leader(state)

    def _find_leader(self, state: D) -> None:
        below = state.tree.root.subtree()
        scored = [n for n in below if n.score is not None and n.status != "pruned"]
        state.leader = max(scored, key=lambda n: (n.score or 0.0, -n.id), default=None)

    # -- exhausted nodes ------------------------------------------------------------------------

    def _close(self, state: D, node: Node) -> None:
        """Mark nodes from `node` upwards that have nothing left to try, release their branches."""
        above: Node | None = node
        while above is not None and not above.exhausted:
            if above.in_flight or self._can_expand(state, above):
                return
            if not all(child.exhausted for child in above.children):
                return
            above.exhausted = True
            state.tree.dirty.add(above.id)
            self._release_exhausted(state, above)
            above = above.parent

    def _follow(self, state: D, child: Node) -> None:
        """Make `child` the leader when it beats it, and let go of the old leader's path."""
        old = state.leader
        if old is not None and (child.score or 0.0) <= (old.score or 0.0):
            self._release_exhausted(state, child)
            return
        state.leader = child
        for node in old.path() if old is not None else ():
            self._release_exhausted(state, node)

    def _release_exhausted(self, state: D, node: Node) -> None:
        keep = self.keep_tree or (state.leader is not None and node in state.leader.path())
        if node.exhausted and not keep:
            state.tree.release(node)

    def _check_end(self, state: D) -> None:
        leader = state.leader
        if self.target is not None and leader is not None and (leader.score or 0.0) >= self.target:
            state.reason = "target"
        elif state.tree.root.exhausted:
            state.reason = "exhausted"
