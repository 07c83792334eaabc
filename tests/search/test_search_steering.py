"""Steering and watching a running search: live options, prune, boost, pin, events."""

from __future__ import annotations

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import InvalidArgument, SearchError
from dendrite_engine.search import MCTS, Budget, start_search, verifier

ENDLESS = -1e9
WAIT = 60  # seconds; only reached when a test fails


@pytest.fixture
def engine():
    return FakeEngine(9, eos=ENDLESS)


@pytest.fixture
def root(engine):
    return engine.prompt([1, 2, 3])


def start(engine, root, budget=None, *, algorithm=None, **options):
    algorithm = algorithm or MCTS(tokens_per_node=2, width=3, parallel=2)
    return start_search(engine, root, algorithm, budget or Budget(iterations=20), **options)


# -- live options and steering --------------------------------------------------------------------


def test_options_change_at_the_next_select(engine, root):
    handle = start(engine, root, paused=True)
    handle.step(3)
    assert handle.wait_paused(WAIT)
    session = handle._session
    assert session.state.tree.root.attempts == 3
    assert handle.set(width=5, exploration=0.1, parallel=1)
    handle.step(2)
    assert handle.wait_paused(WAIT)
    assert handle.algorithm.width == 5
    assert session.state.tree.root.attempts == 5, "a wider root is filled up first"
    assert handle.usage().iterations == 8
    changes = [e.data for e in engine.trace if e.data.get("state") == "set"]
    assert changes == [{"state": "set", "changes": {"width": 5, "exploration": 0.1, "parallel": 1}}]
    handle.stop()


def test_a_narrower_width_stops_expanding(engine, root):
    handle = start(engine, root, Budget(iterations=60), paused=True)
    handle.step(3)
    assert handle.wait_paused(WAIT)
    handle.set(width=1)
    handle.resume()
    handle.wait(WAIT)
    nodes = handle.tree.nodes
    assert all(len(node.children) <= 1 for node in nodes if node.id > 6)


def test_exploration_changes_which_child_is_visited(engine, root):
    def first(exploration):
        fresh = FakeEngine(9, eos=ENDLESS)
        handle = start(
            fresh,
            fresh.prompt([1, 2, 3]),
            Budget(iterations=200),
            algorithm=MCTS(width=3, tokens_per_node=1, parallel=1, exploration=1.4),
            evaluator=verifier(lambda text: text.split()[0] == "w4"),
            paused=True,
        )
        handle.set(exploration=exploration)
        handle.resume()
        handle.wait(WAIT)
        visits = [c.visits for c in handle.tree.root.children]
        return max(visits) / sum(visits)

    assert first(0.0) > first(5.0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"exploration": -1}, "exploration"),
        ({"width": 0}, "width"),
        ({"width": 2, "parallel": 0}, "parallel"),
        ({"depth": 3}, "depth"),
        ({"expansion": "top_k"}, "expansion"),
    ],
)
def test_a_bad_change_is_refused_and_nothing_changes(engine, root, changes, named):
    handle = start(engine, root, paused=True)
    with pytest.raises(InvalidArgument, match=named):
        handle.set(**changes)
    before = handle.algorithm
    handle.resume()
    handle.wait(WAIT)
    assert handle.algorithm == before


def test_a_pruned_branch_takes_its_subtree_out_of_the_search(engine, root):
    handle = start(engine, root, Budget(iterations=60), paused=True)
    handle.step(15)
    assert handle.wait_paused(WAIT)
    node = max(handle.tree.root.children, key=lambda n: n.visits)
    inside = [n.branch for n in node.subtree()]
    assert len(inside) > 1
    visits = node.visits
    assert handle.prune(node.branch)
    assert handle.wait_paused(WAIT)
    assert not any(branch.is_alive for branch in inside), "also while paused"
    handle.resume()
    result = handle.wait(WAIT)
    assert node.visits == visits
    assert node not in result.node.path()
    assert all(n.status == "pruned" for n in node.subtree())
    engine.check_integrity()


def test_a_boosted_branch_is_visited_and_a_pinned_one_kept(engine, root):
    handle = start(engine, root, Budget(iterations=60), paused=True)
    handle.step(4)
    assert handle.wait_paused(WAIT)
    low = min(handle.tree.root.children, key=lambda n: n.value)
    loser = max(handle.tree.nodes[1:], key=lambda n: (n.parent is not low, -n.value, n.id))
    before = low.visits
    assert handle.boost(low.branch, 100.0)
    assert handle.pin(loser.branch.id)
    handle.resume()
    result = handle.wait(WAIT)
    assert low.visits - before == 60 - 8
    assert loser.branch.is_alive
    result.prune()
    assert engine.branches == [root]


def test_steering_is_logged(engine, root):
    handle = start(engine, root, paused=True)
    handle.step()
    assert handle.wait_paused(WAIT)
    node = handle.tree.nodes[1]
    branch_id = node.branch_id
    handle.boost(branch_id, 0.25)
    handle.pin(branch_id)
    handle.pin(branch_id, False)
    handle.prune(branch_id)
    assert handle.wait_paused(WAIT)
    steered = [e for e in engine.trace if e.data.get("state") == "steer"]
    assert [e.data["verb"] for e in steered] == ["boost", "pin", "pin", "prune"]
    assert {e.branch_id for e in steered} == {branch_id}


def test_steering_with_foreign_branches_or_bad_numbers_is_refused(engine, root):
    other = engine.prompt([5])
    handle = start(engine, root, paused=True)
    handle.step()
    assert handle.wait_paused(WAIT)
    for verb in (handle.prune, handle.pin, lambda b: handle.boost(b, 1.0)):
        with pytest.raises(InvalidArgument, match="not part of this search"):
            verb(other)
    with pytest.raises(SearchError, match="root"):
        handle.prune(root)
    with pytest.raises(InvalidArgument, match="amount"):
        handle.boost(root, float("nan"))
    with pytest.raises(InvalidArgument, match="n must"):
        handle.step(0)


# -- events -------------------------------------------------------------------------------------


def test_events_go_to_the_trace_and_to_callbacks_in_order(engine, root):
    seen = []
    handle = start(engine, root, Budget(iterations=4), on_event=seen.append)
    result = handle.wait(WAIT)
    own = [
        (e.kind, e.branch_id, e.data)
        for e in engine.trace
        if e.kind not in ("prompt", "fork", "extend", "prune")
    ]
    assert [tuple(event) for event in seen] == own
    assert seen[0].data == {"state": "running", "algorithm": "mcts"}
    assert seen[-1].data["state"] == "done"
    assert seen[-1].data["best"] == result.best.id
    kinds = {event.kind for event in seen}
    assert kinds == {"search", "select", "expand", "evaluate", "backpropagate", "budget"}
    back = [e for e in seen if e.kind == "backpropagate"]
    assert all(e.data["path"][0] == root.id and e.data["path"][-1] == e.branch_id for e in back)


def test_pausing_and_resuming_is_announced_once_each(engine, root):
    states = []
    handle = start(
        engine,
        root,
        paused=True,
        on_event=lambda e: states.append(e.data["state"]) if e.kind == "search" else None,
    )
    assert handle.wait_paused(WAIT)
    handle.step()
    assert handle.wait_paused(WAIT)
    handle.resume()
    handle.wait(WAIT)
    assert states == ["running", "paused", "running", "paused", "running", "done"]


def test_a_callback_that_raises_is_removed_and_the_search_goes_on(engine, root):
    calls = []

    def bad(event):
        calls.append(event)
        raise RuntimeError("listener")

    handle = start(engine, root, on_event=bad)
    assert handle.wait(WAIT).iterations == 20
    assert len(calls) == 1
    assert any("listener" in str(e.data.get("error")) for e in engine.trace if e.kind == "error")


def test_a_callback_may_control_the_search_and_unsubscribe(engine, root):
    handle = start(engine, root, Budget(iterations=10**6), paused=True)
    seen = []

    def stop_after_three(event):
        if event.kind == "budget":
            seen.append(event.data["iterations"])
            if len(seen) == 3:
                handle.stop()

    unsubscribe_other = handle.on_event(lambda event: seen.append("other"))
    unsubscribe_other()
    unsubscribe_other()
    handle.on_event(stop_after_three)
    handle.resume()
    assert handle.wait(WAIT).reason == "stopped"
    assert seen == [2, 4, 6]


def test_waiting_for_the_search_from_its_own_thread_is_refused(engine, root):
    errors = []
    handle = start(engine, root, paused=True)

    def wait_inside(event):
        if event.kind == "budget" and not errors:
            try:
                handle.wait()
            except SearchError as error:
                errors.append(error)

    handle.on_event(wait_inside)
    handle.resume()
    handle.wait(WAIT)
    assert len(errors) == 1
