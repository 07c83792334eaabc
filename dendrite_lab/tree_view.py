"""The Explorer's tree for Python code: a reading of it at one moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dendrite_engine.errors import StaleBranch
from dendrite_lab import protocol
from dendrite_lab.session import Session
from dendrite_lab.text_tree import text_tree


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node of the tree when it was read.

    Attributes:
        id: node id, as commands take it.
        parent: node id above, 0 at a root.
        branch_id: branch that wrote the tokens; negative when none holds them by itself any more.
        start, end: absolute token positions [start, end).
        text: text of the node.
        pages: pages that a branch ending here holds (inner nodes: that its tokens lie in).
        owned_pages: pages that pruning its branch would free (0 at inner nodes).
        mean_logprob: mean over generated tokens, NaN without any.
        streaming: whether it is being generated right now.
        finish_reason: why the last generation ended, "" before.
        visits, value, uct: search values, 0 and NaN without a search.
        children: node ids below.
    """

    id: int
    parent: int
    branch_id: int
    start: int
    end: int
    text: str
    pages: int
    owned_pages: int
    mean_logprob: float
    streaming: bool
    finish_reason: str
    visits: int
    value: float
    uct: float
    children: list[int] = field(default_factory=list)


class TreeView:
    """All nodes at one moment. Iterates parents first; `str()` is an ASCII tree."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._nodes: dict[int, NodeView] = {}
        with session.lock:
            session.sync()
            session.refresh(force=True)
            for piece in session.model.all_pieces():
                text = "".join(session.model.texts(piece))
                self._nodes[piece.node] = _view(session.row(piece), text)
        for node in self._nodes.values():
            if node.parent in self._nodes:
                self._nodes[node.parent].children.append(node.id)

    @property
    def roots(self) -> list[NodeView]:
        """Nodes without a parent."""
        return [node for node in self if node.parent == 0]

    @property
    def leaves(self) -> list[NodeView]:
        """Nodes without children."""
        return [node for node in self if not node.children]

    def node(self, ident: int) -> NodeView:
        """The node with this id.

        Raises:
            StaleBranch: there is none.
        """
        found = self._nodes.get(ident)
        if found is None:
            raise StaleBranch(f"node {ident} is not in the tree")
        return found

    def of(self, branch: Any) -> NodeView:
        """The node in which `branch` ends."""
        return self.node(self._session.node_of(branch))

    def __iter__(self) -> Iterator[NodeView]:
        return iter(list(self._nodes.values()))

    def __len__(self) -> int:
        return len(self._nodes)

    def __str__(self) -> str:
        return text_tree(self._session)

    def __repr__(self) -> str:
        return f"TreeView({len(self)} nodes)\n{self}"


def _view(row: protocol.NodeRow, text: str) -> NodeView:
    return NodeView(
        id=row.node,
        parent=row.parent,
        branch_id=row.branch,
        start=row.start,
        end=row.end,
        text=text,
        pages=row.pages,
        owned_pages=row.owned,
        mean_logprob=row.lp_mean,
        streaming=bool(row.flags & protocol.STREAMING),
        finish_reason=protocol.FINISH_REASONS[row.finish],
        visits=row.visits,
        value=row.value,
        uct=row.uct,
    )
