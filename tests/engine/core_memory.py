"""A symbolic K/V memory: what a forward pass would read and write, and oracles over it."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any


def history(tokens: list[int]) -> list[int]:
    """For each position a value that stands for K and V there: it depends on all tokens so far."""
    return list(accumulate(tokens, lambda h, token: hash((h, token)), initial=0))[1:]


def path_table(core: Any, branch: int, stop: int) -> list[int]:
    """Slot of each position below `stop`, from the segments that hold a position below it."""
    page_size, pages = core.page_size, []
    for _, start, _, _, own in core.segments(branch):
        if start < stop:
            pages[start // page_size :] = own
    return [pages[p // page_size] * page_size + p % page_size for p in range(stop)]


def row_slots(core: Any, plan: Any, row: int) -> list[int]:
    """Slots that a row reads, collected from the attention nodes; asserts that they tile."""
    slots: list[int] = []
    for n in range(plan.num_nodes):
        if not plan.node_row_begin[n] <= row < plan.node_row_end[n]:
            continue
        assert plan.node_pos[n] == len(slots), "nodes must tile the positions in order"
        assert plan.node_pos[n] % core.page_size == 0
        pages = plan.page_indices[plan.node_page_indptr[n] : plan.node_page_indptr[n + 1]]
        length = int(plan.node_len[n])
        assert 0 < length <= len(pages) * core.page_size < length + core.page_size
        slots += [
            int(pages[j // core.page_size]) * core.page_size + j % core.page_size
            for j in range(length)
        ]
    position = int(plan.positions[row])
    assert len(slots) > position
    return slots[: position + 1]


def wanted_items(core: Any, branches: list[int], quotas: list[int]) -> dict[int, list[Any]]:
    """By segment id: (branch that asks, from, to, refresh), the largest quota winning."""
    wanted: dict[int, list[Any]] = {}
    for branch, quota in zip(branches, quotas, strict=True):
        computed, segments = core.num_computed(branch), core.segments(branch)
        refresh = computed == core.num_tokens(branch)
        at = computed - 1 if refresh else computed
        segment = next(s for s in segments if s[1] <= at < s[1] + s[2])
        stop = at + 1 if refresh else min(segment[1] + segment[2], at + quota)
        item = wanted.setdefault(segment[0], [branch, at, stop, refresh])
        item[2] = max(item[2], stop)
    return wanted


def check_plan(core: Any, plan: Any, branches: list[int], quotas: list[int]) -> None:
    """Compare a plan with what each branch needs, worked out from its own chain alone."""
    wanted = wanted_items(core, branches, quotas)
    expected = Counter(
        (start, stop, refresh, *core.tokens(branch)[start:stop], *path_table(core, branch, stop))
        for branch, start, stop, refresh in wanted.values()
    )
    found: Counter[Any] = Counter()
    for begin, end in zip(plan.item_indptr[:-1], plan.item_indptr[1:], strict=True):
        start, stop = int(plan.positions[begin]), int(plan.positions[end - 1]) + 1
        slots = row_slots(core, plan, end - 1)
        refresh = plan.slots[begin] == -1
        tokens = plan.token_ids[begin:end].tolist()
        found[(start, stop, bool(refresh), *tokens, *slots)] += 1
        assert plan.positions[begin:end].tolist() == list(range(start, stop))
        stored = [-1] if refresh else slots[start:stop]
        assert plan.slots[begin:end].tolist() == stored
        for row in range(begin, end):
            assert row_slots(core, plan, row) == slots[: plan.positions[row] + 1]
    assert found == expected
    assert plan.num_tokens == plan.item_indptr[-1] == sum(w[2] - w[1] for w in wanted.values())
    for i, branch in enumerate(branches):
        _check_logits_row(core, plan, branch, int(plan.logits_row[i]), wanted)


def _check_logits_row(core: Any, plan: Any, branch: int, row: int, wanted: dict[int, Any]) -> None:
    segment_id, start, length = core.segments(branch)[-1][:3]
    end = start + length
    finished = segment_id in wanted and wanted[segment_id][2] == end
    assert (row >= 0) == finished
    if finished:
        assert plan.positions[row] == end - 1
        assert row_slots(core, plan, row) == path_table(core, branch, end)


class Memory:
    """Slots hold `history` values; None where nothing valid is (the poison of debug mode)."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.slots: list[int | None] = [None] * (num_pages * page_size)
        self.sealed: dict[int, list[int | None]] = {}

    def _page(self, page: int) -> slice:
        return slice(page * self.page_size, (page + 1) * self.page_size)

    def follow_events(self, core: Any) -> None:
        """Poison pages that changed hands; record and verify pages that must not change."""
        taken, freed, sealed = core.debug_events()
        changed = {*taken, *freed}
        rewritten = {*changed, *core.debug_unsealed()}
        for page in rewritten:
            self.sealed.pop(page, None)
        for page, content in self.sealed.items():
            assert self.slots[self._page(page)] == content, f"sealed page {page} was written"
        for page in set(sealed) - rewritten:
            self.sealed[page] = self.slots[self._page(page)]
        for page in changed:
            self.slots[self._page(page)] = [None] * self.page_size

    def execute(self, core: Any, plan: Any, branches: list[int]) -> None:
        """Run a plan: copies, then stores, then reads; every slot read must hold its history."""
        self.follow_events(core)
        for source, target, count in plan.copies.tolist():
            begin = source * self.page_size
            content = self.slots[begin : begin + count]
            assert None not in content, "a copy reads slots that nobody wrote"
            self.slots[target * self.page_size : target * self.page_size + count] = content
        reads = [row_slots(core, plan, row) for row in range(plan.num_tokens)]
        truth = self._row_histories(core, plan, branches, reads)
        for row, slot in enumerate(plan.slots.tolist()):
            if slot >= 0:
                self.slots[slot] = truth[row][-1]
        for row, slots in enumerate(reads):
            assert [self.slots[slot] for slot in slots] == truth[row], f"row {row} reads lies"

    def _row_histories(
        self, core: Any, plan: Any, branches: list[int], reads: list[list[int]]
    ) -> list[list[int]]:
        """What each row must read: the history of a branch that passes through its slots."""
        known: dict[tuple[int, ...], list[int]] = {}
        for branch in branches:
            truth = history(core.tokens(branch).tolist())
            stops = {s[1] + i + 1 for s in core.segments(branch) for i in range(s[2])}
            for stop in stops & {int(p) + 1 for p in plan.positions}:
                known[tuple(path_table(core, branch, stop))] = truth[:stop]
        return [known[tuple(slots)] for slots in reads]

    def check_branch(self, core: Any, branch: int) -> None:
        """Every computed position of the branch must be found in its pages."""
        computed = core.num_computed(branch)
        truth = history(core.tokens(branch).tolist())[:computed]
        slots = path_table(core, branch, computed)
        assert [self.slots[slot] for slot in slots] == truth
