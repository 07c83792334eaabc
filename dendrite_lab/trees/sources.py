"""Where trees come from: a search, a search tree, live branches, or a whole engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.handle import SearchHandle
from dendrite_engine.search.result import SearchResult
from dendrite_engine.search.tree import Node, Tree
from dendrite_lab.trees.model import TreeData, TreeNode

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.tree.branch import Branch


def export(source: Any) -> TreeData:
    """A tree as data.

    Args:
        source: a `SearchHandle` (best while it is paused or has ended), a branch (with all live
            branches below it), a list of branches, or an `Engine` (all its live branches).

    Raises:
        InvalidArgument: it is none of these.

    Example:
        >>> export(engine).to_mermaid()   # doctest: +SKIP
    """
    if isinstance(source, SearchHandle):
        return _search(source)
    if isinstance(source, SearchResult):
        raise InvalidArgument("a SearchResult is one path; export its handle, or result.best")
    if hasattr(source, "fork_position"):
        return branches([source, *source.descendants()])
    if isinstance(source, Sequence) and not isinstance(source, str):
        return branches(list(source))
    if hasattr(source, "branches"):
        return branches(source.branches)
    raise InvalidArgument(f"expected a search handle, branches or an engine, got {source!r}")


def _search(handle: SearchHandle) -> TreeData:
    engine = handle.root.engine
    session = handle._session
    with session.lock:  # nothing changes while it is read
        best = {node.id for node in session.algorithm.best(session.state).path()}
        return search_nodes(handle.tree, engine, f"search:{handle.algorithm.name}", best)


def search_nodes(tree: Tree, engine: Engine, source: str, best: set[int]) -> TreeData:
    """The nodes of a search tree as data; the root holds all tokens of the branch searched from."""
    pieces = engine.tokenizer
    reachable = list(tree.root.subtree())
    ids = {node.id: place for place, node in enumerate(sorted(reachable, key=lambda n: n.id))}
    nodes = []
    for node in sorted(reachable, key=lambda n: n.id):
        token_ids, logprobs = _tokens(node, tree.root)
        nodes.append(
            TreeNode(
                id=ids[node.id],
                parent=-1 if node is tree.root or node.parent is None else ids[node.parent.id],
                start=0 if node is tree.root else node.start,
                token_ids=token_ids,
                logprobs=logprobs,
                text=pieces.decode(list(token_ids), skip_special=True),
                visits=node.visits,
                value=node.value if node.visits else None,
                score=node.score,
                prior=node.prior,
                status=node.status,
                finish_reason=node.finish_reason,
                best=node.id in best,
                branch_id=node.branch_id,
                extra={"ordinal": node.ordinal, "attempts": node.attempts, "pinned": node.pinned},
            )
        )
    return TreeData(nodes, source, engine.model_path.name)


def _tokens(node: Node, root: Node) -> tuple[tuple[int, ...], tuple[float | None, ...]]:
    if node is not root:
        return tuple(node.token_ids), tuple(node.logprobs)
    if node.branch is None or not node.branch.is_alive:
        return (), ()
    end = node.span[1]
    return tuple(node.branch.token_ids[:end]), tuple(node.branch.logprobs[:end])


def branches(chosen: Sequence[Branch]) -> TreeData:
    """Live branches as data: each below the nearest of its ancestors that is among them.

    A branch starts where its tokens part from those of that ancestor, which may lie inside it.

    Raises:
        InvalidArgument: there is none.
        StaleBranch: one was pruned.
    """
    if not chosen:
        raise InvalidArgument("there are no branches to export")
    order = sorted(chosen, key=lambda branch: branch.id)
    places = {branch.id: place for place, branch in enumerate(order)}
    engine = order[0].engine
    paths = [np.asarray(branch.token_ids, np.int64) for branch in order]
    nodes = []
    for place, branch in enumerate(order):
        above = branch.parent
        while above is not None and above.id not in places:
            above = above.parent
        parent = -1 if above is None else places[above.id]
        start = _shared(paths[place], paths[parent]) if parent >= 0 else 0
        own = paths[place][start:].tolist()
        nodes.append(
            TreeNode(
                id=place,
                parent=parent,
                start=start,
                token_ids=tuple(own),
                logprobs=tuple(branch.logprobs[start : start + len(own)]),
                text=engine.tokenizer.decode(own, skip_special=True),
                status="live",
                branch_id=branch.id,
                label=branch.label,
            )
        )
    return TreeData(nodes, "branches", engine.model_path.name)


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size
