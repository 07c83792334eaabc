"""What a search does when pages run short: release what is worth least, and run a batch in parts.

A released node keeps its tokens and loses its branch; the branch is made again, with the same
draws, when the search returns to the node. So a full pool costs time and changes no result.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


class Attempt(Protocol):
    """A piece of work that may end for want of pages."""

    @property
    def short(self) -> bool:
        """Whether it did."""


W = TypeVar("W", bound=Attempt)


def run_in_parts(
    works: Sequence[W],
    *,
    admit: Callable[[Sequence[W]], list[W]],
    run: Callable[[Sequence[W]], None],
    reset: Callable[[W], None],
    give_up: Callable[[W], None],
    relieve: Callable[[Sequence[W], Sequence[W]], int],
) -> None:
    """Run works together where the pages suffice, else one part after another.

    After a part in which something fell short, branches are released and what fell short runs
    again; where none is left to release, half as many run together. It ends because between two
    works that finish only finitely many branches can be released.

    Args:
        works: what to run.
        admit: makes the branches that works begin from; returns those that it could do that for.
        run: runs a part; afterwards `short` says which works need more pages.
        reset: brings a work that fell short back to its beginning.
        give_up: ends a work for which there is no room at all; it must let go of its pages.
        relieve: releases branches in favour of works, given also those that are finished and
            whose branches may go; returns how many it released.
    """
    waiting, size = list(works), len(works)
    finished: list[W] = []
    while waiting:
        now, later = waiting[:size], waiting[size:]
        ready = admit(now)
        run(ready)
        short = [work for work in ready if work.short]
        finished += [work for work in ready if not work.short]
        done = {id(work) for work in ready} - {id(work) for work in short}
        retry = [work for work in now if id(work) not in done]
        if not retry:
            waiting = later
            continue
        if not relieve(retry, finished) and not done:
            if len(now) == 1:  # nothing is left that could make room for it
                give_up(now[0])
                waiting = later
                continue
            size = len(now) // 2
        for work in short:
            reset(work)
        waiting = retry + later


def least_worth(
    tree: Tree,
    live: Collection[int],
    protect: Collection[int],
    worth: Callable[[Node], float],
    extra: Iterable[tuple[float, Branch]] = (),
) -> Iterable[tuple[Node | None, Branch]]:
    """Branches to release, one by one: leaves of least worth first, then what they hung below.

    Nodes that the search is done with go before all others. A branch with live ones below it comes
    after them: before, it would free nothing. O(nodes), and O(log nodes) a step.

    Args:
        tree: the tree.
        live: ids of branches that may be released.
        protect: ids of branches that must not be.
        worth: worth of a node's K/V.
        extra: worth and branch of children that have no node yet.
    """
    below = [0] * len(tree.nodes)
    for node in reversed(tree.nodes):
        if node.parent is not None:
            below[node.parent.id] += below[node.id] + _is_live(node)

    def may_go(node: Node) -> bool:
        branch = node.branch
        if branch is None or node.pinned or not branch.is_alive or below[node.id]:
            return False
        return branch.id in live and branch.id not in protect

    def entry(node: Node) -> tuple[bool, float, int, Node | None, Branch | None]:
        return not node.exhausted, worth(node), -node.id, node, node.branch

    heap = [entry(node) for node in tree.nodes if may_go(node)]
    heap += [(True, value, 1 + i, None, branch) for i, (value, branch) in enumerate(extra)]
    heapq.heapify(heap)
    while heap:
        _, _, _, found, branch = heapq.heappop(heap)
        if branch is not None:
            yield found, branch
        above = None if found is None else found.parent
        while above is not None:
            below[above.id] -= 1
            if may_go(above):
                heapq.heappush(heap, entry(above))
            above = above.parent


def _is_live(node: Node) -> bool:
    return node.branch is not None and node.branch.is_alive
