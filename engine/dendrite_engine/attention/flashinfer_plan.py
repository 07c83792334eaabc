"""From a plan's nodes to FlashInfer's page tables: flat, or a cascade of levels. numpy only.

FlashInfer describes attention as requests: a run of query rows and the pages that all of them read.
`flat_table` gives every work item its whole path. `cascade_tables` reads a page that several items
share once for all of them: one table per level of sharing, and a last, causal one with what only
one item reads. Results of the levels are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from dendrite_engine.attention.base import Plan
from dendrite_engine.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class PageTable:
    """Requests of one FlashInfer call over a plan's rows; all arrays i32.

    Attributes:
        qo_indptr: [n + 1], the query rows of each request; covers all rows in order.
        kv_indptr: [n + 1], its pages in `indices`.
        indices: page ids.
        last_page_len: [n], used slots of its last page: 1..page_size, 0 where it has no page.
    """

    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray

    @property
    def num_requests(self) -> int:
        """Requests of the table."""
        return len(self.last_page_len)

    def kv_lens(self, page_size: int) -> np.ndarray:
        """Tokens that each request reads, i64 [n]."""
        pages = np.diff(self.kv_indptr).astype(np.int64)
        lens: np.ndarray = np.maximum(pages - 1, 0) * page_size + self.last_page_len
        return lens


@dataclass(slots=True)
class _Items:
    """Per work item: its rows, and its path cut into shared nodes and its own.

    Attributes:
        bounds: rows of item i are bounds[i] .. bounds[i + 1].
        shared: per item, (level, nodes) of each shared run on its path, from the root down.
        own: per item, the nodes read by its own causal request.
        depth: levels of sharing.
    """

    bounds: list[int]
    shared: list[list[tuple[int, tuple[int, ...]]]] = field(default_factory=list)
    own: list[list[int]] = field(default_factory=list)
    depth: int = 0


def flat_table(plan: Plan, page_size: int) -> PageTable:
    """Every item with all the pages of its path; causal on its rows. O(sum of path pages).

    Raises:
        IntegrityError: the plan's nodes do not tile an item's context.
    """
    return _table(plan, page_size, plan.item_indptr.tolist(), _paths(plan))


def cascade_tables(
    plan: Plan, page_size: int, keep: Collection[int] | None = None
) -> list[PageTable]:
    """Levels of shared pages, from the root down, and the causal table of what items own, last.

    Args:
        plan: the plan.
        page_size: tokens per page.
        keep: levels to keep; the pages of the others are read by the requests of the next kept
            level below, or by each item itself. None keeps all.

    Returns:
        One table per kept level, then the causal one. Without shared pages the causal one alone,
        which is the flat table.

    Raises:
        IntegrityError: the plan's nodes do not tile an item's context.
    """
    items = _cut(plan)
    kept = [level for level in range(items.depth) if keep is None or level in keep]
    edges = [-1, *kept, items.depth]
    tables = []
    for above, level in zip(edges, kept, strict=False):
        tables.append(_level_table(plan, page_size, items, above, level))
    last = edges[-2]
    own = [
        [node for at, run in runs if at > last for node in run] + nodes
        for runs, nodes in zip(items.shared, items.own, strict=True)
    ]
    return [*tables, _table(plan, page_size, items.bounds, own)]


def cascade_depth(plan: Plan) -> int:
    """Levels of sharing in the plan: `cascade_tables` gives one table more."""
    return _cut(plan).depth


def _paths(plan: Plan) -> list[list[int]]:
    """Nodes of every item in position order. Nodes come depth first, so the open ones are a
    stack.
    """
    begins, ends = plan.node_row_begin.tolist(), plan.node_row_end.tolist()
    paths: list[list[int]] = []
    stack: list[int] = []
    at = 0
    for row in plan.item_indptr[:-1].tolist():
        while stack and ends[stack[-1]] <= row:
            stack.pop()
        while at < len(begins) and begins[at] <= row:
            stack.append(at)
            at += 1
        paths.append(stack.copy())
    return paths


def _cut(plan: Plan) -> _Items:
    bounds = plan.item_indptr.tolist()
    paths = _paths(plan)
    begins, ends = plan.node_row_begin.tolist(), plan.node_row_end.tolist()
    firsts = [_first_own(plan, path, item, bounds) for item, path in enumerate(paths)]
    shared_from = list(begins)
    for item, (path, first) in enumerate(zip(paths, firsts, strict=True)):
        for node in path[first:]:
            if begins[node] != bounds[item]:
                raise IntegrityError(
                    f"node {node} begins at row {begins[node]}, its own item {item} at row "
                    f"{bounds[item]}: rows are not in depth-first order"
                )
            shared_from[node] = bounds[item + 1]
    items = _Items(bounds)
    for path, first in zip(paths, firsts, strict=True):
        items.shared.append(_runs(path[:first], shared_from, ends))
        items.own.append(path[first:])
    items.depth = max((len(runs) for runs in items.shared), default=0)
    return items


def _first_own(plan: Plan, path: list[int], item: int, bounds: list[int]) -> int:
    """Index in `path` from which on the item reads by itself: nodes that no other item reads, nodes
    with its own rows (the causal mask cuts them), and always the last one: no row is without keys
    in the causal table.
    """
    begin, end = bounds[item], bounds[item + 1]
    own_from = int(plan.positions[begin])
    first = len(path) - 1
    while first > 0:
        node = path[first - 1]
        alone = plan.node_row_begin[node] == begin and plan.node_row_end[node] == end
        cut = int(plan.node_pos[node]) + int(plan.node_len[node]) > own_from
        if not (alone or cut):
            break
        first -= 1
    return first


def _runs(
    path: Sequence[int], shared_from: list[int], ends: list[int]
) -> list[tuple[int, tuple[int, ...]]]:
    """Neighbouring nodes with the same rows are one run; its level is the number of runs above."""
    grouped = groupby(path, key=lambda node: (shared_from[node], ends[node]))
    return [(level, tuple(nodes)) for level, (_, nodes) in enumerate(grouped)]


def _level_table(plan: Plan, page_size: int, items: _Items, above: int, level: int) -> PageTable:
    """Items that read the same runs of the levels (above, level] are one request."""
    nodes_of = [
        tuple(node for at, run in runs if above < at <= level for node in run)
        for runs in items.shared
    ]
    bounds, nodes = [0], []
    item = 0
    for key, group in groupby(nodes_of):
        item += sum(1 for _ in group)
        bounds.append(items.bounds[item])
        nodes.append(list(key))
    return _table(plan, page_size, bounds, nodes)


def _table(
    plan: Plan, page_size: int, bounds: Sequence[int], nodes: Sequence[Sequence[int]]
) -> PageTable:
    """The requests with rows bounds[i] .. bounds[i + 1] and the pages of nodes[i]."""
    page_indptr, lens = plan.node_page_indptr.tolist(), plan.node_len.tolist()
    counts = [sum(page_indptr[n + 1] - page_indptr[n] for n in run) for run in nodes]
    tokens = np.array([sum(lens[n] for n in run) for run in nodes], np.int64)
    parts = [plan.page_indices[page_indptr[n] : page_indptr[n + 1]] for run in nodes for n in run]
    kv_indptr = np.zeros(len(nodes) + 1, np.int32)
    np.cumsum(counts, out=kv_indptr[1:])
    last = tokens - np.maximum(np.diff(kv_indptr).astype(np.int64) - 1, 0) * page_size
    partial = set(np.flatnonzero(plan.node_len != np.diff(plan.node_page_indptr) * page_size))
    full = np.diff(kv_indptr) > 0
    wrong = ((last < full) | (last > page_size * full)).any()
    if wrong or any(not partial.isdisjoint(run[:-1]) for run in nodes):
        raise IntegrityError(
            "the plan's nodes do not tile the context: only the last page of an item may be partial"
        )
    indices = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return PageTable(
        np.asarray(bounds, np.int32), kv_indptr, indices.astype(np.int32), last.astype(np.int32)
    )
