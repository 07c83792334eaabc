"""Trees out of the engine's own files, read without an engine: tokens and statistics, no text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dendrite_engine.errors import SnapshotRejected
from dendrite_engine.snapshots.container import Snapshot, kind_of, read_snapshot
from dendrite_lab.trees.model import TreeData, TreeNode

_PLAIN = (bool, int, float, str, type(None))


def read_snapshot_tree(path: Path) -> TreeData:
    """The tree of a saved search, or saved branches.

    Raises:
        SnapshotRejected: the file is damaged, newer, or of another kind.
    """
    readers = {"search": _search, "branches": _branches}
    kind = kind_of(path)
    if kind not in readers:
        raise SnapshotRejected("kind", f"{kind!r} holds no tree")
    snapshot = read_snapshot(path, kind)
    try:
        return readers[kind](snapshot)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SnapshotRejected("tree", f"can't be read: {error!r}") from error


def _search(snapshot: Snapshot) -> TreeData:
    body = snapshot.body["tree"]
    columns = body["columns"]
    tokens = _split(snapshot.arrays["tokens"], snapshot.arrays["token_counts"])
    logprobs = _split(snapshot.arrays["logprobs"], snapshot.arrays["logprob_counts"])
    root, parents = body["root"], body["parents"]
    tokens[root] = snapshot.arrays["root_tokens"].tolist()
    logprobs[root] = snapshot.arrays["root_logprobs"].tolist()
    nodes = []
    for index, parent in enumerate(parents):

        def said(name: str, at: int = index) -> Any:
            value = columns[name][at]
            return value if isinstance(value, _PLAIN) else None

        visits = int(said("visits"))
        nodes.append(
            TreeNode(
                id=index,
                parent=parent,
                start=0 if index == root else int(said("start")),
                token_ids=tuple(tokens[index]),
                logprobs=_numbers(logprobs[index]),
                visits=visits,
                value=said("value_sum") / visits if visits else None,
                score=said("score"),
                prior=said("prior"),
                status=said("status"),
                finish_reason=said("finish_reason"),
            )
        )
    source = f"search:{snapshot.body['algorithm']['name']}"
    return TreeData(nodes, source, snapshot.body["engine"]["model_name"])


def _branches(snapshot: Snapshot) -> TreeData:
    rows = snapshot.body["branches"]
    counts = np.array([row["added"] for row in rows])
    tokens = _split(snapshot.arrays["tokens"], counts)
    logprobs = _split(snapshot.arrays["logprobs"], counts)
    nodes = [
        TreeNode(
            id=place,
            parent=row["source"],
            start=row["shared"],
            token_ids=tuple(tokens[place]),
            logprobs=_numbers(logprobs[place]),
            status="live",
            branch_id=row["id"],
            label=row["label"],
        )
        for place, row in enumerate(rows)
    ]
    return TreeData(nodes, "branches", snapshot.body["engine"]["model_name"])


def _split(values: np.ndarray, counts: np.ndarray) -> list[list[Any]]:
    ends = np.cumsum(counts)
    return [values[end - size : end].tolist() for end, size in zip(ends, counts, strict=True)]


def _numbers(values: list[float]) -> tuple[float | None, ...]:
    return tuple(value if value == value else None for value in values)
