"""Reading the pure-Python control plane: columns, statistics and the canonical dump."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dendrite_engine.cache.reference_tree import Segment, SegmentTree
from dendrite_engine.errors import InvalidArgument

FREE, LIVE, CACHED = 0, 1, 2


def page_state(tree: SegmentTree, page: int) -> int:
    """0 free, 1 live, 2 cached."""
    if tree.pool.refs[page] == 0:
        return FREE
    return CACHED if page in tree.index.cached else LIVE


def peek_free(tree: SegmentTree, n: int) -> np.ndarray:
    """The up to `n` free pages that will be taken next, in this order, i32."""
    if n < 0:
        raise InvalidArgument(f"n must be at least 0 (free pages), got {n}")
    return np.array(tree.pool.free[::-1][:n], np.int32)


def num_computed(tail: Segment) -> int:
    """Tokens of the chain, from the first one on, that are computed."""
    for segment in list(tail.chain())[::-1]:
        if segment.computed < segment.end:
            return segment.computed
    return tail.end


def page_table(tree: SegmentTree, tail: Segment) -> list[int]:
    """Pages of the chain in order of position."""
    table: list[int] = []
    for segment in list(tail.chain())[::-1]:
        table[tree.floor(segment.start) :] = segment.pages
    return table


def holders(tree: SegmentTree) -> Counter[int]:
    """Branches below each live page."""
    below: dict[int, set[int]] = {}
    branch = 0
    for tail in tree.segments.values():
        for _ in range(tail.handles):
            branch += 1
            for segment in tail.chain():
                for page in segment.pages:
                    below.setdefault(page, set()).add(branch)
    return Counter({page: len(branches) for page, branches in below.items()})


def owned_pages(tree: SegmentTree, tail: Segment) -> int:
    """Pages that pruning one branch at `tail` would release."""
    dying: list[Segment] = []
    for segment in tail.chain():
        if segment.refs > 1:
            break
        dying.append(segment)
    lost: Counter[int] = Counter()
    for segment in dying:
        lost.update(segment.pages)
        lost.update([segment.pending_src] if segment.pending_src >= 0 else [])
    survivor = dying[-1].parent if dying else tail
    if survivor is not None:
        _lose_by_merge(tree, survivor, dying, lost)
    index = tree.index.nodes
    return sum(tree.pool.refs[page] - (page in index) == n for page, n in lost.items())


def _lose_by_merge(
    tree: SegmentTree, survivor: Segment, dying: list[Segment], lost: Counter[int]
) -> None:
    """Count the page that goes when the survivor can then merge with its last child."""
    children = [child for child in survivor.children if child not in dying]
    handles = survivor.handles - (not dying)
    if handles or len(children) != 1 or children[0].start % tree.page_size == 0:
        return
    child = children[0]
    refs, upper, lower = tree.pool.refs, survivor.pages[-1], child.pages[0]
    if upper == lower:
        return
    if child.pending_src < 0:
        lost[upper] += 1
    elif not tree.in_flight(child) and refs[lower] == 1 and refs[upper] - lost[upper] == 2:
        lost[lower] += 1


def describe(tree: SegmentTree, tail: Segment | None) -> list[int]:
    """Columns of TreeCore.describe for one branch; -1 everywhere for a stale one."""
    if tail is None:
        return [-1] * 6
    computed, owned = num_computed(tail), owned_pages(tree, tail)
    segments = sum(1 for _ in tail.chain())
    return [tail.end, computed, tree.ceil(tail.end), owned, tail.refs, segments]


def set_logprobs(tail: Segment, start: int, values: Sequence[float]) -> None:
    """Write logprobs of the tokens from `start` on."""
    for segment in tail.chain():
        for position in range(max(start, segment.start), min(start + len(values), segment.end)):
            segment.logprobs[position - segment.start] = values[position - start]


def stats(tree: SegmentTree) -> dict[str, int]:
    """Counters and gauges of the tree by name."""
    free, cached = len(tree.pool.free), len(tree.index.cached)
    return {
        "pages_total": tree.num_pages,
        "pages_free": free,
        "pages_live": tree.num_pages - free - cached,
        "pages_shared": sum(n > 1 for n in holders(tree).values()),
        "pages_cached": cached,
        "branches": sum(s.handles for s in tree.segments.values()),
        "segments": len(tree.segments),
        "cow_copies": tree.cow_copies,
        "evictions": tree.index.num_evicted,
        "prefix_hits": tree.prefix_hits,
        "prefix_hit_tokens": tree.prefix_hit_tokens,
        "pages_taken": tree.pool.num_taken,
    }


def dump(tree: SegmentTree) -> dict[str, Any]:
    """Segments, pages, index and open plans in canonical form."""
    pages = range(tree.num_pages)
    owners = {page: tree.owner(page) for page in tree.index.nodes}
    return {
        "segments": [_dump_segment(s) for _, s in sorted(tree.segments.items())],
        "page_refs": list(tree.pool.refs),
        "page_state": [page_state(tree, page) for page in pages],
        "free_list": list(tree.pool.free),
        "retained": sorted(tree.pool.retained),
        "lru": list(tree.index.cached),
        "index": [
            {
                "page": page,
                "parent": node.parent,
                "namespace": node.namespace,
                "tokens": list(node.tokens),
                "owner": -1 if owners[page] is None else owners[page].id,  # type: ignore[union-attr]
            }
            for page, node in sorted(tree.index.nodes.items())
        ],
        "flights": [
            sorted([i.segment.id, i.start, i.stop] for i in items if i.segment is not None)
            for _, items in sorted(tree.flights.items())
        ],
    }


def _dump_segment(s: Segment) -> dict[str, Any]:
    return {
        "id": s.id,
        "parent": -1 if s.parent is None else s.parent.id,
        "start": s.start,
        "computed": s.computed,
        "refs": s.refs,
        "pending_src": s.pending_src,
        "namespace": s.namespace,
        "tokens": list(s.tokens),
        "logprobs": [None if math.isnan(x) else x for x in s.logprobs],
        "pages": list(s.pages),
    }
