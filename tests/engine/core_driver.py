"""Random calls on a `CorePair`, drawn by Hypothesis or by a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

from core_pair import CorePair, PlanPair
from hypothesis import strategies as st

T = TypeVar("T")

WEIGHTS = {
    "create": 6,
    "fork": 3,
    "fork_many": 1,
    "fork_at": 4,
    "append": 6,
    "append_batch": 5,
    "rollback": 4,
    "set_logprobs": 2,
    "prune": 6,
    "draft": 4,
    "adopt": 5,
    "evict": 1,
    "plan": 4,
    "close_plan": 4,
    "step": 6,
    "use_dead_handle": 1,
}
ACTIONS = [name for name, weight in WEIGHTS.items() for _ in range(weight)]


class Draw(Protocol):
    """Where choices come from."""

    def integer(self, low: int, high: int) -> int: ...

    def choice(self, values: Sequence[T]) -> T: ...


class SeededDraw:
    """Uniform choices that depend on the seed alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def choice(self, values: Sequence[T]) -> T:
        return self._random.choice(values)


class HypothesisDraw:
    """Choices that Hypothesis makes, and makes smaller when something fails."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def choice(self, values: Sequence[T]) -> T:
        return self._data.draw(st.sampled_from(values))


class CoreDriver:
    """One tree in a small pool; prompts come from three texts that begin alike."""

    def __init__(self, draw: Draw, page_size: int) -> None:
        self.draw, self.page_size = draw, page_size
        most = draw.choice([5, 12, 24, 48])
        prefix_cache = draw.choice([True, True, True, True, True, False])
        self.pair = CorePair(draw.integer(most // 2, most), page_size, prefix_cache)
        self.plans: list[PlanPair] = []
        self.drafts: list[tuple[int, int]] = []  # of a branch, the draft
        shared = 2 * page_size + 1
        body = [i % 5 for i in range(6 * page_size)]
        self.texts = [body, [*body[:shared], *([7] * 4 * page_size)], [9, *body]]

    def act(self) -> None:
        """One call, and every check after it."""
        getattr(self, self.draw.choice(ACTIONS))()
        self.pair.check()

    def finish(self) -> None:
        """Close and prune everything: no page may be lost."""
        for plan in self.plans:
            plan.close("cancel")
        for branch in list(self.pair.live):
            self.pair.prune(branch)
            self.pair.check()
        self.pair.call("evict", self.pair.num_pages)
        assert self.pair.native.stats()["pages_free"] == self.pair.num_pages
        assert self.pair.native.dump()["segments"] == []

    def _branch(self) -> int:
        return self.draw.choice(self.pair.live) if self.pair.live else 5 << 32

    def _num_tokens(self, branch: int) -> int:
        return self.pair.native.num_tokens(branch) if branch in self.pair.live else 1

    def _length(self, most_pages: int) -> int:
        """Lengths around page boundaries are as likely as all the others."""
        if self.draw.integer(0, 1):
            return self.draw.integer(1, most_pages * self.page_size)
        pages = self.draw.integer(1, most_pages)
        return max(1, pages * self.page_size + self.draw.integer(-1, 1))

    def create(self) -> None:
        tokens = self.draw.choice(self.texts)[: self._length(4)]
        namespace = self.draw.choice(["", "", "", "", "", "other"])
        self.pair.call("match_prefix", tokens, namespace)
        self.pair.make("create", tokens, namespace)

    def fork(self) -> None:
        self.pair.make("fork", self._branch())

    def fork_many(self) -> None:
        self.pair.make("fork_many", self._branch(), self.draw.integer(0, 3))

    def fork_at(self) -> None:
        branch = self._branch()
        self.pair.make("fork_at", branch, self.draw.integer(0, self._num_tokens(branch) + 1))

    def append(self) -> None:
        branch, count = self._branch(), self._length(2) - 1
        held = self._num_tokens(branch)
        tokens = self.draw.choice(self.texts)[held : held + count]
        scored = self.draw.choice([True, False])
        logprobs = [-i / 8 for i in range(len(tokens))] if scored else None
        self.pair.call("append", branch, tokens, logprobs, self.draw.choice([True, False]))

    def append_batch(self) -> None:
        count = self.draw.integer(0, 5)
        branches = [self._branch() for _ in range(count)]
        tokens = [self.draw.integer(0, 2) for _ in range(count)]
        expected = None
        if self.draw.choice([True, False]):  # mostly right; a branch named twice changes itself
            expected = [self._num_tokens(b) + self.draw.choice([0, 0, 0, 1, -1]) for b in branches]
        self.pair.call("append_batch", branches, tokens, [-0.5] * count, expected)

    def set_logprobs(self) -> None:
        branch = self._branch()
        count = self.draw.integer(1, 2 * self.page_size)
        start = self.draw.integer(-1, max(0, self._num_tokens(branch) - count))
        self.pair.call("set_logprobs", branch, start, [-0.5 * i for i in range(count)])

    def rollback(self) -> None:
        branch = self._branch()
        most = self._num_tokens(branch)
        self.pair.call("rollback", branch, self.draw.integer(0, self.draw.choice([2, most])))

    def draft(self) -> None:
        branch, held = self._branch(), self._num_tokens
        tokens = self.draw.choice(self.texts)[held(branch) :][: self.draw.integer(0, 7)]
        self.drafts += [(branch, made) for made in self.pair.make("draft", branch, tokens)]

    def adopt(self) -> None:
        """Mostly what an engine does; also drafts of others, and branches that changed."""
        if not self.drafts:
            return
        branch, draft = self.drafts.pop(self.draw.integer(0, len(self.drafts) - 1))
        branch = self.draw.choice([branch, branch, branch, self._branch()])
        expected = self._num_tokens(branch) + self.draw.choice([0, 0, 0, 0, 1])
        keep = self._num_tokens(draft) - self.draw.choice([0, 0, 1, 2, 5])
        count = self.draw.choice([0, 1, min(3, max(keep, 0)), keep + 1])
        logprobs = [-i / 4 for i in range(max(count, 0))]
        kind, status = self.pair.call("adopt", branch, draft, keep, logprobs, expected)
        if (kind, status) == ("returned", 0):
            self.pair.bury(draft)
            assert self.pair.native.num_tokens(branch) == keep

    def prune(self) -> None:
        if self.pair.live:
            self.pair.prune(self._branch())

    def use_dead_handle(self) -> None:
        for branch in self.pair.dead[-1:]:
            self.pair.call(self.draw.choice(["prune", "fork", "num_tokens"]), branch)
            self.pair.call("append_batch", [branch], [1])
            assert self.pair.plan([branch], [1]) is None

    def evict(self) -> None:
        self.pair.call("evict", self.draw.integer(-1, 3))

    def plan(self) -> None:
        if len(self.plans) == 3:
            return
        branches = [self._branch() for _ in range(self.draw.integer(0, 5))]
        quotas = [self.draw.choice([0, 1, 2, 5, 99, 99, 99, 99]) for _ in branches]
        plan = self.pair.plan(branches, quotas)
        if plan is not None:
            self.plans.append(plan)

    def close_plan(self) -> None:
        if not self.plans:
            return
        plan = self.plans.pop(self.draw.integer(0, len(self.plans) - 1))
        verb = self.draw.choice(["commit", "commit", "cancel"])
        plan.close(verb)
        if self.draw.integer(0, 3) == 0:
            plan.close(verb)

    def step(self) -> None:
        """A whole step of an engine: plan and commit at once for everybody."""
        live = self.pair.live
        plan = self.pair.plan(live, [99] * len(live))
        assert plan is not None
        plan.close("commit")
