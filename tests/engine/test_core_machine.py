"""Random calls on the native control plane and its Python twin: same answers, same states.

After every call both are recounted, pages are conserved, and each computed slot of a symbolic
memory, written only as the plans say, still holds what its branch needs.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from core_driver import CoreDriver, HypothesisDraw, SeededDraw
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

RUNS, STEPS = 210, 50


class CoreMachine(RuleBasedStateMachine):
    """Hypothesis draws every choice of a `CoreDriver`."""

    # One rule with drawn actions: Hypothesis would switch off a random part of many rules in each
    # run, and without `create` or `plan` nothing happens.
    page_size = 4

    @initialize(data=st.data())
    def start(self, data: Any) -> None:
        self.driver = CoreDriver(HypothesisDraw(data), self.page_size)
        self.driver.create()

    @rule(data=st.data())
    def act(self, data: Any) -> None:
        self.driver.draw = HypothesisDraw(data)
        self.driver.act()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.finish()


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_native_core_and_twin_agree_on_any_sequence_of_calls(
    page_size: int, core_examples: int | None
) -> None:
    machine = type(f"CoreMachine{page_size}", (CoreMachine,), {"page_size": page_size})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=-(-(core_examples or RUNS) // 3),
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=core_examples is None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_seeded_runs_reach_every_corner_and_agree(
    page_size: int, core_examples: int | None
) -> None:
    reached: Counter[str] = Counter()
    seeds = -(-max(core_examples or RUNS, RUNS) // 3)
    for seed in range(seeds):
        driver = CoreDriver(SeededDraw(seed), page_size)
        for _ in range(STEPS):
            driver.act()
        reached.update(driver.pair.native.stats())
        driver.finish()
    corners = ["evictions", "prefix_hits", "rollbacks", "forks", "pages_shared"]
    corners += ["cow_copies"] if page_size > 1 else []
    assert all(reached[corner] > seeds // 4 for corner in corners), reached
