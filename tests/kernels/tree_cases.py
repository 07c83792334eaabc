"""Random trees of segments with their pages, plan and a dense float64 answer for every row.

A segment owns the positions [start, start + length); the pages it lists begin at the page that
holds `start`, whose earlier slots are copies of its ancestors' tokens. The last `new` tokens of a
segment are rows of the plan. Everything that no row may read is NaN: unused pages and the slots
behind the last token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

NAN = float("nan")


@dataclass
class Segment:
    parent: int | None
    start: int
    length: int
    new: int
    children: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass
class FakePlan:
    """The attention arrays of a plan."""

    positions: np.ndarray
    node_pos: np.ndarray
    node_len: np.ndarray
    node_row_begin: np.ndarray
    node_row_end: np.ndarray
    node_page_indptr: np.ndarray
    page_indices: np.ndarray

    @classmethod
    def from_nodes(cls, positions, nodes) -> FakePlan:
        """nodes: list of (pos, length, row_begin, row_end, pages)."""
        columns = [np.array([n[i] for n in nodes], np.int32) for i in range(4)]
        indptr = np.cumsum([0] + [len(n[4]) for n in nodes]).astype(np.int32)
        pages = np.array([p for n in nodes for p in n[4]], np.int32)
        return cls(np.array(positions, np.int32), *columns, indptr, pages)

    def nodes(self):
        spans = zip(self.node_page_indptr[:-1], self.node_page_indptr[1:], strict=True)
        pages = [self.page_indices[a:b].tolist() for a, b in spans]
        heads = zip(
            self.node_pos.tolist(), self.node_len.tolist(), self.node_row_begin.tolist(),
            self.node_row_end.tolist(), strict=True,
        )  # fmt: skip
        return [(*head, p) for head, p in zip(heads, pages, strict=True)]

    def only_row(self, row: int) -> FakePlan:
        """The plan of one row alone."""
        nodes = [(n[0], n[1], 0, 1, n[4]) for n in self.nodes() if n[2] <= row < n[3]]
        return FakePlan.from_nodes([self.positions[row]], nodes)

    def flat(self) -> FakePlan:
        """No sharing: every row has one node with its whole page list."""
        nodes = []
        for row, position in enumerate(self.positions.tolist()):
            pages = [p for n in self.nodes() if n[2] <= row < n[3] for p in n[4]]
            nodes.append((0, self._covered(row), row, row + 1, pages))
            assert self._covered(row) > position
        return FakePlan.from_nodes(self.positions, nodes)

    def _covered(self, row: int) -> int:
        return max(n[0] + n[1] for n in self.nodes() if n[2] <= row < n[3])

    def cut(self, page_size: int) -> FakePlan:
        """The same rows and pages with every node cut into nodes of one page."""
        nodes = []
        for pos, length, begin, end, pages in self.nodes():
            for i, page in enumerate(pages):
                used = min(page_size, length - i * page_size)
                nodes.append((pos + i * page_size, used, begin, end, [page]))
        return FakePlan.from_nodes(self.positions, nodes)


class TreeCase:
    """Pages, plan and queries of a list of segments (parents before children)."""

    def __init__(
        self, segments: list[Segment], *, heads=6, kv_heads=2, head_dim=16, page_size=16, seed=0
    ) -> None:
        for i, segment in enumerate(segments):
            if segment.parent is not None:
                segments[segment.parent].children.append(i)
        self.segments, self.page_size = segments, page_size
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self._rng = np.random.default_rng(seed)
        self._paths: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._pages: dict[int, list[int]] = {}
        self._fill_pages()
        self.row_segment: list[int] = []
        self.plan = self._make_plan()
        rows = len(self.plan.positions)
        self.q = torch.from_numpy(self._normal(rows, heads, head_dim))

    def _normal(self, *shape):
        return self._rng.standard_normal(shape).astype(np.float32)

    def _path(self, index: int):
        """K and V [end, kv_heads, head_dim] of every token from the root to the segment's end."""
        if index not in self._paths:
            segment = self.segments[index]
            own = [self._normal(segment.length, self.kv_heads, self.head_dim) for _ in range(2)]
            if segment.parent is not None:
                above = self._path(segment.parent)
                own = [np.concatenate(pair) for pair in zip(above, own, strict=True)]
            self._paths[index] = (own[0], own[1])
        return self._paths[index]

    def _fill_pages(self) -> None:
        size = self.page_size
        counts = [-(-s.end // size) - s.start // size if s.length else 0 for s in self.segments]
        total = sum(counts) + 3
        free = self._rng.permutation(total).tolist()
        self.k_pages = torch.full((total, self.kv_heads, self.head_dim, size), NAN)
        self.v_pages = torch.full((total, self.kv_heads, size, self.head_dim), NAN)
        for i, segment in enumerate(self.segments):
            keys, values = (torch.from_numpy(x) for x in self._path(i))
            self._pages[i] = [free.pop() for _ in range(counts[i])]
            for j, page in enumerate(self._pages[i]):
                begin = (segment.start // size + j) * size
                used = min(size, segment.end - begin)
                self.k_pages[page, :, :, :used] = keys[begin : begin + used].permute(1, 2, 0)
                self.v_pages[page, :, :used] = values[begin : begin + used].permute(1, 0, 2)

    def _make_plan(self) -> FakePlan:
        self._nodes: list[tuple] = []
        self._positions: list[int] = []
        for i, segment in enumerate(self.segments):
            if segment.parent is None:
                self._visit(i)
        return FakePlan.from_nodes(self._positions, self._nodes)

    def _visit(self, index: int) -> None:
        segment, size = self.segments[index], self.page_size
        begin = len(self._positions)
        self._positions += range(segment.end - segment.new, segment.end)
        self.row_segment += [index] * segment.new
        own_end = len(self._positions)
        first, whole = segment.start // size, segment.end // size
        at = len(self._nodes)
        for child in segment.children:
            self._visit(child)
        here = []
        rows_end = len(self._positions)
        if whole > first and rows_end > begin:
            pages = self._pages[index][: whole - first]
            here.append((first * size, (whole - first) * size, begin, rows_end, pages))
        if segment.end > whole * size and own_end > begin:
            rest = [self._pages[index][whole - first]]
            here.append((whole * size, segment.end - whole * size, begin, own_end, rest))
        self._nodes[at:at] = here

    def expected(self, scale: float, window: int = 0) -> torch.Tensor:
        """Dense float64 attention of every row over its own path."""
        rows, group = len(self.plan.positions), self.heads // self.kv_heads
        out = np.zeros((rows, self.heads, self.head_dim))
        for row, position in enumerate(self.plan.positions.tolist()):
            keys, values = self._path(self.row_segment[row])
            low = max(0, position - window + 1) if window > 0 else 0
            span = slice(low, position + 1)
            for head in range(self.heads):
                query = self.q[row, head].numpy().astype(np.float64)
                score = keys[span, head // group].astype(np.float64) @ query * scale
                weight = np.exp(score - score.max())
                out[row, head] = weight / weight.sum() @ values[span, head // group]
        return torch.from_numpy(out)


def random_segments(seed: int, count: int = 12, longest: int = 70) -> list[Segment]:
    """A random forest; segments of 1 .. longest tokens, about half of them with rows."""
    rng = np.random.default_rng(seed)
    segments = [Segment(None, 0, int(rng.integers(1, 3 * longest)), 0)]
    for _ in range(count - 1):
        parent = int(rng.integers(-1 if rng.random() < 0.1 else 0, len(segments)))
        start = 0 if parent < 0 else segments[parent].end
        length = int(rng.choice([1, 2, 15, 16, 17, int(rng.integers(1, longest))]))
        segments.append(Segment(None if parent < 0 else parent, start, length, 0))
    for segment in segments:
        if rng.random() < 0.6:
            segment.new = int(rng.choice([1, segment.length, int(rng.integers(1, 4))]))
            segment.new = min(segment.new, segment.length)
    segments[-1].new = max(1, segments[-1].new)
    return segments


def attend(ops, case: TreeCase, plan=None, q=None, window: int = 0, scale: float = 0.25):
    """Run `ops.tree_attention` into an output that starts as NaN."""
    q = case.q if q is None else q
    out = torch.full_like(q, NAN)
    ops.tree_attention(q, case.k_pages, case.v_pages, plan or case.plan, out, scale, window)
    return out
