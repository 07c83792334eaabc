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
        ({"algorithm": "alphago"}, UnknownName, "known: .*beam.*mcts"),
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
