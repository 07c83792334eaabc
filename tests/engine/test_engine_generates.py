"""Streaming, stopping, cancelling, sampling repeatably: the engine as its users see it."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.errors import EngineClosed

FREE = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)


def test_events_stream_for_all_branches_and_add_up_to_the_branches(make_engine):
    engine = make_engine()
    branches = engine.prompt("hello tree").fork(3)
    seen: dict[int, list[int]] = {branch.id: [] for branch in branches}
    finished = []
    for event in engine.generate(branches, FREE):
        seen[event.branch.id].append(event.token_id)
        if event.finish_reason:
            finished.append(event.finish_reason)
    assert finished == ["length"] * 3
    for branch in branches:
        assert branch.own_token_ids == seen[branch.id]
        assert len(seen[branch.id]) == 12
        own = branch.logprobs[branch.fork_position :]
        assert all(value is not None and value < 0 for value in own)
        assert math.isclose(branch.cum_logprob, sum(own))
    assert len({tuple(ids) for ids in seen.values()}) == 3, "siblings draw different tokens"


def test_all_branches_advance_in_one_forward_per_step(make_engine):
    engine = make_engine()
    branches = engine.prompt("x" * 40).fork(8)
    before = engine.stats().steps
    engine.complete(branches, FREE)
    assert engine.stats().steps - before == 11, "12 tokens: the first comes from the shared logits"


def test_the_same_seed_gives_the_same_tree_and_another_seed_another(make_engine):
    def run(seed: int) -> list[list[int]]:
        engine = make_engine(seed=seed)
        a, b = engine.prompt("seeded").fork(2)
        engine.complete([a, b], FREE)
        grandchildren = b.fork(2, at=9)
        engine.complete(grandchildren, FREE)
        return [branch.token_ids for branch in (a, b, *grandchildren)]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_a_branch_does_not_depend_on_what_runs_beside_it(make_engine):
    alone, busy = make_engine(), make_engine()
    (a,) = alone.prompt("neighbours").fork()
    (b,) = busy.prompt("neighbours").fork()
    noise = [busy.prompt(f"noise {i}" * (i + 1)) for i in range(5)]
    job = busy.submit(noise, SamplingParams(temperature=1.3, max_tokens=20, ignore_eos=True))
    assert busy.complete([b], FREE)[0].token_ids == alone.complete([a], FREE)[0].token_ids
    job.result()


def test_stop_strings_and_ids_end_a_branch_and_keep_the_token(make_engine):
    engine = make_engine()
    root = engine.prompt("stop here")
    (probe,) = engine.complete(root.fork(), FREE)
    third = probe.token_ids[2]
    params = FREE.replace(stop_token_ids=[third], seed=None)
    branch = root.fork(at=root.num_tokens)[0]
    branch._key = probe.branch.path_key
    (stopped,) = engine.complete([branch], params)
    first = probe.token_ids.index(third) + 1
    assert stopped.token_ids == probe.token_ids[:first]
    assert stopped.finish_reason == "stop"


def test_a_stop_string_may_span_tokens(make_engine):
    engine = make_engine()
    root = engine.prompt("abc")
    target = engine.tokenizer.encode("q;z")
    bias = dict.fromkeys(target, 1000.0)
    (result,) = engine.complete(
        [root],
        SamplingParams(temperature=1.0, logit_bias=bias, stop=["q;", ";z", "zq"], max_tokens=50),
    )
    assert result.finish_reason == "stop"
    assert any(result.text.endswith(stop) for stop in ("q;", ";z", "zq"))


def test_leaving_the_loop_cancels_and_the_branch_stays_usable(make_engine):
    engine = make_engine()
    branch = engine.prompt("cancel me")
    for _ in engine.generate([branch], FREE.replace(max_tokens=400)):
        if branch.num_tokens > 12:
            break
    stream = engine.generate([branch.fork()[0]], FREE)
    next(stream)
    stream.close()
    job = engine.submit([branch.fork()[0]], FREE.replace(max_tokens=500))
    job.cancel()
    (completion,) = job.result(timeout=60)
    assert completion.finish_reason == "cancelled"
    assert branch.is_alive


def test_async_generation_streams_too(make_engine):
    engine = make_engine()
    branches = engine.prompt("async").fork(2)

    async def collect() -> int:
        return len([event async for event in engine.agenerate(branches, FREE)])

    assert asyncio.run(collect()) == 24


def test_a_prompt_joins_while_others_decode(make_engine):
    engine = make_engine(max_batch_tokens=64, prefill_chunk=16)
    early = engine.prompt("early")
    order: list[str] = []
    started = threading.Event()

    def note(event) -> None:
        order.append("decode")
        started.set()

    job = engine.submit([early], FREE.replace(max_tokens=200), on_event=note)
    assert started.wait(60)
    engine.prompt("late " * 40)
    order.append("prefilled")
    job.result()
    assert "decode" in order[order.index("prefilled") + 1 :], "decoding went on after the prefill"
    assert order.index("prefilled") > 5, "decoding went on during the prefill"


def test_higher_priority_is_served_first_when_a_step_is_full(make_engine):
    engine = make_engine(max_batch_tokens=4)
    branches = engine.prompt("priority").fork(8)
    low, high = branches[:4], branches[4:]
    finished: list[str] = []
    gate = threading.Event()
    blocker = engine.submit([engine.prompt("gate")], FREE, on_event=lambda _: gate.wait(60))
    jobs = [
        engine.submit(low, FREE, on_event=lambda e: finished.append("low")),
        engine.submit(high, FREE, on_event=lambda e: finished.append("high"), priority=5),
    ]
    gate.set()
    for job in (blocker, *jobs):
        job.result()
    assert finished[-1] == "low"
    assert finished.index("high") <= 4
    last_high = len(finished) - 1 - finished[::-1].index("high")
    assert finished[last_high + 1 :].count("low") > 30


def test_equal_jobs_share_a_full_step_fairly(make_engine):
    engine = make_engine(max_batch_tokens=2)
    branches = engine.prompt("fair").fork(6)
    counts = dict.fromkeys((b.id for b in branches), 0)
    spread = 0

    def note(event) -> None:
        nonlocal spread
        counts[event.branch.id] += 1
        spread = max(spread, max(counts.values()) - min(counts.values()))

    engine.submit(branches, FREE, on_event=note).result()
    assert spread <= 2


def test_forks_of_an_unfinished_prompt_compute_it_once(make_engine):
    engine = make_engine()
    root = engine.prompt("shared")
    root.extend("pending text that nobody computed yet")
    pending = root.num_tokens - engine.core.num_computed(root._handle)
    forks = root.fork(6)
    before = engine.stats().tokens_computed
    engine.complete(forks, FREE.replace(max_tokens=1))
    assert engine.stats().tokens_computed - before == pending


def test_forking_shares_logits_so_the_first_token_needs_no_forward(make_engine):
    engine = make_engine()
    root = engine.prompt("instant")
    before = engine.stats().steps
    engine.complete(root.fork(5), FREE.replace(max_tokens=1))
    assert engine.stats().steps == before


def test_extend_and_rollback_return_to_the_same_continuation(make_engine):
    engine = make_engine(deterministic=True)
    root = engine.prompt("there and back")
    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    (expected,) = engine.complete(root.fork(), greedy)
    branch = root.fork()[0]
    branch.extend(" again, with a long detour over pages")
    branch.rollback(branch.num_tokens - root.num_tokens)
    (result,) = engine.complete([branch], greedy)
    assert result.token_ids == expected.token_ids


def test_sixty_four_branches_cost_one_page_each_when_they_diverge(make_engine):
    engine = make_engine(num_pages=600)
    root = engine.prompt(list(range(200)) * 5 + [1] * 5)  # 1005 tokens: 62 full pages and a part
    one = engine.stats().pages_live
    branches = root.fork(64)
    assert engine.stats().pages_live == one
    engine.complete(branches, FREE.replace(max_tokens=1))
    stats = engine.stats()
    assert stats.pages_live == one + 64
    assert stats.cow_copies == 64
    for branch in branches:
        assert branch.owned_pages == 1
        branch.prune()
    assert engine.stats().pages_live == one


def test_a_second_prompt_reuses_the_prefix_and_gives_the_same_result(make_engine):
    engine = make_engine(deterministic=True)
    greedy = SamplingParams(max_tokens=6, ignore_eos=True)
    text = "a system prompt that is long enough to fill several pages of sixteen tokens each. "
    first = engine.prompt(text + "one")
    (expected,) = engine.complete([first], greedy)
    first.prune()
    computed = engine.stats().tokens_computed
    second = engine.prompt(text + "one")
    (result,) = engine.complete([second], greedy)
    assert result.token_ids == expected.token_ids
    assert engine.stats().prefix_hit_tokens >= 64
    assert engine.stats().tokens_computed - computed < 30
    other = engine.prompt(text + "one", namespace="tenant")
    assert engine.trace.since(0)[-1].kind in {"job", "prompt"}
    assert other.num_tokens == second.num_tokens - 6


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


def test_top_tokens_are_sorted_and_agree_with_greedy(make_engine):
    engine = make_engine()
    a, b = engine.prompt("alternatives").fork(2)
    b.extend("!")
    for branch, row in zip((a, b), engine.top_tokens([a, b], 5), strict=True):
        values = [alternative.logprob for alternative in row]
        assert values == sorted(values, reverse=True)
        (greedy,) = engine.complete([branch], SamplingParams(max_tokens=1, logprobs=3))
        assert greedy.token_ids[0] == row[0].token_id


def test_reported_alternatives_come_with_each_token(make_engine):
    engine = make_engine()
    branch = engine.prompt("logprobs")
    events = list(engine.generate([branch], SamplingParams(max_tokens=3, logprobs=4)))
    for event in events:
        assert len(event.top) == 4
        assert event.top[0].token_id == event.token_id
        assert event.top[0].logprob == pytest.approx(event.logprob, abs=1e-5)


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
