"""Statistics of a running search as columns, cheap enough to be read many times a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dendrite_engine.search.tree import STATUSES, Node, Tree

_CODES = {status: code for code, status in enumerate(STATUSES)}
_ROW = np.dtype(
    [
        ("version", np.int64),
        ("branch_id", np.int64),
        ("node_id", np.int64),
        ("parent_id", np.int64),
        ("visits", np.int64),
        ("value", np.float64),
        ("prior", np.float64),
        ("uct", np.float64),
        ("status", np.uint8),
    ]
)


@dataclass(frozen=True, eq=False)
class SearchStats:
    """Columns of equal length, one row for each node that has or had a branch; a copy of its own.

    Attributes:
        version: give it to `changed_since` to get only what changes from here on.
        branch_id: the node's branch, alive or not.
        node_id: the node.
        parent_id: node id of its parent, -1 for the root.
        visits: simulations that passed through.
        value: mean of their values.
        prior: probability that the model gave to the node's tokens.
        uct: the number by which the search picks among siblings (beam search: the beam's score).
        status: index into `tree.STATUSES`: open, expanded, terminal, pruned.
        released: branches released so far because pages ran short; one number.
        remade: branches made again so far; one number.
    """

    version: int
    branch_id: NDArray[np.int64]
    node_id: NDArray[np.int64]
    parent_id: NDArray[np.int64]
    visits: NDArray[np.int64]
    value: NDArray[np.float64]
    prior: NDArray[np.float64]
    uct: NDArray[np.float64]
    status: NDArray[np.uint8]
    released: int = 0
    remade: int = 0

    def __len__(self) -> int:
        return len(self.branch_id)

    def __getitem__(self, column: str) -> NDArray[np.generic]:
        return self.columns()[column]

    def columns(self) -> dict[str, NDArray[np.generic]]:
        """The columns by name, single numbers left out."""
        single = ("version", "released", "remade")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in single}


class StatsTable:
    """Keeps a row for each node and rewrites only rows whose node changed since the last reading.

    Reading costs O(changed nodes) plus a copy of the columns asked for. The caller holds the lock
    of the tree.
    """

    def __init__(self) -> None:
        self._rows = np.zeros(64, _ROW)
        self._count = 0
        self._version = 0

    def refresh(self, tree: Tree, rank: Callable[[Node], float]) -> None:
        """Bring the rows up to date with the tree."""
        if not tree.dirty:
            return
        self._version += 1
        changed, tree.dirty = sorted(tree.dirty), set()
        self._count = len(tree)
        if self._count > len(self._rows):
            grown = np.zeros(2 * self._count, _ROW)
            grown[: len(self._rows)] = self._rows
            self._rows = grown
        for node_id in changed:
            node = tree.nodes[node_id]
            self._rows[node_id] = (
                self._version,
                node.branch_id,
                node_id,
                -1 if node.parent is None else node.parent.id,
                node.visits,
                node.value,
                node.prior,
                rank(node),
                _CODES[node.status],
            )

    def since(self, version: int, *, released: int = 0, remade: int = 0) -> SearchStats:
        """Rows that changed after `version`; all of them for -1."""
        rows = self._rows[: self._count]
        rows = rows[(rows["version"] > version) & (rows["branch_id"] > 0)]
        names = [name for name in _ROW.names or () if name != "version"]
        columns: dict[str, Any] = {name: rows[name].copy() for name in names}
        return SearchStats(self._version, **columns, released=released, remade=remade)
