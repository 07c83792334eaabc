"""The search handle: pause, resume, step, stop, set, steer, await; in every state of a search."""

from __future__ import annotations

import asyncio
import threading

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import EngineClosed, InvalidArgument, SearchError, UnknownName
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import (
    MCTS,
    BeamSearch,
    Budget,
    SearchResult,
    mean_logprob,
    start_search,
    verifier,
)

ENDLESS = -1e9
WAIT = 60  # seconds; only reached when a test fails


class Gate:
    """Holds the fake engine's forwards until they are let through one by one."""

    def __init__(self, engine: FakeEngine) -> None:
        self.reached = threading.Semaphore(0)
        self.leave = threading.Semaphore(0)
        engine.before_forward = self.hold

    def hold(self, rows: int) -> None:
        self.reached.release()
        assert self.leave.acquire(timeout=WAIT)

    def wait_inside(self) -> None:
        assert self.reached.acquire(timeout=WAIT)

    def open(self, forwards: int = 1_000_000) -> None:
        self.leave.release(forwards)


@pytest.fixture
def engine():
    return FakeEngine(9, eos=ENDLESS)


@pytest.fixture
def root(engine):
    return engine.prompt([1, 2, 3])


def start(engine, root, budget=None, *, algorithm=None, **options):
    algorithm = algorithm or MCTS(tokens_per_node=2, width=3, parallel=2)
    return start_search(engine, root, algorithm, budget or Budget(iterations=20), **options)


def test_a_search_returns_at_once_and_wait_gives_its_result(engine, root):
    gate = Gate(engine)
    handle = start(engine, root)
    gate.wait_inside()
    assert handle.state == "running"
    with pytest.raises(SearchError, match="not ended"):
        _ = handle.result
    with pytest.raises(TimeoutError, match="goes on"):
        handle.wait(timeout=0)
    gate.open()
    result = handle.wait(WAIT)
    assert isinstance(result, SearchResult)
    assert handle.result is result
    assert handle.state == "done"
    assert (result.reason, result.iterations, result.nodes) == ("iterations", 20, 20)
    assert result.tokens == 40
    assert result.best.token_ids == [1, 2, 3, *result.token_ids]
    assert result.text == engine.tokenizer.decode(result.token_ids)


def test_a_search_started_paused_runs_nothing_until_resumed(engine, root):
    handle = start(engine, root, paused=True)
    assert handle.wait_paused(WAIT)
    assert handle.state == "paused"
    assert handle.usage().iterations == 0
    assert engine.branches == [root]
    handle.resume()
    assert handle.wait(WAIT).iterations == 20


def test_pause_holds_after_the_batch_in_flight(engine, root):
    gate = Gate(engine)
    handle = start(engine, root)
    gate.wait_inside()
    handle.pause()
    assert handle.state == "paused"
    gate.open()
    assert handle.wait_paused(WAIT)
    assert handle.usage().iterations == 2, "one batch of two"
    assert not handle.wait_paused(0) or handle.usage().iterations == 2
    handle.resume()
    assert handle.wait(WAIT).iterations == 20


def test_step_runs_so_many_batches_and_pauses_again(engine, root):
    handle = start(engine, root, paused=True)
    for batches, total in ((1, 2), (2, 6), (1, 8)):
        handle.step(batches)
        assert handle.wait_paused(WAIT)
        assert handle.state == "paused"
        assert handle.usage().iterations == total
    handle.step()
    handle.step()
    assert handle.wait_paused(WAIT)
    assert handle.usage().iterations == 12, "steps add up"


def test_step_while_running_pauses_after_the_batches_asked_for(engine, root):
    gate = Gate(engine)
    handle = start(engine, root, Budget(iterations=1000))
    gate.wait_inside()
    handle.step(2)
    gate.open()
    assert handle.wait_paused(WAIT)
    assert handle.usage().iterations == 2 + 4
    handle.stop()
    handle.wait(WAIT)


def test_stepping_over_the_end_finishes_the_search(engine, root):
    handle = start(engine, root, paused=True)
    handle.step(100)
    assert handle.wait(WAIT).iterations == 20
    assert handle.state == "done"


@pytest.mark.parametrize("paused", [False, True])
def test_stop_ends_with_the_best_so_far(engine, root, paused):
    handle = start(engine, root, Budget(iterations=10**6), paused=True)
    handle.step(3)
    assert handle.wait_paused(WAIT)
    if not paused:
        handle.resume()
    handle.stop()
    result = handle.wait(WAIT)
    assert handle.state == "stopped"
    assert result.reason == "stopped"
    assert result.best.is_alive
    assert result.text
    result.prune()
    assert engine.branches == [root]
    engine.check_integrity()


def test_stop_before_the_first_batch_gives_the_root(engine, root):
    handle = start(engine, root, paused=True)
    handle.stop()
    result = handle.wait(WAIT)
    assert result.best is root
    assert (result.text, result.token_ids, result.nodes) == ("", (), 0)
    result.prune()
    assert root.is_alive, "the user's own branch is never pruned"


def test_stop_during_a_forward_ends_after_it(engine, root):
    gate = Gate(engine)
    handle = start(engine, root, algorithm=MCTS(tokens_per_node=500, parallel=2))
    gate.wait_inside()
    handle.stop()
    assert handle.state == "running", "the forward is still in flight"
    gate.open(1)
    result = handle.wait(WAIT)
    assert result.reason == "stopped"
    forwards = [entry for entry in engine.log if entry[0] == "forward"]
    assert len(forwards) == 1
    assert engine.branches == [root], "children cut short are pruned"


def test_stop_during_the_evaluator_keeps_what_was_evaluated(engine, root):
    inside, leave = threading.Event(), threading.Event()

    def slow(branches):
        inside.set()
        assert leave.wait(WAIT)
        return [0.5] * len(branches)

    handle = start(engine, root, evaluator=slow)
    assert inside.wait(WAIT)
    handle.stop()
    leave.set()
    assert handle.wait(WAIT).nodes == 2


def test_every_verb_is_harmless_after_the_end(engine, root):
    handle = start(engine, root)
    result = handle.wait(WAIT)
    best = result.best
    handle.pause()
    handle.resume()
    handle.step()
    handle.stop()
    assert handle.wait_paused(0)
    assert handle.set(exploration=2.0) is False
    assert handle.prune(best) is False
    assert handle.boost(best, 1.0) is False
    assert handle.pin(best) is False
    assert handle.state == "done"
    assert handle.result is result
    assert best.is_alive


def test_stop_twice_and_resume_after_stop_change_nothing(engine, root):
    handle = start(engine, root, paused=True)
    handle.stop()
    handle.stop()
    handle.resume()
    assert handle.wait(WAIT).reason == "stopped"


def test_many_pauses_and_resumes_lose_no_wake_up(engine, root):
    handle = start(engine, root, Budget(iterations=400))
    for _ in range(200):
        handle.pause()
        handle.resume()
        handle.step()
        handle.resume()
    assert handle.wait(WAIT).iterations == 400


def test_threads_that_wait_all_hear_of_the_end(engine, root):
    handle = start(engine, root, paused=True)
    results = []
    threads = [threading.Thread(target=lambda: results.append(handle.wait(WAIT))) for _ in range(5)]
    threads += [threading.Thread(target=lambda: handle.wait_paused(WAIT)) for _ in range(3)]
    for thread in threads:
        thread.start()
    handle.resume()
    for thread in threads:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert len(set(map(id, results))) == 1
    assert len(results) == 5


def test_a_handle_can_be_awaited(engine, root):
    async def main():
        handle = start(engine, root)
        return await handle

    assert asyncio.run(main()).iterations == 20


def test_cancelling_an_await_leaves_the_search_running(engine, root):
    async def main():
        handle = start(engine, root, paused=True)

        async def hold():
            await handle

        task = asyncio.ensure_future(hold())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        handle.resume()
        return await handle

    assert asyncio.run(main()).iterations == 20


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
    loser = max(
        handle.tree.nodes[1:], key=lambda n: (n.parent is not low, -n.value, n.id)
    )
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


# -- failures -----------------------------------------------------------------------------------


def test_a_broken_evaluator_fails_the_search_and_prunes_its_branches(engine, root):
    def broken(branches):
        raise KeyError("my bug")

    handle = start(engine, root, evaluator=broken)
    for _ in range(2):
        with pytest.raises(KeyError, match="my bug"):
            handle.wait(WAIT)
    with pytest.raises(KeyError, match="my bug"):
        _ = handle.result
    assert handle.state == "failed"
    assert engine.branches == [root]
    engine.check_integrity()
    assert (
        "my bug" in next(e for e in engine.trace if e.data.get("state") == "failed").data["error"]
    )


@pytest.mark.parametrize("algorithm", [MCTS(tokens_per_node=3), BeamSearch(width=3)])
def test_a_closed_engine_fails_the_search(engine, root, algorithm):
    gate = Gate(engine)
    handle = start(engine, root, algorithm=algorithm)
    gate.wait_inside()
    engine.closed = True
    gate.open()
    with pytest.raises(EngineClosed):
        handle.wait(WAIT)
    assert handle.state == "failed"


def test_awaiting_a_failed_search_raises_its_error(engine, root):
    async def main():
        await start(engine, root, evaluator=lambda branches: [1.0])

    with pytest.raises(SearchError, match="1 values for 2 branches"):
        asyncio.run(main())


def test_a_search_fails_with_its_own_timeout_error(engine, root):
    def late(branches):
        raise TimeoutError("verifier took too long")

    with pytest.raises(TimeoutError, match="verifier"):
        start(engine, root, evaluator=late).wait(WAIT)


# -- starting -----------------------------------------------------------------------------------


def test_an_algorithm_may_be_given_by_name_class_or_object(engine, root):
    for algorithm in ("mcts", MCTS, MCTS(width=9)):
        handle = start_search(engine, root, algorithm, Budget(iterations=2), width=2, parallel=1)
        assert handle.wait(WAIT).iterations == 2
        assert (handle.algorithm.width, handle.algorithm.parallel) == (2, 1)


def test_params_are_the_sampling_of_the_algorithm(engine, root):
    params = SamplingParams(temperature=0.5, top_k=2)
    handle = start_search(engine, root, "mcts", Budget(iterations=2), params=params)
    handle.wait(WAIT)
    assert handle.algorithm.sampling == params


def test_a_search_without_a_budget_takes_the_algorithms_default(engine, root):
    handle = start_search(engine, root, MCTS(tokens_per_node=1, width=12), paused=True)
    assert handle.budget == MCTS.default_budget
    handle.stop()


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"algorithm": "alphago"}, UnknownName, "beam, mcts"),
        ({"algorithm": 3}, InvalidArgument, "algorithm"),
        ({"algorithm": dict}, InvalidArgument, "algorithm"),
        ({"algorithm": "mcts", "widht": 3}, InvalidArgument, "widht"),
        ({"algorithm": "mcts", "width": 0}, InvalidArgument, "width"),
        ({"algorithm": "beam", "params": SamplingParams()}, InvalidArgument, "params"),
        ({"algorithm": "beam", "evaluator": mean_logprob()}, InvalidArgument, "evaluator"),
        ({"algorithm": "mcts", "evaluator": 0.5}, InvalidArgument, "evaluator"),
        ({"algorithm": "mcts", "budget": 500}, InvalidArgument, "budget"),
        ({"algorithm": "mcts", "budget": Budget(tokens=3)}, InvalidArgument, r"budget\.tokens=3"),
        ({"algorithm": "mcts", "budget": Budget(pages=1)}, InvalidArgument, r"budget\.pages=1"),
    ],
)
def test_a_bad_start_is_refused_before_anything_runs(engine, root, arguments, error, named):
    with pytest.raises(error, match=named):
        start_search(engine, root, **arguments)
    assert engine.branches == [root]
