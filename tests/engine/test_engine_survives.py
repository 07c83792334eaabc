"""What goes wrong ends one branch or one job, and leaves the rest as it was."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.errors import EngineClosed

FREE = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)


def test_out_of_pages_ends_that_branch_only(make_engine):
    engine = make_engine(num_pages=8, page_size=4, prefix_cache=False)
    root = engine.prompt("12345678")
    branches = root.fork(4)
    results = engine.complete(branches, FREE.replace(max_tokens=9))
    reasons = [r.finish_reason for r in results]
    assert "out_of_pages" in reasons
    assert "length" in reasons or reasons.count("out_of_pages") == 4
    for result in results:
        assert len(result.token_ids) == result.branch.num_tokens - root.num_tokens
    engine.check_integrity()
    ended = next(r.branch for r in results if r.finish_reason == "out_of_pages")
    for branch in branches:
        if branch is not ended:
            branch.prune()
    (more,) = engine.complete([ended], FREE.replace(max_tokens=2))
    assert len(more.token_ids) == 2


def test_pruning_a_generating_branch_ends_it_as_stale_and_leaves_its_siblings(make_engine):
    engine = make_engine()
    a, b = engine.prompt("prune while running").fork(2)
    gate = threading.Event()

    def note(event) -> None:
        if event.branch is a and event.token_id is not None:
            a.prune()
            gate.set()

    job = engine.submit([a, b], FREE, on_event=note)
    first, second = job.result(timeout=60)
    assert gate.is_set()
    assert first.finish_reason == "stale"
    assert second.finish_reason == "length"


def test_two_engines_in_one_process_do_not_disturb_each_other(make_engine):
    one, two = make_engine("llama"), make_engine("qwen3")
    a, b = one.prompt("first engine"), two.prompt("second engine")
    jobs = [one.submit([a], FREE), two.submit([b], FREE)]
    assert [job.result()[0].finish_reason for job in jobs] == ["length", "length"]


def test_a_raising_callback_fails_its_job_and_nothing_else(make_engine):
    engine = make_engine()
    a, b = engine.prompt("callbacks").fork(2)

    def bad(event) -> None:
        raise RuntimeError("user code")

    job = engine.submit([a], FREE, on_event=bad)
    other = engine.submit([b], FREE)
    with pytest.raises(Exception, match="on_event raised RuntimeError: user code"):
        job.result(timeout=60)
    assert other.result()[0].finish_reason == "length"


def test_a_failing_step_fails_its_jobs_and_leaves_the_tree_as_it_was(make_engine, monkeypatch):
    engine = make_engine()
    branch = engine.prompt("fault")
    held = branch.token_ids
    run = engine._parts.runner.run

    def fail(plan):
        raise MemoryError("injected")

    branch.extend("x")
    monkeypatch.setattr(engine._parts.runner, "run", fail)
    with pytest.raises(MemoryError, match="injected"):
        engine.complete([branch], FREE)
    monkeypatch.setattr(engine._parts.runner, "run", run)
    engine.check_integrity()
    assert branch.token_ids == [*held, *engine.tokenizer.encode("x")]
    assert engine.complete([branch], FREE)[0].finish_reason == "length"


def test_non_finite_logits_end_the_branch_and_sample_nothing(make_engine):
    engine = make_engine()
    good, bad = engine.prompt("good"), engine.prompt("bad!")
    from dendrite_engine.tree.branch import LogitsRow

    row = bad._logits.tensor.clone()
    row[bad._logits.row, 3] = float("nan")
    bad._logits = LogitsRow(bad.num_tokens, row, bad._logits.row)
    results = engine.complete([good, bad], FREE)
    assert [r.finish_reason for r in results] == ["length", "numeric_error"]
    assert results[1].token_ids == []


def test_a_closed_engine_refuses_work(tiny_model):
    engine = Engine.from_pretrained(tiny_model("llama"), num_pages=64)
    branch = engine.prompt("bye")
    engine.close()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.complete([branch], FREE)


def test_closing_fails_the_running_jobs(tiny_model):
    engine = Engine.from_pretrained(tiny_model("llama"), num_pages=128)
    started = threading.Event()
    job = engine.submit(
        [engine.prompt("bye")], FREE.replace(max_tokens=1500), on_event=lambda _: started.set()
    )
    assert started.wait(60)
    engine.close()
    with pytest.raises(EngineClosed):
        job.result(timeout=60)


def test_pruning_between_choosing_and_planning_ends_that_branch_only(make_engine, monkeypatch):
    engine = make_engine()
    a, b = engine.prompt("race").fork(2)
    a.extend("x")
    b.extend("y")
    scheduler = engine._loop._scheduler
    choose = scheduler.next_batch

    def choose_then_prune(lanes, core):
        selection = choose(lanes, core)
        a.prune()
        return selection

    monkeypatch.setattr(scheduler, "next_batch", choose_then_prune)
    first, second = engine.complete([a, b], FREE)
    assert first.finish_reason == "stale"
    assert second.finish_reason == "length"


def test_threads_that_fork_and_prune_while_the_model_runs_break_nothing(make_engine):
    engine = make_engine(num_pages=2000)
    root = engine.prompt("many hands make light work, or so they say")
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(15):
                fork = root.fork()[0]
                inner = fork.fork(at=3 + (seed * 7 + i) % 30)[0]
                inner.extend(f"{seed}-{i}")
                job = engine.submit([fork, inner], FREE.replace(max_tokens=5))
                extra = inner.fork(2)
                fork.prune()
                job.result(timeout=120)
                for branch in (inner, *extra):
                    branch.prune()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert failures == []
    engine.check_integrity()
    assert [branch.id for branch in engine.branches] == [root.id]


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda-twin"])
def test_an_engine_that_nobody_holds_leaves_memory_and_ends_its_thread(tiny_model, device, close):
    """A notebook's cell that makes an engine is run again and again."""
    engine = Engine.from_pretrained(tiny_model("llama"), num_pages=64, device=device)
    branches = engine.prompt("held by nobody else").fork(3)
    engine.complete(branches, SamplingParams(max_tokens=3))
    gone, thread = weakref.ref(engine), engine._loop._thread
    if close:
        engine.close()
    del engine, branches
    deadline = time.monotonic() + 20
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread lets go of the lanes when it comes to rest
        gc.collect()
    assert gone() is None
    thread.join(20)
    assert not thread.is_alive()
