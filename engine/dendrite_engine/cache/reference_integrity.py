"""Recount of the pure-Python control plane."""

from __future__ import annotations

from collections import Counter

from dendrite_engine.cache.reference_tree import Segment, SegmentTree
from dendrite_engine.errors import IntegrityError


def check_integrity(tree: SegmentTree) -> None:
    """Raise IntegrityError on the first book that a recount contradicts."""
    for segment in tree.segments.values():
        _check_segment(tree, segment)
    _check_flights(tree)
    _check_index(tree)
    _check_pages(tree)


def _expect(truth: bool, lie: str) -> None:
    if not truth:
        raise IntegrityError(lie)


def _check_segment(tree: SegmentTree, s: Segment) -> None:
    name = f"segment {s.id}"
    _expect(s.refs > 0, f"{name} has no holder")
    _expect(len(s.tokens) > 0, f"{name} is empty")
    _expect(len(s.tokens) == len(s.logprobs), f"{name} has tokens without logprobs")
    pages = tree.ceil(s.end) - tree.floor(s.start)
    _expect(len(s.pages) == pages, f"{name} lists {len(s.pages)} pages, needs {pages}")
    _expect(len(set(s.pages)) == pages, f"{name} lists a page twice")
    _expect(s.start <= s.computed <= s.end, f"{name} is computed outside its tokens")
    _expect(all(c.parent is s for c in s.children), f"{name} has a child with another parent")
    if s.parent is None:
        _expect(s.start == 0, f"{name} has no parent and starts at {s.start}")
    else:
        _expect(tree.segments.get(s.parent.id) is s.parent, f"{name} has a parent that is gone")
        _expect(s in s.parent.children, f"{name} is not counted by its parent")
        _expect(s.start == s.parent.end, f"{name} does not start where its parent ends")
        _expect(s.namespace == s.parent.namespace, f"{name} has another namespace")
        complete = s.parent.computed == s.parent.end
        _expect(s.computed == s.start or complete, f"{name} is computed below an uncomputed parent")
    if s.pending_src >= 0:
        possible = (
            s.parent is not None
            and s.start % tree.page_size != 0
            and s.computed == s.start
            and s.pending_src == s.parent.pages[-1] != s.pages[0]
        )
        _expect(possible, f"{name} waits for an impossible copy from page {s.pending_src}")
    if s.handles == 0 and len(s.children) == 1:
        _expect(s.children[0].pending_src >= 0, f"{name} was not merged with its single child")


def _check_flights(tree: SegmentTree) -> None:
    for items in tree.flights.values():
        for item in items:
            s = item.segment
            if s is None:
                continue
            _expect(tree.segments.get(s.id) is s, "a plan computes a segment that is gone")
            inside = s.start <= item.start < item.stop <= s.end
            _expect(inside, f"segment {s.id} is in a plan for tokens it does not have")


def _check_index(tree: SegmentTree) -> None:
    index, live = tree.index, _recount(tree)
    children: dict[int, set[int]] = {page: set() for page in index.nodes}
    for page, node in index.nodes.items():
        key = (node.namespace, node.parent, node.tokens)
        _expect(index.by_key.get(key) == page, f"page {page} is not found under its tokens")
        cached = page in index.cached
        _expect(cached == (live[page] == 0), f"page {page} is wrongly (not) marked cached")
        if node.parent >= 0:
            _expect(node.parent in index.nodes, f"page {page} hangs below an unindexed page")
            _expect(cached or live[node.parent] > 0, f"live page {page} hangs below a cached one")
            children[node.parent].add(page)
        owner = tree.owner(page)
        if owner is not None:
            k = tree.floor(owner.start) + owner.pages.index(page)
            start, stop = k * tree.page_size, (k + 1) * tree.page_size
            _expect(stop <= owner.computed, f"page {page} is indexed before it is computed")
            tokens = tuple(tree.tokens(owner, start, stop))
            _expect(tokens == node.tokens, f"page {page} is indexed under tokens it does not hold")
            before = -1 if k == 0 else tree.page_at(owner, k - 1)
            _expect(before == node.parent, f"page {page} hangs below a page not before it")
            _expect(owner.namespace == node.namespace, f"page {page} is in another namespace")
    for page, node in index.nodes.items():
        _expect(node.children == children[page], f"page {page} miscounts the pages below it")
    _expect(len(index.by_key) == len(index.nodes), "the index has keys without pages")


def _check_pages(tree: SegmentTree) -> None:
    refs = _recount(tree)
    refs.update(tree.index.nodes.keys())
    free = tree.pool.free
    _expect(len(free) == len(set(free)), "a page is on the free list twice")
    for page, count in enumerate(tree.pool.refs):
        _expect(count == refs[page], f"page {page} counts {count} refs, recount {refs[page]}")
    _expect(
        set(free) == {page for page in range(tree.num_pages) if refs[page] == 0},
        "the free list is not the set of pages without refs",
    )
    _expect(not tree.pool.retained.intersection(free), "a free page is marked to be kept")


def _recount(tree: SegmentTree) -> Counter[int]:
    """References that keep pages live."""
    refs: Counter[int] = Counter()
    for s in tree.segments.values():
        refs.update(s.pages)
        refs.update([s.pending_src] if s.pending_src >= 0 else [])
    return refs
