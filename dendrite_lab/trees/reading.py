"""Reading trees: our JSON, saved searches and branches, and the TreeLog of llm-reasoners."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from dendrite_engine.errors import InvalidArgument, SnapshotRejected
from dendrite_lab.trees.model import SCHEMA, VERSION, TreeData, TreeNode

_KINDS: dict[str, tuple[type, ...]] = {
    "id": (int,),
    "parent": (int,),
    "start": (int,),
    "text": (str,),
    "visits": (int,),
    "value": (int, float, type(None)),
    "score": (int, float, type(None)),
    "prior": (int, float, type(None)),
    "status": (str,),
    "finish_reason": (str, type(None)),
    "best": (bool,),
    "branch_id": (int,),
    "label": (str,),
    "extra": (dict,),
}


def read(path: str | Path) -> TreeData:
    """A tree from a file: our JSON, a TreeLog, or what `engine.save` or `handle.save` wrote.

    Files of the engine hold tokens and no text, so their nodes have empty texts.

    Raises:
        InvalidArgument: there is no such file.
        SnapshotRejected: it is damaged, newer, or of an unknown format; `field` says which.
    """
    file = Path(path)
    if not file.is_file():
        raise InvalidArgument(f"path: there is no file {file}")
    data = file.read_bytes()
    if data.lstrip()[:1] in (b"{", b"["):
        text = _decoded(data)
        body = _parsed(text)
        return _treelog(body, -1, None) if _is_treelog(body) else _ours(body)
    from dendrite_lab.trees.snapshots import read_snapshot_tree

    return read_snapshot_tree(file)


def from_json(text: str) -> TreeData:
    """The tree that `TreeData.to_json` wrote.

    Raises:
        SnapshotRejected: it isn't one, or of a newer version; `field` names what is wrong.
    """
    return _ours(_parsed(text))


def from_treelog(text: str, *, snapshot: int = -1, text_key: str | None = None) -> TreeData:
    """A tree from the TreeLog JSON of llm-reasoners (`str(TreeLog)`, what its visualiser loads).

    A TreeLog is `{"logs": [snapshot, ...]}`, one snapshot an iteration, each with `nodes` and
    `edges` by id. A node has `id`, `data` (its state as a dict) and `selected_edge`; an edge has
    `id`, `source`, `target` and `data` (`Q`, `reward` and more). Q of the edge above a node becomes
    its `value`, the reward its `score`, the chain of selected edges from the root the best path.
    All data are kept in `extra`.

    Args:
        text: the JSON.
        snapshot: which one to take; -1 is the last.
        text_key: key of a node's data that holds its text; by default all of its data are shown.

    Raises:
        SnapshotRejected: it isn't a tree; `field` names what is wrong.
        InvalidArgument: there is no such snapshot.
    """
    return _treelog(_parsed(text), snapshot, text_key)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SnapshotRejected("format", f"is no UTF-8 text: {error}") from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SnapshotRejected("format", f"is no JSON: {error}") from error


# -- our JSON -----------------------------------------------------------------------------------


def _ours(body: Any) -> TreeData:
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        raise SnapshotRejected("schema", f"is not {SCHEMA!r}")
    if body.get("version") != VERSION:
        raise SnapshotRejected(
            "version", f"{body.get('version')}; this dendrite_lab reads version {VERSION}"
        )
    rows = body.get("nodes")
    if not isinstance(rows, list):
        raise SnapshotRejected("nodes", "is no list")
    nodes = [_node(row, place) for place, row in enumerate(rows)]
    ends: list[int] = []
    for node in nodes:
        above = ends[node.parent] if node.parent >= 0 else 0
        if not 0 <= node.start <= above:
            raise SnapshotRejected(
                f"nodes[{node.id}].start", f"is {node.start}; the path above ends at {above}"
            )
        ends.append(node.start + len(node.token_ids))
    return TreeData(nodes, str(body.get("source", "")), str(body.get("model", "")))


def _node(row: Any, place: int) -> TreeNode:
    where = f"nodes[{place}]"
    known = {field.name for field in dataclasses.fields(TreeNode)}
    if not isinstance(row, dict) or set(row) != known:
        raise SnapshotRejected(where, f"must have the fields {', '.join(sorted(known))}")
    for name, kinds in _KINDS.items():
        if not isinstance(row[name], kinds) or (isinstance(row[name], bool) != (kinds == (bool,))):
            raise SnapshotRejected(f"{where}.{name}", f"is {row[name]!r}")
    if row["id"] != place or not -1 <= row["parent"] < place:
        raise SnapshotRejected(f"{where}.parent", f"{row['id']} below {row['parent']}")
    ids, logprobs = row["token_ids"], row["logprobs"]
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise SnapshotRejected(f"{where}.token_ids", "are no token ids")
    numbers = (int, float, type(None))
    if not isinstance(logprobs, list) or not all(isinstance(x, numbers) for x in logprobs):
        raise SnapshotRejected(f"{where}.logprobs", "are no numbers")
    return TreeNode(**{**row, "token_ids": tuple(ids), "logprobs": tuple(logprobs)})


# -- llm-reasoners ------------------------------------------------------------------------------


def _is_treelog(body: Any) -> bool:
    return isinstance(body, dict) and "logs" in body and "schema" not in body


def _treelog(body: Any, snapshot: int, text_key: str | None) -> TreeData:
    if not _is_treelog(body) or not isinstance(body["logs"], list):
        raise SnapshotRejected("logs", "is no list of snapshots")
    count = len(body["logs"])
    if not -count <= snapshot < count:
        raise InvalidArgument(f"snapshot must be in {-count}..{count - 1}, got {snapshot}")
    where = f"logs[{snapshot % count}]"
    chosen = body["logs"][snapshot]
    if not isinstance(chosen, dict):
        raise SnapshotRejected(where, "is no snapshot")
    states = _entries(chosen.get("nodes"), f"{where}.nodes", ("id",))
    edges = _entries(chosen.get("edges"), f"{where}.edges", ("id", "source", "target"))
    below: dict[Any, list[dict[str, Any]]] = {}
    for edge in edges.values():
        if edge["source"] not in states or edge["target"] not in states:
            raise SnapshotRejected(f"{where}.edges", f"edge {edge['id']} leads nowhere")
        below.setdefault(edge["source"], []).append(edge)
    targets = [edge["target"] for edge in edges.values()]
    roots = [key for key in states if key not in set(targets)]
    if len(roots) != 1 or len(targets) != len(set(targets)):
        raise SnapshotRejected(f"{where}.edges", f"make no tree: the roots are {roots}")
    nodes = _walk(states, below, roots[0], text_key)
    if len(nodes) != len(states):
        raise SnapshotRejected(f"{where}.edges", f"reach {len(nodes)} of {len(states)} nodes")
    return TreeData(nodes, "llm-reasoners")


def _entries(values: Any, where: str, needed: tuple[str, ...]) -> dict[Any, dict[str, Any]]:
    """Nodes or edges by their own id; the file has them by the id as text."""
    if not isinstance(values, dict):
        raise SnapshotRejected(where, "is no object")
    for key, entry in values.items():
        if not isinstance(entry, dict) or any(type(entry.get(n)) is not int for n in needed):
            raise SnapshotRejected(f"{where}.{key}", f"needs whole numbers {', '.join(needed)}")
    return {entry["id"]: entry for entry in values.values()}


def _walk(
    states: dict[Any, dict[str, Any]],
    below: dict[Any, list[dict[str, Any]]],
    root: Any,
    text_key: str | None,
) -> list[TreeNode]:
    """Nodes, parents first, the path of selected edges marked."""
    nodes: list[TreeNode] = []
    stack: list[tuple[Any, int, dict[str, Any], bool]] = [(root, -1, {}, True)]
    while stack:
        key, parent, edge, best = stack.pop()
        state = states[key]
        data = state.get("data") if isinstance(state.get("data"), dict) else {}
        said = edge.get("data") if isinstance(edge.get("data"), dict) else {}
        children = below.get(key, [])
        node = TreeNode(
            id=len(nodes),
            parent=parent,
            text=_text(data or {}, text_key),
            value=_number((said or {}).get("Q")),
            score=_number((said or {}).get("reward")),
            status="expanded" if children else "open",
            best=best,
            extra={"treelog_id": key, "data": data, "edge": said},
        )
        nodes.append(node)
        chosen = state.get("selected_edge")
        stack += [
            (child["target"], node.id, child, best and child["id"] == chosen)
            for child in reversed(children)
        ]
    return nodes


def _text(data: dict[str, Any], text_key: str | None) -> str:
    if text_key is not None:
        return str(data.get(text_key, ""))
    return "\n".join(f"{key}: {value}" for key, value in data.items())


def _number(value: Any) -> float | None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if real and math.isfinite(value) else None
