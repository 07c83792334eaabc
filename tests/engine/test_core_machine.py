"""Random calls on the native control plane and its Python twin: same answers, same states."""

from __future__ import annotations

import pytest
from conftest import CORE_EXAMPLES
from core_pair import CorePair, PlanPair
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

STEPS = 50
picks = st.integers(0, 1 << 16)
runs = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["1", "2", "page-1", "page", "page+1", "2page"])),
    min_size=1,
    max_size=4,
)


class CoreMachine(RuleBasedStateMachine):
    """Small pools and few different tokens: pages run out and prefixes are found all the time."""

    page_size = 4

    @initialize(num_pages=st.integers(3, 24), prefix_cache=st.sampled_from([True, True, False]))
    def start(self, num_pages: int, prefix_cache: bool) -> None:
        self.pair = CorePair(num_pages, self.page_size, prefix_cache)
        self.plans: list[PlanPair] = []

    def tokens(self, drawn: list[tuple[int, str]]) -> list[int]:
        sizes = {"1": 1, "2": 2, "page-1": self.page_size - 1, "page": self.page_size}
        sizes |= {"page+1": self.page_size + 1, "2page": 2 * self.page_size}
        return [token for token, size in drawn for _ in range(sizes[size])]

    def pick(self, index: int) -> int:
        """A live branch mostly, now and then a dead one."""
        pool = self.pair.live if index % 16 or not self.pair.dead else self.pair.dead
        return pool[index // 16 % len(pool)] if pool else 5 << 32

    @rule(drawn=runs, namespace=st.sampled_from(["", "", "other"]))
    def create(self, drawn: list[tuple[int, str]], namespace: str) -> None:
        tokens = self.tokens(drawn)
        self.pair.call("match_prefix", tokens, namespace)
        self.pair.make("create", tokens, namespace)

    @rule(index=picks)
    def fork(self, index: int) -> None:
        self.pair.make("fork", self.pick(index))

    @rule(index=picks, n=st.integers(0, 4))
    def fork_many(self, index: int, n: int) -> None:
        self.pair.make("fork_many", self.pick(index), n)

    @rule(index=picks, at=picks)
    def fork_at(self, index: int, at: int) -> None:
        branch = self.pick(index)
        tokens = self.pair.native.num_tokens(branch) if branch in self.pair.live else 1
        self.pair.make("fork_at", branch, at % (tokens + 2))

    @rule(index=picks, drawn=runs, retain=st.booleans(), scored=st.booleans())
    def append(self, index: int, drawn: list[tuple[int, str]], retain: bool, scored: bool) -> None:
        tokens = self.tokens(drawn[:2])
        logprobs = [-i / 8 for i in range(len(tokens))] if scored else None
        self.pair.call("append", self.pick(index), tokens, logprobs, retain)

    @rule(rows=st.lists(st.tuples(picks, st.integers(0, 2)), max_size=5))
    def append_batch(self, rows: list[tuple[int, int]]) -> None:
        branches = [self.pick(index) for index, _ in rows]
        self.pair.call("append_batch", branches, [token for _, token in rows], [-0.5] * len(rows))

    @rule(index=picks, n=picks)
    def rollback(self, index: int, n: int) -> None:
        branch = self.pick(index)
        tokens = self.pair.native.num_tokens(branch) if branch in self.pair.live else 1
        self.pair.call("rollback", branch, n % (tokens + 1))

    @precondition(lambda self: self.pair.live)
    @rule(index=picks)
    def prune(self, index: int) -> None:
        self.pair.prune(self.pair.live[index % len(self.pair.live)])

    @rule(index=picks)
    def prune_twice(self, index: int) -> None:
        for branch in self.pair.dead[-1:]:
            self.pair.call("prune", branch)

    @rule(n=st.integers(-1, 3))
    def evict(self, n: int) -> None:
        self.pair.call("evict", n)

    @precondition(lambda self: len(self.plans) < 3)
    @rule(rows=st.lists(st.tuples(picks, st.integers(0, 9)), max_size=6))
    def plan(self, rows: list[tuple[int, int]]) -> None:
        branches = [self.pick(index) for index, _ in rows]
        plan = self.pair.plan(branches, [quota for _, quota in rows])
        if plan is not None:
            self.plans.append(plan)

    @rule()
    def compute_live(self) -> None:
        """A whole step of an engine: plan and commit at once for everybody."""
        live = self.pair.live
        plan = self.pair.plan(live, [64] * len(live))
        assert plan is not None
        plan.close("commit")

    @precondition(lambda self: self.plans)
    @rule(index=picks, verb=st.sampled_from(["commit", "commit", "cancel"]), again=st.booleans())
    def close_plan(self, index: int, verb: str, again: bool) -> None:
        plan = self.plans.pop(index % len(self.plans))
        plan.close(verb)
        if again:
            plan.close(verb)

    @invariant()
    def both_agree(self) -> None:
        self.pair.check()

    def teardown(self) -> None:
        for plan in self.plans:
            plan.close("cancel")
        for branch in list(self.pair.live):
            self.pair.prune(branch)
            self.pair.check()
        self.pair.call("evict", self.pair.num_pages)
        assert self.pair.native.stats()["pages_free"] == self.pair.num_pages
        assert self.pair.native.dump()["segments"] == []


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_native_core_and_twin_agree_on_any_sequence_of_calls(
    page_size: int, core_examples: int
) -> None:
    machine = type(f"CoreMachine{page_size}", (CoreMachine,), {"page_size": page_size})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, core_examples // 3),
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=core_examples == CORE_EXAMPLES,
            suppress_health_check=list(HealthCheck),
        ),
    )
