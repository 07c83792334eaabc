"""Page pool and prefix index of the pure-Python control plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dendrite_engine.errors import InvalidArgument


class PagePool:
    """Reference counts, per-page flags and the free list.

    A page is on the free list exactly when its refs are 0. refs = segments that list the page
    + pending copies that read it + 1 when it is in the prefix index.
    """

    def __init__(self, num_pages: int, *, debug: bool) -> None:
        self.debug = debug  # keep the event lists below
        self.refs = [0] * num_pages
        self.free = list(range(num_pages - 1, -1, -1))  # a stack; the last one is taken next
        self.retained: set[int] = set()  # stay cached when their segment dies
        self.sealed: set[int] = set()  # full and computed
        self.num_taken = 0
        self.taken: list[int] = []
        self.freed: list[int] = []
        self.newly_sealed: list[int] = []
        self.newly_unsealed: list[int] = []

    def take(self) -> int:
        """Pop the free list; the page has one reference. The caller checked that there is one."""
        page = self.free.pop()
        self.refs[page] = 1
        self.num_taken += 1
        if self.debug:
            self.taken.append(page)
        return page

    def put_back(self, page: int) -> None:
        """Return a page whose refs reached 0."""
        self.retained.discard(page)
        self.sealed.discard(page)
        self.free.append(page)
        if self.debug:
            self.freed.append(page)

    def seal(self, page: int) -> None:
        """Note that every slot of the page is computed."""
        if page not in self.sealed:
            self.sealed.add(page)
            if self.debug:
                self.newly_sealed.append(page)

    def unseal(self, page: int) -> None:
        """Note that slots of the page are about to be written again."""
        if page in self.sealed:
            self.sealed.remove(page)
            if self.debug:
                self.newly_unsealed.append(page)


@dataclass
class IndexNode:
    """One indexed page: its key and the pages below it."""

    namespace: str
    parent: int  # page, -1 under the root
    tokens: tuple[int, ...]
    children: set[int] = field(default_factory=set)


class PrefixIndex:
    """Radix tree over whole computed pages, keyed by exact token ids, one root per namespace.

    A node's parent is the page before it in the chain that inserted it, so a live page has a live
    parent and all descendants of a cached page are cached.
    """

    def __init__(self, pool: PagePool, page_size: int, *, enabled: bool) -> None:
        self.pool = pool
        self.page_size = page_size
        self.enabled = enabled
        self.nodes: dict[int, IndexNode] = {}
        self.by_key: dict[tuple[str, int, tuple[int, ...]], int] = {}
        self.cached: dict[int, None] = {}  # least recently used first
        self.num_evicted = 0

    def match(self, namespace: str, tokens: Sequence[int], max_pages: int) -> list[int]:
        """Pages of the longest indexed path of at most `max_pages` whole pages."""
        path: list[int] = []
        for k in range(max_pages):
            words = tuple(tokens[k * self.page_size : (k + 1) * self.page_size])
            page = self.by_key.get((namespace, path[-1] if path else -1, words))
            if page is None:
                break
            path.append(page)
        return path

    def insert(self, page: int, namespace: str, parent: int, tokens: Sequence[int]) -> None:
        """Add a page below `parent`, unless the index has these tokens there already."""
        key = (namespace, parent, tuple(tokens))
        if key in self.by_key:
            return
        self.by_key[key] = page
        self.nodes[page] = IndexNode(*key)
        if parent >= 0:
            self.nodes[parent].children.add(page)
        self.pool.refs[page] += 1

    def remove(self, page: int) -> None:
        """Take a page without children out; its index reference goes."""
        node = self.nodes.pop(page)
        del self.by_key[node.namespace, node.parent, node.tokens]
        if node.parent >= 0:
            self.nodes[node.parent].children.remove(page)
        self.pool.refs[page] -= 1

    def remove_subtree(self, page: int) -> None:
        """Take a page and every (cached) page below it out; those below are freed, oldest first."""
        below = list(self.nodes[page].children)
        for each in below:
            below.extend(self.nodes[each].children)
        for each in [cached for cached in self.cached if cached in below]:
            self._free_cached(each)
        self.remove(page)

    def make_cached(self, page: int) -> None:
        """The last holder besides the index is gone."""
        self.cached[page] = None

    def make_live(self, page: int) -> None:
        """Somebody holds the page again."""
        self.cached.pop(page, None)

    def evict_one(self) -> None:
        """Free the least recently used cached page; the caller knows that there is one.

        It is a leaf: a page becomes cached after all pages below it.
        """
        self._free_cached(next(iter(self.cached)))

    def evict(self, n: int) -> int:
        """Free up to `n` cached pages; returns how many."""
        if n < 0:
            raise InvalidArgument(f"n must be at least 0 (pages to evict), got {n}")
        count = min(n, len(self.cached))
        for _ in range(count):
            self.evict_one()
        return count

    def _free_cached(self, page: int) -> None:
        del self.cached[page]
        self.remove(page)
        self.pool.put_back(page)
        self.num_evicted += 1
