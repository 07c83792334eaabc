"""Plan of one forward pass, built the plain way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dendrite_engine.cache.reference_tree import FlightItem, Segment, SegmentTree

Int32Array = npt.NDArray[np.int32]
Key = tuple[int, ...]


@dataclass
class Item:
    """One segment's run of rows: tokens [start, stop)."""

    segment: Segment
    start: int
    stop: int
    refresh: bool  # computed already: K and V of the token are read back, not stored
    row_begin: int = 0


class PlanBuilder:
    """Collects items, orders them depth first, and lists rows and attention nodes.

    A segment's key is the path of ranks from the root to it, a rank being the order in which the
    requests first reach a segment. Sorting keys gives the depth-first preorder, and a segment's
    subtree is exactly the keys that begin with its own.
    """

    def __init__(self, tree: SegmentTree) -> None:
        self.tree = tree
        self.ranks: dict[Segment, int] = {}
        self.items: dict[Segment, Item] = {}
        self.rows: list[tuple[int, int, int]] = []  # token id, position, slot
        self.item_indptr = [0]
        self.copies: list[tuple[int, int, int]] = []
        self.nodes: list[tuple[int, int, int, int, list[int]]] = []  # pos, len, rows, pages

    def request(self, tail: Segment, quota: int) -> None:
        """Add what one branch needs next."""
        chain = list(tail.chain())[::-1]
        first = next((s for s in chain if s.computed < s.end), None)
        if first is None:
            item = Item(tail, tail.end - 1, tail.end, refresh=True)
        else:
            stop = min(first.end, first.computed + quota)
            item = Item(first, first.computed, stop, refresh=False)
        known = self.items.setdefault(item.segment, item)
        known.stop = max(known.stop, item.stop)
        for segment in chain[: chain.index(item.segment) + 1]:
            self.ranks.setdefault(segment, len(self.ranks))

    def key(self, segment: Segment) -> Key:
        """Ranks from the root down to the segment."""
        return tuple(self.ranks[s] for s in segment.chain())[::-1]

    def build(self) -> None:
        """Fill rows, item_indptr, copies and nodes."""
        order = sorted((self.key(segment), segment) for segment in self.ranks)
        sizes = {s: item.stop - item.start for s, item in self.items.items()}
        for i, (key, segment) in enumerate(order):
            row_begin = len(self.rows)
            row_end = row_begin
            for other, below in order[i:]:
                if other[: len(key)] != key:
                    break
                row_end += sizes.get(below, 0)
            item = self.items.get(segment)
            if item is not None:
                item.row_begin = row_begin
                self._add_rows(item)
            self._add_nodes(segment, item, row_begin, row_end)

    def _add_rows(self, item: Item) -> None:
        segment, page_size = item.segment, self.tree.page_size
        for position in range(item.start, item.stop):
            page = self.tree.page_at(segment, self.tree.floor(position))
            slot = -1 if item.refresh else page * page_size + position % page_size
            self.rows.append((segment.tokens[position - segment.start], position, slot))
        self.item_indptr.append(len(self.rows))
        if segment.pending_src >= 0:
            self.copies.append((segment.pending_src, segment.pages[0], segment.start % page_size))

    def _add_nodes(self, segment: Segment, item: Item | None, begin: int, end: int) -> None:
        page_size = self.tree.page_size
        first = self.tree.floor(segment.start)
        stop = segment.end if item is None else item.stop
        whole = self.tree.floor(stop)
        if whole > first:
            pages = segment.pages[: whole - first]
            self.nodes.append((first * page_size, len(pages) * page_size, begin, end, pages))
        if item is not None and stop % page_size:
            # Below the segment its partial page is read through the child's own copy.
            own_end = begin + item.stop - item.start
            page = segment.pages[whole - first]
            self.nodes.append((whole * page_size, stop % page_size, begin, own_end, [page]))

    def logits_row(self, tail: Segment) -> int:
        """Row of the branch's next-token logits, -1 when its chain is not finished by the plan."""
        item = self.items.get(tail)
        if item is None or item.stop != tail.end:
            return -1
        return item.row_begin + item.stop - item.start - 1

    def flight(self) -> list[FlightItem]:
        """Tokens that the plan computes, in row order."""
        items = sorted(self.items.values(), key=lambda item: item.row_begin)
        return [FlightItem(i.segment, i.start, i.stop) for i in items if not i.refresh]


class PlanArrays:
    """The arrays of a plan; meanings and shapes as in the native Plan."""

    def __init__(self, builder: PlanBuilder, tails: Sequence[Segment]) -> None:
        rows, nodes = builder.rows, builder.nodes
        self.token_ids = _int32(row[0] for row in rows)
        self.positions = _int32(row[1] for row in rows)
        self.slots = _int32(row[2] for row in rows)
        self.copies = _int32(x for copy in builder.copies for x in copy).reshape(-1, 3)
        self.logits_row = _int32(builder.logits_row(tail) for tail in tails)
        self.item_indptr = _int32(builder.item_indptr)
        self.node_pos = _int32(node[0] for node in nodes)
        self.node_len = _int32(node[1] for node in nodes)
        self.node_row_begin = _int32(node[2] for node in nodes)
        self.node_row_end = _int32(node[3] for node in nodes)
        sizes = [len(node[4]) for node in nodes]
        self.node_page_indptr = _int32(np.cumsum([0, *sizes]))
        self.page_indices = _int32(page for node in nodes for page in node[4])

    @property
    def num_tokens(self) -> int:
        """Rows (T)."""
        return len(self.positions)

    @property
    def num_items(self) -> int:
        """Items."""
        return len(self.item_indptr) - 1

    @property
    def num_nodes(self) -> int:
        """Attention nodes (N)."""
        return len(self.node_pos)


def _int32(values: object) -> Int32Array:
    return np.array(list(values), dtype=np.int32)  # type: ignore[call-overload]
