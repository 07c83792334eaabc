"""Budgets, the meter, and the statistics that a live view reads."""

from __future__ import annotations

import math
import sys
import threading

import numpy as np
import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import MCTS, BeamSearch, Budget, start_search
from dendrite_engine.search.budget import BatchPlan, Meter
from dendrite_engine.search.stats import StatsTable
from dendrite_engine.search.tree import STATUSES, Tree

WAIT = 60


@pytest.mark.parametrize("name", ["tokens", "nodes", "pages", "iterations"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "9", math.nan])
def test_a_budget_takes_positive_integers(name, value):
    with pytest.raises(InvalidArgument, match=rf"budget\.{name}"):
        Budget(**{name: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "1", True])
def test_seconds_are_a_positive_finite_number(value):
    with pytest.raises(InvalidArgument, match=r"budget\.seconds"):
        Budget(seconds=value)


def test_the_batch_is_cut_to_what_every_limit_leaves():
    meter = Meter(Budget(tokens=100, nodes=50, iterations=7, pages=10), page_size=16)
    plan = BatchPlan(trials=8, minimum=1, tokens=20, nodes=1)
    assert meter.allow(plan) == (5, None), "5 * 20 tokens, 5 * 2 pages"
    meter.tokens = 41
    assert meter.allow(plan) == (2, None)
    meter.tokens = 81
    assert meter.allow(plan) == (0, "tokens")
    meter.tokens, meter.iterations = 0, 7
    assert meter.allow(plan) == (0, "iterations")
    meter.iterations, meter.nodes = 0, 48
    assert meter.allow(plan) == (2, None)
    assert meter.allow(BatchPlan(trials=8, minimum=3, tokens=20)) == (0, "nodes")


def test_seconds_count_only_between_begin_and_end():
    now = [10.0]
    meter = Meter(Budget(seconds=3), clock=lambda: now[0])
    meter.begin()
    now[0] += 2
    meter.end()
    now[0] += 100
    assert meter.seconds == 2
    assert meter.allow(BatchPlan(1)) == (1, None)
    meter.begin()
    now[0] += 1
    assert meter.allow(BatchPlan(1)) == (0, "seconds")
    meter.end()
    meter.end()
    assert meter.usage().seconds == 3


# -- statistics -----------------------------------------------------------------------------------


def searched(iterations=60, **options):
    engine = FakeEngine(9, eos=0.0)
    options = {"width": 3, "tokens_per_node": 2, **options}
    handle = start_search(
        engine, engine.prompt([1, 2, 3]), MCTS(**options), Budget(iterations=iterations)
    )
    handle.wait(WAIT)
    return handle


def test_stats_are_the_numbers_of_the_nodes():
    handle = searched()
    state, algorithm = handle._session.state, handle.algorithm
    stats = handle.stats()
    assert len(stats) == len(state.tree)
    assert set(stats.columns()) >= {"branch_id", "visits", "value", "prior", "uct"}
    for i, node in enumerate(state.tree.nodes):
        assert stats.branch_id[i] == node.branch_id
        assert stats["visits"][i] == node.visits
        assert stats.value[i] == node.value
        assert stats.prior[i] == node.prior
        assert stats.uct[i] == algorithm.rank(state, node)
        assert stats.parent_id[i] == (-1 if node.parent is None else node.parent.id)
        assert STATUSES[stats.status[i]] == node.status
    # UCT by hand for one child
    child = state.tree.root.children[1]
    by_hand = child.value + 1.414 * math.sqrt(math.log(state.tree.root.visits) / child.visits)
    assert stats.uct[child.id] == pytest.approx(by_hand)


def test_changes_since_a_version_bring_a_copy_up_to_date():
    engine = FakeEngine(9, eos=0.0)
    handle = start_search(
        engine,
        engine.prompt([1, 2, 3]),
        MCTS(width=3, tokens_per_node=2),
        Budget(iterations=200),
        paused=True,
    )
    handle.wait_paused(WAIT)
    mirror: dict[int, tuple] = {}
    version, sizes = -1, []
    while handle.state == "paused":
        handle.step()
        assert handle.wait_paused(WAIT)
        delta = handle.changed_since(version)
        version = delta.version
        sizes.append(len(delta))
        for i, branch_id in enumerate(delta.branch_id.tolist()):
            mirror[branch_id] = (delta.visits[i], delta.value[i], delta.uct[i], delta.status[i])
        assert len(handle.changed_since(version)) == 0
    handle.wait(WAIT)
    full = handle.stats()
    assert full.version >= version
    last = handle.changed_since(version)
    for i, branch_id in enumerate(last.branch_id.tolist()):
        mirror[branch_id] = (last.visits[i], last.value[i], last.uct[i], last.status[i])
    assert mirror == {
        branch_id: (full.visits[i], full.value[i], full.uct[i], full.status[i])
        for i, branch_id in enumerate(full.branch_id.tolist())
    }
    assert np.mean(sizes[20:]) < 0.5 * len(full), "a delta is smaller than the whole"


def test_stats_are_copies():
    handle = searched()
    stats = handle.stats()
    stats.visits[:] = -1
    assert handle.stats().visits.min() >= 0


def test_stats_may_be_read_while_the_search_runs():
    engine = FakeEngine(9, eos=-1.0)
    handle = start_search(
        engine,
        engine.prompt([1, 2, 3]),
        MCTS(width=3, tokens_per_node=1, parallel=8),
        Budget(iterations=800),
    )
    problems = []

    def read():
        while handle.state == "running":
            stats = handle.stats()
            if stats.visits[0] > 0 and stats.visits[0] != stats.visits[stats.parent_id == 0].sum():
                problems.append(stats.visits[0])

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    handle.wait(WAIT)
    for thread in threads:
        thread.join(WAIT)
    assert problems == []


def test_a_delta_costs_what_changed_and_not_what_is_there():
    root = FakeEngine().prompt([1])
    tree, table, ranked = Tree(root), StatsTable(), []
    for i in range(10_000):
        node = tree.add(tree.nodes[i // 3], (1,), (-1.0,))
        node.branch_id = i + 2
    table.refresh(tree, lambda node: 0.0)
    version = table.since(-1).version
    tree.touch(tree.nodes[5000])
    table.refresh(tree, lambda node: ranked.append(node.id) or 1.0)
    assert ranked == [5000]
    assert table.since(version).node_id.tolist() == [5000]


def test_beam_stats_rank_by_score_and_skip_nodes_without_a_branch():
    engine = FakeEngine(9, eos=-1e9)
    handle = start_search(
        engine, engine.prompt([1, 2]), BeamSearch(width=3, max_tokens=9), paused=True
    )
    handle.step(5)
    assert handle.wait_paused(WAIT)
    stats = handle.stats()
    assert len(set(stats.branch_id.tolist())) == len(stats)
    for node in handle._session.state.live:
        (row,) = np.nonzero(stats.branch_id == node.branch.id)[0]
        assert stats.uct[row] == pytest.approx(handle._session.state.total[node.id] / 5)
    handle.stop()
    handle.wait(WAIT)


def test_importing_search_loads_neither_numpy_nor_torch():
    import subprocess

    code = (
        "import sys; import dendrite_engine.search as s; s.SEARCHES.names(); s.Budget(tokens=1); "
        "print([m for m in ('numpy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
