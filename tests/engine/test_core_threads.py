"""The control plane under threads: forks, appends and prunes while another thread plans."""

from __future__ import annotations

import random
import sys
import threading

import numpy as np
import pytest

from dendrite_engine.cache import make_core
from dendrite_engine.errors import OutOfPages, StaleBranch


class Crowd:
    """Workers that grow and prune branches of one tree, and a planner that computes them."""

    def __init__(self, implementation: str, steps: int) -> None:
        self.core = make_core(256, 4, True, False, implementation)
        self.root, _ = self.core.create(list(range(50)))
        self.core.plan([self.root], [64]).commit()
        self.steps = steps
        self.alive: dict[int, None] = {}
        self.failures: list[BaseException] = []
        self.commits = 0
        self.done = threading.Event()
        self.start = threading.Barrier(5)

    def guarded(self, body, *args) -> None:
        try:
            self.start.wait()
            body(*args)
        except BaseException as error:  # a thread's failure must reach the test
            self.failures.append(error)
            self.done.set()

    def work(self, seed: int) -> None:
        rng = random.Random(seed)
        mine: list[int] = []
        for _ in range(self.steps):
            if not mine or (len(mine) < 8 and rng.random() < 0.4):
                mine.append(self.fork(rng, rng.choice([*mine, self.root])))
            branch = mine[rng.randrange(len(mine))]
            try:
                self.change(rng, branch)
            except OutOfPages:
                self.drop(mine, branch)
            if rng.random() < 0.3:
                self.drop(mine, mine[rng.randrange(len(mine))]) if mine else None
        for branch in list(mine):
            self.drop(mine, branch)

    def fork(self, rng: random.Random, source: int) -> int:
        tokens = self.core.num_tokens(source)
        branch = self.core.fork_at(source, rng.randint(1, tokens))
        self.alive[branch] = None
        return branch

    def change(self, rng: random.Random, branch: int) -> None:
        before = self.core.tokens(branch).tolist()
        if rng.random() < 0.7 or len(before) == 1:
            more = [rng.randrange(3) for _ in range(rng.randint(1, 6))]
            self.core.append(branch, more)
            assert self.core.tokens(branch).tolist() == before + more
        else:
            n = rng.randrange(1, len(before))
            self.core.rollback(branch, n)
            assert self.core.tokens(branch).tolist() == before[:-n]

    def drop(self, mine: list[int], branch: int) -> None:
        mine.remove(branch)
        del self.alive[branch]
        self.core.prune(branch)
        with pytest.raises(StaleBranch):
            self.core.prune(branch)

    def compute(self) -> None:
        while not self.done.is_set():
            branches = [self.root, *list(self.alive)]
            pending = self.core.pending(branches)
            branches = [b for b, p in zip(branches, pending.tolist(), strict=True) if p >= 0]
            try:
                plan = self.core.plan(branches, [8] * len(branches))
            except StaleBranch:
                continue  # pruned since; the next round does not see it
            assert plan.num_tokens == plan.item_indptr[-1] > 0
            plan.commit() if self.commits % 5 else plan.cancel()
            self.commits += 1

    def run(self) -> None:
        workers = [threading.Thread(target=self.guarded, args=(self.work, i)) for i in range(4)]
        planner = threading.Thread(target=self.guarded, args=(self.compute,))
        for thread in (*workers, planner):
            thread.start()
        for thread in workers:
            thread.join()
        self.done.set()
        planner.join()


@pytest.mark.parametrize(("implementation", "steps"), [("native", 3000), ("reference", 150)])
def test_four_threads_change_the_tree_while_one_plans_and_the_books_stay_true(
    implementation, steps
):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        crowd = Crowd(implementation, steps)
        crowd.run()
    finally:
        sys.setswitchinterval(interval)
    assert crowd.failures == []
    assert crowd.commits > 0
    core = crowd.core
    core.check_integrity()
    stats = core.stats()
    assert stats["branches"] == 1
    assert stats["pages_free"] + stats["pages_live"] + stats["pages_cached"] == 256
    assert core.tokens(crowd.root).tolist() == list(range(50))
    core.prune(crowd.root)
    core.evict(256)
    assert core.stats()["pages_free"] == 256


def test_a_long_plan_lets_other_python_threads_run():
    core = make_core(1 << 17, 16, True, False, "native")
    branch, _ = core.create(np.zeros(1 << 21, dtype=np.int32))
    handles, quotas = np.array([branch]), np.array([1 << 21], dtype=np.int32)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # nobody is asked to give the GIL away: only release counts
    try:
        ran_during_call = [one_call(core, handles, quotas) for _ in range(5)]
    finally:
        sys.setswitchinterval(interval)
    assert any(ran_during_call)


def one_call(core, handles, quotas) -> bool:
    """Whether a thread that waits for the GIL ran before plan() returned."""
    go, ran = threading.Event(), []

    def wait_and_run() -> None:
        go.wait()
        ran.append(True)

    thread = threading.Thread(target=wait_and_run)
    thread.start()
    go.set()
    plan = core.plan(handles, quotas)
    during = bool(ran)
    thread.join()
    plan.cancel()
    return during
