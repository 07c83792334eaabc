"""The native control plane and its twin driven side by side, with checks from the outside."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from core_memory import Memory, check_plan

from dendrite_engine.cache import make_core
from dendrite_engine.errors import DendriteError

PLAN_ARRAYS = (
    *("token_ids", "positions", "slots", "copies", "logits_row", "item_indptr"),
    *("node_pos", "node_len", "node_row_begin", "node_row_end"),
    *("node_page_indptr", "page_indices", "num_tokens", "num_items", "num_nodes"),
)
ERROR_NUMBERS = ("need", "free", "cached", "live", "budget")


def plain(value: Any) -> Any:
    """Numpy to lists with dtype, NaN to None, so that == compares everything."""
    if isinstance(value, np.ndarray):
        items = [None if isinstance(x, float) and math.isnan(x) else x for x in value.tolist()]
        return (str(value.dtype), value.shape, items)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value


def outcome(call: Any, *args: Any) -> tuple[str, Any]:
    """What a call returned, or the class, text and numbers of what it raised."""
    try:
        return "returned", call(*args)
    except DendriteError as error:
        numbers = [getattr(error, name, None) for name in ERROR_NUMBERS]
        return "raised", (type(error), str(error), numbers)


class PlanPair:
    """One plan on both implementations, executed on the symbolic memory when it was made."""

    def __init__(self, native: Any, twin: Any) -> None:
        self.native, self.twin = native, twin

    def close(self, verb: str) -> tuple[str, Any]:
        results = [outcome(getattr(plan, verb)) for plan in (self.native, self.twin)]
        assert results[0] == results[1]
        return results[0]


class CorePair:
    """Every call goes to both implementations; results, errors and states must be equal."""

    def __init__(self, num_pages: int, page_size: int, prefix_cache: bool = True) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.native = make_core(num_pages, page_size, prefix_cache, True, "native")
        self.twin = make_core(num_pages, page_size, prefix_cache, True, "reference")
        self.memory = Memory(num_pages, page_size)
        self.live: list[int] = []
        self.dead: list[int] = []

    def call(self, method: str, *args: Any) -> tuple[str, Any]:
        """Run on both; a call that raises must leave the state as it was."""
        before = self.native.dump()
        kind, value = outcome(getattr(self.native, method), *args)
        twin_kind, twin_value = outcome(getattr(self.twin, method), *args)
        assert (kind, plain(value)) == (twin_kind, plain(twin_value)), method
        if kind == "raised":
            assert self.native.dump() == before, f"{method} raised and changed the state"
        return kind, value

    def make(self, method: str, *args: Any) -> list[int]:
        """A call that returns new handles; they are remembered as live."""
        kind, value = self.call(method, *args)
        if kind == "raised":
            return []
        made = value if isinstance(value, list) else [value[0] if method == "create" else value]
        assert not set(made) & {*self.live, *self.dead}, "a handle was used again"
        self.live += made
        return made

    def prune(self, branch: int) -> None:
        owned = int(self.native.describe([branch])["owned_pages"][0])
        pages_live = self.native.stats()["pages_live"]
        kind, released = self.call("prune", branch)
        assert kind == "returned"
        assert released == pages_live - self.native.stats()["pages_live"]
        assert owned <= released <= owned + 1
        self.bury(branch)

    def bury(self, branch: int) -> None:
        """The handle is over."""
        self.live.remove(branch)
        self.dead.append(branch)

    def plan(self, branches: list[int], quotas: list[int]) -> PlanPair | None:
        before = self.native.dump()
        results = [outcome(core.plan, branches, quotas) for core in (self.native, self.twin)]
        if results[0][0] == "raised":
            assert results[0] == results[1]
            assert self.native.dump() == before
            return None
        native, twin = results[0][1], results[1][1]
        for name in PLAN_ARRAYS:
            assert plain(getattr(native, name)) == plain(getattr(twin, name)), name
        check_plan(self.native, native, branches, quotas)
        self.memory.execute(self.native, native, branches)
        return PlanPair(native, twin)

    def compute_all(self, quota: int = 1 << 20) -> None:
        """Plan and commit until nothing is pending."""
        while self.live and max(self.native.pending(self.live)) > 0:
            plan = self.plan(self.live, [quota] * len(self.live))
            assert plan is not None
            plan.close("commit")
            self.check()

    def check(self) -> None:
        """Equal dumps, both recounts, conservation, and the content of every computed slot."""
        dump = self.native.dump()
        assert dump == self.twin.dump()
        self.native.check_integrity()
        self.twin.check_integrity()
        self._check_conservation(dump)
        for method in ("page_refs", "page_state", "refcount_histogram"):
            self.call(method)
        branches = [*self.live, *self.dead[-2:]]
        self.call("describe", branches)
        self.call("pending", branches)
        self.call("page_tables", self.live)
        for branch in self.live:
            self.memory.check_branch(self.native, branch)

    def _check_conservation(self, dump: dict[str, Any]) -> None:
        """Recount pages from the chains alone: each page is in exactly one of three states."""
        refs: Counter[int] = Counter()
        for segment in dump["segments"]:
            refs.update(segment["pages"])
            if segment["pending_src"] >= 0:
                refs[segment["pending_src"]] += 1
        live = set(refs)
        indexed = {node["page"] for node in dump["index"]}
        cached, free = indexed - live, set(dump["free_list"])
        refs.update(indexed)
        assert len(free) == len(dump["free_list"])
        assert not free & (live | indexed)
        assert len(free) + len(live) + len(cached) == self.num_pages
        assert dump["page_refs"] == [refs[page] for page in range(self.num_pages)]
        stats = dump["stats"]
        counted = (stats["pages_free"], stats["pages_live"], stats["pages_cached"])
        assert counted == (len(free), len(live), len(cached))
        assert set(dump["lru"]) == cached
        held = self._count_holders()
        assert stats["pages_shared"] == sum(n > 1 for n in held.values())
        assert self.native.refcount_histogram() == dict(Counter(held.values()))

    def _count_holders(self) -> Counter[int]:
        held: Counter[int] = Counter()
        for branch in self.live:
            held.update({page for s in self.native.segments(branch) for page in s[4]})
        return held
