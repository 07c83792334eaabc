"""From data back into the engine: a search tree to look at, or live branches to go on with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.tree import STATUSES, Node, Tree
from dendrite_lab.trees.model import TreeData, TreeNode

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.tree.branch import Branch


def search_tree(data: TreeData) -> Tree:
    """A search `Tree` with the same ids and statistics and no branches, for viewing and analysis.

    Raises:
        InvalidArgument: the data has several roots.
    """
    roots = data.roots()
    if len(roots) != 1:
        raise InvalidArgument(f"a search tree has one root; these data have {len(roots)}")
    root = roots[0]
    stand_in: Any = SimpleNamespace(id=0, num_tokens=root.start + len(root.token_ids))
    tree = Tree(stand_in)
    tree.by_branch.clear()
    tree.root.branch = None
    for node in data.nodes:
        above = tree.nodes[node.parent] if node is not root else None
        logprobs = tuple(0.0 if x is None else x for x in node.logprobs)
        made = tree.root if above is None else tree.add(above, node.token_ids, logprobs)
        _fill(made, node)
    tree.planned.clear()
    return tree


def _fill(made: Node, node: TreeNode) -> None:
    made.status = node.status if node.status in STATUSES else "open"
    made.visits = node.visits
    made.value_sum = (node.value or 0.0) * node.visits
    made.score, made.finish_reason = node.score, node.finish_reason
    made.prior = 1.0 if node.prior is None else node.prior
    made.branch_id = node.branch_id


def grow(data: TreeData, engine: Engine) -> dict[int, Branch]:
    """Make every node a live branch that holds the whole path down to it; K/V when next needed.

    Children fork from their parent's branch, so pages are shared as the tree says. Nodes without
    tokens are encoded from their text by the engine's tokenizer.

    Args:
        data: the tree; its token ids have to be of the engine's model.
        engine: where they grow.

    Returns:
        Branches by node id.

    Raises:
        InvalidArgument: a root is empty, or a token id is outside the vocabulary.
        OutOfPages, BudgetExceeded: they don't all fit; those made already are pruned.
    """
    made: dict[int, Branch] = {}
    try:
        for node in data.nodes:
            made[node.id] = branch = _branch(node, made, engine)
            branch.label = node.label
    except BaseException:
        for branch in reversed(list(made.values())):
            branch.prune()
        raise
    return made


def _branch(node: TreeNode, made: dict[int, Branch], engine: Engine) -> Branch:
    ids = list(node.token_ids) or (engine.tokenizer.encode(node.text) if node.text else [])
    if node.parent < 0:
        if not ids:
            raise InvalidArgument(f"node {node.id} is a root without tokens and text")
        return engine.prompt(ids)
    above = made[node.parent]
    # where only text is known, starts are counted in no tokens of this model
    cut = 0 < node.start < above.num_tokens and bool(node.token_ids)
    branch = above.fork(1, at=node.start)[0] if cut else above.fork(1)[0]
    logprobs = node.logprobs if len(node.logprobs) == len(ids) else ()
    known = bool(logprobs) and all(x is not None for x in logprobs)
    try:
        if ids:
            branch.extend(ids, cast("list[float]", list(logprobs)) if known else None)
    except BaseException:
        branch.prune()
        raise
    return branch
