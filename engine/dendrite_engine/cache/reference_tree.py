"""Segment tree of the pure-Python control plane."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dendrite_engine.cache.reference_pages import PagePool, PrefixIndex
from dendrite_engine.errors import OutOfPages


@dataclass(eq=False)
class Segment:
    """An append-only run of tokens at positions [start, end) and the pages that hold them.

    Pages cover floor(start) .. end in whole pages: when start is inside a page, the first page
    holds the slots before it too, and readers below use it instead of the parent's.
    """

    id: int
    parent: Segment | None
    start: int
    namespace: str
    computed: int  # K and V of [start, computed) are in the pages
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    pending_src: int = -1  # page whose first slots are to be copied to pages[0]
    children: list[Segment] = field(default_factory=list)
    handles: int = 0  # branches whose tail this is

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def refs(self) -> int:
        """Holders: branches and child segments."""
        return self.handles + len(self.children)

    def chain(self) -> Iterator[Segment]:
        """This segment and those above it, root last."""
        segment: Segment | None = self
        while segment is not None:
            yield segment
            segment = segment.parent


@dataclass(eq=False)
class FlightItem:
    """Tokens [start, stop) of a segment that an open plan computes."""

    segment: Segment | None  # None: dropped since
    start: int
    stop: int


class SegmentTree:
    """Structure and growth of the tree; every method expects checked arguments."""

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool, debug: bool) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.pool = PagePool(num_pages, debug=debug)
        self.index = PrefixIndex(self.pool, page_size, enabled=prefix_cache)
        self.segments: dict[int, Segment] = {}
        self.flights: dict[int, list[FlightItem]] = {}  # by plan id
        self.next_id = 1
        self.num_released = 0  # pages that stopped being live, ever
        self.cow_copies = self.prefix_hits = self.prefix_hit_tokens = 0

    def floor(self, position: int) -> int:
        """Number of the page that holds `position`."""
        return position // self.page_size

    def ceil(self, position: int) -> int:
        """Pages that positions [0, position) touch."""
        return -(-position // self.page_size)

    # --- reading ---

    def page_at(self, segment: Segment, k: int) -> int:
        """The page that readers of this chain use for page number k: the deepest one listed."""
        for s in segment.chain():
            if self.floor(s.start) <= k:
                return s.pages[k - self.floor(s.start)]
        raise IndexError(k)

    def tokens(self, tail: Segment, start: int, stop: int) -> list[int]:
        """Token ids of the chain at positions [start, stop)."""
        out: list[int] = []
        for s in tail.chain():
            if s.end <= start:
                break
            out = s.tokens[max(0, start - s.start) : max(0, stop - s.start)] + out
        return out

    def owner(self, page: int) -> Segment | None:
        """The segment that holds the last slot of the page, if one is live."""
        for s in self.segments.values():
            if page in s.pages:
                k = self.floor(s.start) + s.pages.index(page)
                if (k + 1) * self.page_size <= s.end:
                    return s
        return None

    def in_flight(self, segment: Segment) -> int:
        """Items of open plans that compute the segment."""
        return sum(item.segment is segment for items in self.flights.values() for item in items)

    # --- structure ---

    def hang(self, parent: Segment | None, start: int, namespace: str) -> Segment:
        """A new segment below `parent`, not held by anybody yet."""
        segment = Segment(self.next_id, parent, start, namespace, computed=start)
        self.next_id += 1
        self.segments[segment.id] = segment
        if parent is not None:
            parent.children.append(segment)
        return segment

    def split(self, segment: Segment, position: int) -> Segment:
        """Cut at start < position < end: a new head takes the part before, `segment` the rest."""
        head = self.hang(None, segment.start, segment.namespace)
        self._replace_child(segment, head)
        kept, base = position - segment.start, self.floor(segment.start)
        head.tokens, segment.tokens = segment.tokens[:kept], segment.tokens[kept:]
        head.logprobs, segment.logprobs = segment.logprobs[:kept], segment.logprobs[kept:]
        pages = segment.pages
        head.pages = pages[: self.ceil(position) - base]
        segment.pages = pages[self.floor(position) - base :]
        if position % self.page_size:
            self.pool.refs[segment.pages[0]] += 1  # both list the page that is cut
        head.pending_src, segment.pending_src = segment.pending_src, -1
        head.computed = min(segment.computed, position)
        segment.computed = max(segment.computed, position)
        segment.start = position
        segment.parent = head
        head.children = [segment]
        self._split_flights(segment, head, position)
        return head

    def _split_flights(self, segment: Segment, head: Segment, position: int) -> None:
        for items in self.flights.values():
            for item in list(items):
                if item.segment is not segment or item.start >= position:
                    continue
                if item.stop <= position:
                    item.segment = head
                else:
                    items.append(FlightItem(head, item.start, position))
                    item.start = position

    def _replace_child(self, old: Segment, new: Segment) -> None:
        new.parent = old.parent
        if old.parent is not None:
            old.parent.children[old.parent.children.index(old)] = new

    def drop_page(self, page: int) -> None:
        """Drop a reference that kept the page live."""
        refs, index = self.pool.refs, self.index
        refs[page] -= 1
        node = index.nodes.get(page)
        if refs[page] > (node is not None):
            return
        self.num_released += 1
        if node is not None:
            if page in self.pool.retained or node.children:
                index.make_cached(page)
                return
            index.remove(page)
        self.pool.put_back(page)

    def collect(self, segment: Segment | None) -> None:
        """Free a segment that lost a holder when it was the last, and so on up; else merge."""
        while segment is not None:
            if segment.refs > 0:
                self.try_merge(segment)
                return
            for page in reversed(segment.pages):
                self.drop_page(page)
            if segment.pending_src >= 0:
                self.drop_page(segment.pending_src)
            self._retarget(segment, None)
            del self.segments[segment.id]
            if segment.parent is not None:
                segment.parent.children.remove(segment)
            segment = segment.parent

    def _retarget(self, old: Segment, new: Segment | None) -> None:
        for items in self.flights.values():
            for item in items:
                if item.segment is old:
                    item.segment = new

    def try_merge(self, segment: Segment) -> None:
        """Merge the segment into its child while that child is its only holder."""
        while segment.handles == 0 and len(segment.children) == 1:
            child = segment.children[0]
            if not self._merge_into_child(segment, child):
                return
            segment = child

    def _join_pages(self, parent: Segment, child: Segment) -> list[int] | None:
        """Pages of the merged segment; None while the child must keep a page of its own."""
        if child.start % self.page_size == 0:
            return parent.pages + child.pages
        upper, lower = parent.pages[-1], child.pages[0]
        if child.pending_src >= 0:
            # The copy may be on its way, or somebody else may need either page as it is.
            refs = self.pool.refs
            if self.in_flight(child) or refs[upper] != 2 or refs[lower] != 1:
                return None
            child.pending_src = -1
            self.drop_page(upper)
            self.pool.unseal(upper)
            if lower in self.pool.retained:
                self.pool.retained.add(upper)
            self.drop_page(lower)
            return parent.pages + child.pages[1:]
        self.drop_page(upper)  # the same page listed twice, or one whose slots were copied
        return parent.pages[:-1] + child.pages

    def _merge_into_child(self, parent: Segment, child: Segment) -> bool:
        pages = self._join_pages(parent, child)
        if pages is None:
            return False
        if parent.computed < parent.end:
            child.computed = parent.computed
        child.pages = pages
        child.start = parent.start
        child.tokens = parent.tokens + child.tokens
        child.logprobs = parent.logprobs + child.logprobs
        child.pending_src = parent.pending_src
        self._retarget(parent, child)
        self._replace_child(parent, child)
        del self.segments[parent.id]
        return True

    def segment_ending_at(self, tail: Segment, position: int) -> Segment:
        """The chain's segment that ends at 1 <= position <= tail.end, cut if need be."""
        segment = next(s for s in tail.chain() if s.start < position)
        return self.split(segment, position) if segment.end > position else segment

    # --- growth ---

    def check_pages(self, need: int, protected_cached: int = 0) -> None:
        """Raise OutOfPages unless `need` pages are free or can be evicted."""
        free, cached = len(self.pool.free), len(self.index.cached) - protected_cached
        if need > free + cached:
            raise OutOfPages(need, free, cached, self.num_pages - free - cached, self.num_pages)

    def take_pages(self, count: int, *, retain: bool) -> list[int]:
        """Take pages that check_pages promised."""
        while len(self.pool.free) < count:
            self.index.evict_one()
        pages = [self.pool.take() for _ in range(count)]
        if retain:
            self.pool.retained.update(pages)
        return pages

    def append(
        self,
        tail: Segment,
        tokens: Sequence[int],
        logprobs: Sequence[float] | None,
        *,
        retain: bool,
    ) -> Segment:
        """Add tokens for one holder of `tail`; returns that holder's new tail."""
        if not tokens:
            return tail
        end, inside = tail.end, tail.end % self.page_size != 0
        in_place = tail.refs == 1 and not (inside and self.pool.refs[tail.pages[-1]] > 1)
        need = self.ceil(end + len(tokens)) - (self.ceil(end) if in_place else self.floor(end))
        self.check_pages(need)
        target = tail
        if not in_place:
            target = self.hang(tail, end, tail.namespace)
            tail.handles -= 1
            target.handles = 1
            if inside:
                target.pending_src = tail.pages[-1]
                self.pool.refs[target.pending_src] += 1
                self.cow_copies += 1
        elif inside:
            self.pool.unseal(tail.pages[-1])
            if retain:
                self.pool.retained.add(tail.pages[-1])
        target.pages += self.take_pages(need, retain=retain)
        target.tokens += tokens
        target.logprobs += [math.nan] * len(tokens) if logprobs is None else logprobs
        return target

    def create(self, tokens: Sequence[int], namespace: str) -> tuple[Segment, int]:
        """A new tail for a prompt and the number of its tokens found in the index."""
        path: list[int] = []
        if self.index.enabled:
            path = self.index.match(namespace, tokens, (len(tokens) - 1) // self.page_size)
        need = self.ceil(len(tokens)) - len(path)
        self.check_pages(need, sum(page in self.index.cached for page in path))

        # Hang below the live segment that holds the longest part of the path to its last slot.
        parent: Segment | None = None
        owned = 0
        for k, page in enumerate(path):
            owner = self.owner(page)
            if owner is None:
                break
            parent, owned = owner, k + 1
        start = owned * self.page_size
        if parent is not None and parent.end > start:
            parent = self.split(parent, start)
        tail = self.hang(parent, start, namespace)
        tail.handles = 1
        self.pool.retained.update(path)
        for page in path[owned:]:
            self.index.make_live(page)
            self.pool.refs[page] += 1
        tail.pages = path[owned:] + self.take_pages(need, retain=True)
        tail.tokens = list(tokens[start:])
        tail.logprobs = [math.nan] * len(tail.tokens)
        tail.computed = len(path) * self.page_size
        self.prefix_hits += bool(path)
        self.prefix_hit_tokens += tail.computed
        return tail, tail.computed

    def unindex_partial_page(self, tail: Segment) -> None:
        """After a rollback: a page that its sole owner will rewrite leaves the index."""
        if tail.refs != 1 or tail.end % self.page_size == 0:
            return
        page = tail.pages[-1]
        if page in self.index.nodes and self.pool.refs[page] == 2:
            self.index.remove_subtree(page)

    # --- computing ---

    def close_flight(self, items: list[FlightItem], *, computed: bool) -> None:
        """Finish a plan whose items were taken out of `flights`; mark them when computed."""
        if computed:
            items = sorted(items, key=lambda item: item.start)  # pages enter the index root first
            for item in items:
                segment = item.segment
                if segment is not None and item.start <= segment.computed < item.stop:
                    self._mark_computed(segment, item.stop)
        for item in items:  # merges that had to wait for the copies of this plan
            segment = item.segment
            while segment is not None and (parent := segment.parent) is not None:
                if parent.refs != 1 or not self._merge_into_child(parent, segment):
                    break
                for other in items:
                    if other.segment is parent:
                        other.segment = segment

    def _mark_computed(self, segment: Segment, stop: int) -> None:
        first, segment.computed = self.floor(segment.computed), stop
        if segment.pending_src >= 0:
            self.drop_page(segment.pending_src)
            segment.pending_src = -1
        for k in range(first, self.floor(stop)):
            page = self.page_at(segment, k)
            parent = -1 if k == 0 else self.page_at(segment, k - 1)
            self.pool.seal(page)
            if not self.index.enabled or page in self.index.nodes:
                continue
            if parent >= 0 and parent not in self.index.nodes:
                continue
            tokens = self.tokens(segment, k * self.page_size, (k + 1) * self.page_size)
            self.index.insert(page, segment.namespace, parent, tokens)
