"""Pure-Python twin of the native control plane: same calls, same results, same errors.

It is the oracle of the property tests and stands in, slowly, where the native module is missing.
"""

from __future__ import annotations

import operator
import threading
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from dendrite_engine.cache import reference_inspect as inspect
from dendrite_engine.cache.arguments import (
    as_array,
    check_layout,
    check_range,
    check_same_size,
    check_tokens,
)
from dendrite_engine.cache.reference_drafts import DraftVerbs
from dendrite_engine.cache.reference_integrity import check_integrity
from dendrite_engine.cache.reference_plan import PlanArrays, PlanBuilder
from dendrite_engine.cache.reference_tree import Segment, SegmentTree
from dendrite_engine.errors import EmptyPrompt, InvalidArgument, OutOfPages, StaleBranch

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

MAX_FORKS = 1 << 20


class Plan(PlanArrays):
    """What one forward pass computes; close it with commit() or cancel()."""

    def __init__(
        self, core: TreeCore, plan_id: int, builder: PlanBuilder, tails: list[Segment]
    ) -> None:
        super().__init__(builder, tails)
        self._core = core
        self._id = plan_id

    def commit(self) -> None:
        """Mark the planned tokens as computed, except those dropped since."""
        if not self._core._close_plan(self._id, computed=True):
            raise InvalidArgument("plan was already committed or cancelled; make a new one")

    def cancel(self) -> None:
        """Forget the plan; no effect when it is closed."""
        self._core._close_plan(self._id, computed=False)

    def __del__(self) -> None:
        self.cancel()


class TreeCore(DraftVerbs):
    """Pages, segments and branch handles of one engine; documented in `_core.pyi`."""

    def __init__(
        self, num_pages: int, page_size: int = 16, prefix_cache: bool = True, debug: bool = False
    ) -> None:
        check_layout(num_pages, page_size)
        self._tree = SegmentTree(num_pages, page_size, prefix_cache=prefix_cache, debug=debug)
        self._debug = debug
        self._lock = threading.RLock()
        self._tails: list[Segment | None] = []  # by slot, None: the slot is free
        self._generations: list[int] = []
        self._free_slots: list[int] = []
        self._draft_slots: set[int] = set()
        self._next_plan = 1
        self._forks = self._prunes = self._rollbacks = 0

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self._tree.num_pages

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._tree.page_size

    # --- handles: generation << 32 | slot ---

    def _find(self, branch: int) -> Segment | None:
        slot = branch & 0xFFFFFFFF
        if slot >= len(self._tails) or self._generations[slot] != branch >> 32:
            return None
        return self._tails[slot]

    def _tail(self, branch: int) -> Segment:
        branch = operator.index(branch)
        tail = self._find(branch)
        if tail is None:
            raise StaleBranch(
                f"branch handle {branch} is stale: it was pruned, or belongs to another engine"
            )
        return tail

    def _new_handle(self, tail: Segment) -> int:
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = len(self._tails)
            self._tails.append(None)
            self._generations.append(1)
        self._tails[slot] = tail
        return self._generations[slot] << 32 | slot

    # --- writing ---

    def create(self, tokens: object, namespace: str = "") -> tuple[int, int]:
        """Make a branch of `tokens`; returns (handle, tokens found in the cache)."""
        ids = as_array("tokens", tokens, "int32").tolist()
        if not ids:
            raise EmptyPrompt("tokens is empty: a prompt has at least one token")
        check_tokens(ids)
        with self._lock:
            tail, num_cached = self._tree.create(ids, namespace)
            return self._new_handle(tail), num_cached

    def fork(self, branch: int) -> int:
        """A second handle to the same tokens."""
        return self.fork_many(branch, 1)[0]

    def fork_many(self, branch: int, n: int) -> list[int]:
        """`n` new handles to the same tokens."""
        with self._lock:
            tail = self._tail(branch)
            check_range("n", n, 1, MAX_FORKS, "branches to make")
            tail.handles += n
            self._forks += n
            return [self._new_handle(tail) for _ in range(n)]

    def fork_at(self, branch: int, position: int) -> int:
        """A handle to the first `position` tokens."""
        with self._lock:
            tail = self._tail(branch)
            check_range("position", position, 1, tail.end, "tokens of the branch")
            target = self._tree.segment_ending_at(tail, position)
            target.handles += 1
            self._forks += 1
            return self._new_handle(target)

    def append(
        self, branch: int, tokens: object, logprobs: object = None, retain: bool = False
    ) -> None:
        """Add tokens to one branch, all or none."""
        ids = as_array("tokens", tokens, "int32").tolist()
        values = self._per_token("logprobs", logprobs, "float32", len(ids))
        check_tokens(ids)
        with self._lock:
            tail = self._tail(branch)
            tail = self._tree.append(tail, ids, values, retain=retain)
            self._tails[branch & 0xFFFFFFFF] = tail

    @staticmethod
    def _per_token(name: str, value: object, dtype: str, count: int) -> list[Any] | None:
        if value is None:
            return None
        values: list[Any] = as_array(name, value, dtype).tolist()
        check_same_size(name, len(values), "tokens", count)
        return values

    def append_batch(
        self, branches: object, tokens: object, logprobs: object = None, expected: object = None
    ) -> UInt8Array:
        """One token for each branch; 0 done, 1 out of pages, 2 stale, 3 changed."""
        handles = as_array("branches", branches, "int64").tolist()
        ids = as_array("tokens", tokens, "int32").tolist()
        check_same_size("branches", len(handles), "tokens", len(ids))
        values = self._per_token("logprobs", logprobs, "float32", len(ids))
        lengths = self._per_token("expected", expected, "int32", len(ids))
        check_tokens(ids)
        none = [None] * len(ids)
        rows = zip(handles, ids, values or none, lengths or none, strict=True)
        with self._lock:
            status = [self._append_status(*row) for row in rows]
        return np.array(status, dtype=np.uint8)

    def _append_status(
        self, branch: int, token: int, logprob: float | None, expected: int | None
    ) -> int:
        try:
            if expected is not None and self._tail(branch).end != expected:
                return 3
            self.append(branch, [token], None if logprob is None else [logprob])
        except OutOfPages:
            return 1
        except StaleBranch:
            return 2
        return 0

    def set_logprobs(self, branch: int, start: int, logprobs: object) -> None:
        """Write the logprobs of tokens from `start` on that were appended without."""
        values: list[float] = as_array("logprobs", logprobs, "float32").tolist()
        with self._lock:
            tail = self._tail(branch)
            most = tail.end - len(values)
            check_range("start", start, 0, most, "tokens of the branch less those given")
            inspect.set_logprobs(tail, start, values)

    def rollback(self, branch: int, n: int) -> int:
        """Drop the last `n` tokens of this branch; returns the pages released."""
        with self._lock:
            tail = self._tail(branch)
            check_range("n", n, 1, tail.end - 1, "tokens to drop; at least one stays")
            before = self._tree.num_released
            target = self._tree.segment_ending_at(tail, tail.end - n)
            target.handles += 1
            tail.handles -= 1
            self._tails[branch & 0xFFFFFFFF] = target
            self._tree.collect(tail)
            self._tree.unindex_partial_page(target)
            self._rollbacks += 1
            return self._tree.num_released - before

    def prune(self, branch: int) -> int:
        """End a branch; returns the pages released."""
        with self._lock:
            tail = self._tail(branch)
            before = self._tree.num_released
            self._prunes += branch & 0xFFFFFFFF not in self._draft_slots
            self._retire(branch & 0xFFFFFFFF)
            tail.handles -= 1
            self._tree.collect(tail)
            return self._tree.num_released - before

    def evict(self, n: int) -> int:
        """Free up to `n` cached pages; returns how many."""
        with self._lock:
            return self._tree.index.evict(n)

    def peek_free(self, n: int) -> np.ndarray:
        """See `reference_inspect.peek_free`."""
        with self._lock:
            return inspect.peek_free(self._tree, n)

    # --- computing ---

    def plan(self, branches: object, quotas: object) -> Plan:
        """Plan one forward pass over the branches."""
        handles = as_array("branches", branches, "int64").tolist()
        limits = as_array("quotas", quotas, "int32").tolist()
        check_same_size("branches", len(handles), "quotas", len(limits))
        for i, quota in enumerate(limits):
            if quota < 1:
                raise InvalidArgument(f"quotas[{i}] must be at least 1, got {quota}")
        with self._lock:
            tails = [self._tail(branch) for branch in handles]
            builder = PlanBuilder(self._tree)
            for tail, quota in zip(tails, limits, strict=True):
                builder.request(tail, quota)
            builder.build()
            plan_id, self._next_plan = self._next_plan, self._next_plan + 1
            self._tree.flights[plan_id] = builder.flight()
            return Plan(self, plan_id, builder, tails)

    def _close_plan(self, plan_id: int, *, computed: bool) -> bool:
        with self._lock:
            items = self._tree.flights.pop(plan_id, None)
            if items is None:
                return False
            self._tree.close_flight(items, computed=computed)
            return True

    # --- reading ---

    def num_tokens(self, branch: int) -> int:
        """Tokens of the branch."""
        with self._lock:
            return self._tail(branch).end

    def num_computed(self, branch: int) -> int:
        """Tokens, from the first one on, whose K and V are in pages."""
        with self._lock:
            return inspect.num_computed(self._tail(branch))

    def tokens(self, branch: int, start: int = 0) -> Int32Array:
        """Token ids from `start` on."""
        with self._lock:
            tail = self._tail(branch)
            check_range("start", start, 0, tail.end, "tokens of the branch")
            return np.array(self._tree.tokens(tail, start, tail.end), dtype=np.int32)

    def logprobs(self, branch: int, start: int = 0) -> Float32Array:
        """Logprobs from `start` on, NaN where none was given."""
        with self._lock:
            tail = self._tail(branch)
            check_range("start", start, 0, tail.end, "tokens of the branch")
            values = [x for s in list(tail.chain())[::-1] for x in s.logprobs]
            return np.array(values[start:], dtype=np.float32)

    def pending(self, branches: object) -> Int32Array:
        """num_tokens - num_computed of each branch, -1 for a stale handle."""
        with self._lock:
            tails = [self._find(b) for b in as_array("branches", branches, "int64").tolist()]
            counts = [-1 if t is None else t.end - inspect.num_computed(t) for t in tails]
        return np.array(counts, dtype=np.int32)

    def page_tables(self, branches: object) -> tuple[Int32Array, Int32Array, Int32Array]:
        """Flattened page tables (indptr, indices, last_page_len)."""
        handles = as_array("branches", branches, "int64").tolist()
        with self._lock:
            tails = [self._tail(branch) for branch in handles]
            tables = [inspect.page_table(self._tree, tail) for tail in tails]
        indptr = np.cumsum([0, *(len(table) for table in tables)], dtype=np.int32)
        indices = np.array([page for table in tables for page in table], dtype=np.int32)
        last = [(tail.end - 1) % self.page_size + 1 for tail in tails]
        return indptr, indices, np.array(last, dtype=np.int32)

    def describe(self, branches: object) -> dict[str, Int32Array]:
        """Columns by name, -1 for a stale handle."""
        names = ("num_tokens", "num_computed", "pages", "owned_pages", "tail_refs", "segments")
        with self._lock:
            tails = [self._find(b) for b in as_array("branches", branches, "int64").tolist()]
            rows = [inspect.describe(self._tree, tail) for tail in tails]
        columns = np.array(rows, dtype=np.int32).reshape(-1, len(names))
        return {name: np.ascontiguousarray(columns[:, i]) for i, name in enumerate(names)}

    def segments(self, branch: int) -> list[tuple[int, int, int, int, list[int]]]:
        """Segments of the branch, root first: (segment_id, start, length, refs, pages)."""
        with self._lock:
            chain = list(self._tail(branch).chain())[::-1]
            return [(s.id, s.start, len(s.tokens), s.refs, list(s.pages)) for s in chain]

    def page_refs(self) -> Int32Array:
        """References to each page."""
        with self._lock:
            return np.array(self._tree.pool.refs, dtype=np.int32)

    def page_state(self) -> UInt8Array:
        """State of each page: 0 free, 1 live, 2 cached."""
        with self._lock:
            states = [inspect.page_state(self._tree, page) for page in range(self.num_pages)]
            return np.array(states, dtype=np.uint8)

    def match_prefix(self, tokens: object, namespace: str = "") -> int:
        """Tokens of the prompt that `create` would find in the cache now."""
        ids = as_array("tokens", tokens, "int32").tolist()
        check_tokens(ids)
        with self._lock:
            most = max(0, len(ids) - 1) // self.page_size
            return len(self._tree.index.match(namespace, ids, most)) * self.page_size

    def stats(self) -> dict[str, int]:
        """Counters and gauges by name."""
        with self._lock:
            counts = inspect.stats(self._tree)
            return counts | {
                "branches": counts["branches"] - len(self._draft_slots),
                "forks": self._forks,
                "prunes": self._prunes,
                "rollbacks": self._rollbacks,
            }

    def refcount_histogram(self) -> dict[int, int]:
        """Branches below a page -> number of live pages with that many."""
        with self._lock:
            return dict(sorted(Counter(inspect.holders(self._tree).values()).items()))

    def check_integrity(self) -> None:
        """Recount everything; raises IntegrityError on the first lie."""
        with self._lock:
            check_integrity(self._tree)

    def dump(self) -> dict[str, Any]:
        """The whole state in canonical form."""
        with self._lock:
            handles = [g << 32 | slot for slot, g in enumerate(self._generations)]
            tails = [(h, s.id) for h, s in zip(handles, self._tails, strict=True) if s is not None]
            return inspect.dump(self._tree) | {
                "branches": sorted(tails),
                "free_handles": [handles[slot] for slot in self._free_slots],
                "stats": self.stats(),
            }

    def debug_events(self) -> tuple[list[int], list[int], list[int]]:
        """Pages (taken, freed, sealed) since the last call."""
        with self._lock:
            if not self._debug:
                raise InvalidArgument("debug_events needs TreeCore(debug=True)")
            pool = self._tree.pool
            events = (pool.taken, pool.freed, pool.newly_sealed)
            pool.taken, pool.freed, pool.newly_sealed = [], [], []
            return events

    def debug_unsealed(self) -> list[int]:
        """Sealed pages whose last slots are about to be rewritten, since the last call."""
        with self._lock:
            if not self._debug:
                raise InvalidArgument("debug_unsealed needs TreeCore(debug=True)")
            pool = self._tree.pool
            events, pool.newly_unsealed = pool.newly_unsealed, []
            return events
