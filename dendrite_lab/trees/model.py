"""A tree as plain data: what every export is made of, and every import gives."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.models.tokenizer import Tokenizer
    from dendrite_engine.search.tree import Tree
    from dendrite_engine.tree.branch import Branch

SCHEMA = "dendrite-tree"
VERSION = 1


@dataclass(slots=True)
class TreeNode:
    """One run of tokens, or one state of a foreign tree.

    Attributes:
        id: its place in `TreeData.nodes`; parents come before children.
        parent: id of the node above, -1 for a root.
        start: position of its first token; the path above it is cut there, so that a branch may
            hang inside the run of its parent.
        token_ids: its own tokens; empty where only text is known.
        logprobs: of each token, `None` for given ones.
        text: its own text.
        visits: simulations that passed through.
        value: mean of their values, `None` before the first.
        score: what the evaluator gave this very node.
        prior: probability that the model gave its tokens.
        status: open, expanded, terminal or pruned; `live` for branches.
        finish_reason: why its text ended.
        best: it lies on the path to the best node.
        branch_id: branch in the engine that it was exported from, 0 for none.
        label: free text for people.
        extra: whatever else its source said about it.
    """

    id: int
    parent: int = -1
    start: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    text: str = ""
    visits: int = 0
    value: float | None = None
    score: float | None = None
    prior: float | None = None
    status: str = "open"
    finish_reason: str | None = None
    best: bool = False
    branch_id: int = 0
    label: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TreeData:
    """Nodes of one or several trees, and where they came from.

    Attributes:
        nodes: by id.
        source: `search:NAME`, `branches`, or `llm-reasoners`.
        model: name of the model, where one is known.
    """

    nodes: list[TreeNode]
    source: str
    model: str = ""

    def __len__(self) -> int:
        return len(self.nodes)

    def roots(self) -> list[TreeNode]:
        """Nodes without a parent."""
        return [node for node in self.nodes if node.parent < 0]

    def children(self, node: TreeNode) -> list[TreeNode]:
        """Nodes right below one. O(nodes)."""
        return [other for other in self.nodes if other.parent == node.id]

    def path(self, node: TreeNode) -> list[TreeNode]:
        """Nodes from the root down to this one."""
        found = [node]
        while found[-1].parent >= 0:
            found.append(self.nodes[found[-1].parent])
        return found[::-1]

    def best(self) -> TreeNode | None:
        """The deepest node of the path marked best."""
        return max((n for n in self.nodes if n.best), key=lambda n: n.id, default=None)

    def token_ids(self, node: TreeNode) -> list[int]:
        """All tokens from the root's first to the node's last."""
        ids: list[int] = []
        for step in self.path(node):
            ids[step.start :] = step.token_ids
        return ids

    def depth(self, node: TreeNode) -> int:
        """Nodes above it."""
        return len(self.path(node)) - 1

    def decode(self, tokenizer: Tokenizer) -> None:
        """Fill in the texts that are missing, from the tokens."""
        for node in self.nodes:
            if not node.text and node.token_ids:
                node.text = tokenizer.decode(node.token_ids, skip_special=True)

    # -- as text, tables, graphs ----------------------------------------------------------------

    def to_json(self, *, indent: int | None = None) -> str:
        """JSON with a schema and a version; `trees.from_json` reads it. NaN and infinity are null.

        Raises:
            InvalidArgument: `extra` of a node holds something that is no JSON.
        """
        body = {
            "schema": SCHEMA,
            "version": VERSION,
            "source": self.source,
            "model": self.model,
            "nodes": [_finite(asdict(node)) for node in self.nodes],
        }
        try:
            return json.dumps(body, indent=indent, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"a node's extra can't be written as JSON: {error}") from error

    def to_dot(self, *, width: int = 40) -> str:
        """A Graphviz digraph; see `drawing.dot`."""
        from dendrite_lab.trees.drawing import dot

        return dot(self, width)

    def to_mermaid(self, *, width: int = 40) -> str:
        """A Mermaid flowchart; see `drawing.mermaid`."""
        from dendrite_lab.trees.drawing import mermaid

        return mermaid(self, width)

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph`; see `tables.networkx_graph`."""
        from dendrite_lab.trees.tables import networkx_graph

        return networkx_graph(self)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row a node; see `tables.data_frame`."""
        from dendrite_lab.trees.tables import data_frame

        return data_frame(self)

    # -- back into the engine -------------------------------------------------------------------

    def to_tree(self) -> Tree:
        """A search `Tree` without branches, for whatever reads one; see `growing.search_tree`."""
        from dendrite_lab.trees.growing import search_tree

        return search_tree(self)

    def grow(self, engine: Engine) -> dict[int, Branch]:
        """Make every node a live branch; returns branches by node id; see `growing.grow`."""
        from dendrite_lab.trees.growing import grow

        return grow(self, engine)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def lines_of(tree: TreeData) -> Iterator[tuple[TreeNode, TreeNode]]:
    """Every (parent, child)."""
    for node in tree.nodes:
        if node.parent >= 0:
            yield tree.nodes[node.parent], node
