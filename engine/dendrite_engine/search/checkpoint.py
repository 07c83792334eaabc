"""A search in a file: its tree, state, options, budget spent and what fixes its draws; no K/V.

What is stored and what a resumed search does with it is described in docs/search/checkpoints.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dendrite_engine.errors import SearchError, SnapshotRejected
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search.base import Search, State, Trial
from dendrite_engine.search.budget import Budget
from dendrite_engine.search.codec import TAG, Decoder, Encoder, known_types
from dendrite_engine.search.evaluators import LogprobEvaluator
from dendrite_engine.search.tree import Node, Tree
from dendrite_engine.snapshots.branches import describe_engine
from dendrite_engine.snapshots.container import Snapshot, write_snapshot
from dendrite_engine.tree.draws import Draws
from dendrite_engine.types import TokenAlternative

if TYPE_CHECKING:
    from dendrite_engine.search.session import SearchSession

KIND = "search"
EXTERNAL = {TAG: "external"}
# written as arrays or rebuilt; every other field of a node is stored by its value
_NODE_OWN = ("id", "parent", "children", "token_ids", "logprobs", "branch", "branch_id")
_TREE_OWN = ("nodes", "root", "by_branch", "planned", "released", "orphans", "dirty")


def option_types(kind: type[Search[Any]]) -> dict[str, type]:
    """Classes that options and nodes of an algorithm may hold."""
    return known_types(
        kind, Trial, SamplingParams, TokenAlternative, Budget, LogprobEvaluator, *kind.saved_types
    )


def state_types(search: Search[Any], state: State) -> dict[str, type]:
    """Classes that a state of `search` may hold."""
    return {**option_types(type(search)), **known_types(type(state))}


def state_fields(state: State) -> list[str]:
    """Fields of a state that are stored: all but the tree, and those marked as not to be."""
    return [
        field.name
        for field in dataclasses.fields(state)
        if field.name not in ("tree", "notes") and field.metadata.get("checkpoint", True)
    ]


# -- writing ------------------------------------------------------------------------------------


def save_search(session: SearchSession, path: str | os.PathLike[str]) -> dict[str, int]:
    """Write a session that is between two batches; see `SearchHandle.save`.

    Returns:
        `bytes` written, `nodes`, and `branches` that a resumed search will make again.

    Raises:
        SearchError: the root was pruned or has moved, or the state holds something that can't be
            stored.
    """
    state, search = session.state, session.algorithm
    tree: Tree = state.tree
    root = tree.root.branch
    if root is None or not root.is_alive:
        raise SearchError("the search's root was pruned, so there is nothing to go on from")
    if tree.root.parent is not None:
        raise SearchError(
            f"the search's root has moved to node {tree.root.id} (advance, or a later episode of "
            "LATS); a search can be saved while its root is the branch that it began from"
        )
    draws = _draws(session)
    owners = {node.branch_id: node.id for node in tree.nodes if node.branch is not None}
    encoder = Encoder(state_types(search, state), owners)
    encode = encoder.encode
    body = {
        "engine": describe_engine(root.engine),
        "algorithm": _describe_algorithm(search),
        "budget": encode(session.meter.budget, "budget"),
        "usage": encode(dataclasses.asdict(session.meter.usage()), "usage"),
        "evaluator": _describe_evaluator(session.evaluator),
        "guard": encode(session.runner.memory(), "evaluator.checkpoint()"),
        "counts": {"released": session.keeper.released, "remade": session.keeper.remade},
        "tree": _describe_tree(tree, draws, encoder),
        "state": {n: encode(getattr(state, n), f"state.{n}") for n in state_fields(state)},
    }
    written = write_snapshot(path, KIND, body, _arrays(tree))
    return {"bytes": written, "nodes": len(tree), "branches": len(draws)}


def _draws(session: SearchSession) -> dict[int, Draws]:
    """Draws by node, for nodes whose branch a resumed search needs: live, or released for a time.

    After the end those that lived before it count, so that a larger budget can go on.
    """
    if session.at_end is not None:
        return session.at_end
    return session.keeper.draws(session.state.tree)


def _describe_algorithm(search: Search[Any]) -> dict[str, Any]:
    encoder = Encoder(option_types(type(search)), {})
    options: dict[str, Any] = {}
    for field in dataclasses.fields(search):
        try:
            options[field.name] = encoder.encode(getattr(search, field.name), field.name)
        except SearchError:  # noqa: PERF203 code: a function, or an object that holds one
            options[field.name] = EXTERNAL
    return {"name": search.name, "options": options}


def _describe_evaluator(evaluator: Any) -> Any:
    """The evaluator where it is data, else only its name: it has to be given again."""
    try:
        return Encoder(known_types(LogprobEvaluator), {}).encode(evaluator, "evaluator")
    except SearchError:
        name = getattr(evaluator, "__qualname__", type(evaluator).__qualname__)
        return {**EXTERNAL, "name": name}


def _describe_tree(tree: Tree, draws: dict[int, Draws], encoder: Encoder) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(Node) if f.name not in _NODE_OWN]
    extra = {n: getattr(tree, n) for n in _slots(tree) if n not in _TREE_OWN}
    return {
        "root": tree.root.id,
        "parents": [-1 if node.parent is None else node.parent.id for node in tree.nodes],
        "children": [[child.id for child in node.children] for node in tree.nodes],
        "draws": encoder.encode({i: tuple(d) for i, d in sorted(draws.items())}, "draws"),
        "columns": {
            name: [encoder.encode(getattr(n, name), f"node[{n.id}].{name}") for n in tree.nodes]
            for name in names
        },
        "extra": {name: encoder.encode(value, f"tree.{name}") for name, value in extra.items()},
    }


def _slots(tree: Tree) -> list[str]:
    return [name for cls in type(tree).__mro__ for name in getattr(cls, "__slots__", ())]


def _arrays(tree: Tree) -> dict[str, np.ndarray]:
    root = tree.root.branch
    end = tree.root.span[1]
    ids = [] if root is None else root.token_ids[:end]
    values = [] if root is None else root.logprobs[:end]
    chain = itertools.chain.from_iterable
    return {
        "root_tokens": np.array(ids, np.int32),
        "root_logprobs": np.array([np.nan if x is None else x for x in values], np.float64),
        "tokens": np.array(list(chain(n.token_ids for n in tree.nodes)), np.int32),
        "token_counts": np.array([len(n.token_ids) for n in tree.nodes], np.int32),
        "logprobs": np.array(list(chain(n.logprobs for n in tree.nodes)), np.float64),
        "logprob_counts": np.array([len(n.logprobs) for n in tree.nodes], np.int32),
    }


# -- reading ------------------------------------------------------------------------------------


def read_tree(tree: Tree, snapshot: Snapshot, decoder: Callable[[Sequence[Node]], Decoder]) -> None:
    """Fill a fresh tree of one node with those of a file; only its root keeps a branch.

    Raises:
        SnapshotRejected: something does not add up; `field` names it.
    """
    body = snapshot.body.get("tree")
    tokens = _split(snapshot, "tokens", "token_counts", "int32")
    logprobs = _split(snapshot, "logprobs", "logprob_counts", "float64")
    if not isinstance(body, dict) or len(tokens) != len(logprobs) or not tokens:
        raise SnapshotRejected("tree", "is missing, or its columns differ in length")
    nodes = [
        Node(i, token_ids=tuple(t), logprobs=tuple(p))
        for i, (t, p) in enumerate(zip(tokens, logprobs, strict=True))
    ]
    _link(nodes, body)
    read = decoder(nodes)
    columns = body.get("columns")
    if not isinstance(columns, dict) or any(len(c) != len(nodes) for c in columns.values()):
        raise SnapshotRejected("tree.columns", f"are not of {len(nodes)} nodes each")
    known = {field.name for field in dataclasses.fields(Node)}
    for name, values in columns.items():
        if name not in known or name in _NODE_OWN:
            raise SnapshotRejected(f"tree.columns.{name}", "nodes have no such field")
        for node, value in zip(nodes, values, strict=True):
            setattr(node, name, read.decode(value, f"node[{node.id}].{name}"))
    _plant_nodes(tree, nodes, body, read)


def _plant_nodes(tree: Tree, nodes: list[Node], body: dict[str, Any], read: Decoder) -> None:
    root = nodes[body["root"]]
    branch = tree.root.branch
    tree.nodes, tree.root, tree.by_branch = nodes, root, {}
    if branch is not None:
        held = branch.num_tokens
        if root.span[1] != held:
            raise SnapshotRejected("root_tokens", f"{held}, but the root ends at {root.span[1]}")
        tree.attach(root, branch)
    tree.dirty = set(range(len(nodes)))
    for name, value in body.get("extra", {}).items():
        if name not in _slots(tree):
            raise SnapshotRejected(f"tree.extra.{name}", "trees have no such field")
        setattr(tree, name, read.decode(value, f"tree.{name}"))


def _split(snapshot: Snapshot, name: str, counts: str, dtype: str) -> list[list[Any]]:
    values, sizes = snapshot.array(name, dtype), snapshot.array(counts, "int32")
    if (sizes < 0).any() or int(sizes.sum()) != len(values):
        raise SnapshotRejected(counts, f"add up to {int(sizes.sum())} of {len(values)} {name}")
    ends = np.cumsum(sizes)
    return [values[end - size : end].tolist() for end, size in zip(ends, sizes, strict=True)]


def _link(nodes: list[Node], body: dict[str, Any]) -> None:
    """Set parents and children; every chain of parents must end, and start where the last ends."""
    size = len(nodes)
    parents, children, root = body.get("parents"), body.get("children"), body.get("root")
    if type(root) is not int or not 0 <= root < size:
        raise SnapshotRejected("tree.root", f"{root!r} is none of {size} nodes")
    if not isinstance(parents, list) or len(parents) != size:
        raise SnapshotRejected("tree.parents", f"are not those of {size} nodes")
    if not isinstance(children, list) or len(children) != size:
        raise SnapshotRejected("tree.children", f"are not those of {size} nodes")
    for node, parent, below in zip(nodes, parents, children, strict=True):
        if type(parent) is not int or not -1 <= parent < node.id:
            raise SnapshotRejected("tree.parents", f"node {node.id} can't hang below {parent!r}")
        node.parent = nodes[parent] if parent >= 0 else None
        if not isinstance(below, list) or not all(type(c) is int and 0 < c < size for c in below):
            raise SnapshotRejected("tree.children", f"of node {node.id} are {below!r}")
        node.children = [nodes[child] for child in below]


def read_draws(snapshot: Snapshot, read: Decoder, size: int) -> dict[int, Draws]:
    """Draws of the branches that are to be made again, by node id."""
    found = read.decode(snapshot.body["tree"].get("draws"), "tree.draws")
    try:
        draws = {int(node): Draws(key, int(forks)) for node, (key, forks) in found.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise SnapshotRejected("tree.draws", f"can't be read: {error}") from error
    if any(not 0 <= node < size for node in draws):
        raise SnapshotRejected("tree.draws", f"are of nodes outside 0..{size - 1}")
    return draws


def read_state(state: State, snapshot: Snapshot, read: Decoder) -> None:
    """Set the fields of a fresh state.

    Raises:
        SnapshotRejected: the file has a field that the state lacks, or lacks one.
    """
    body = snapshot.body.get("state")
    names = state_fields(state)
    if not isinstance(body, dict) or set(body) != set(names):
        have = sorted(body) if isinstance(body, dict) else body
        raise SnapshotRejected("state", f"has the fields {have}; this algorithm has {names}")
    for name in names:
        setattr(state, name, read.decode(body[name], f"state.{name}"))
