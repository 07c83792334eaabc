"""Streaming, stopping, cancelling, sampling repeatably: the engine as its users see it."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest

from dendrite_engine import SamplingParams

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


def test_tokens_that_an_algorithm_chose_can_carry_their_logprobs(make_engine):
    engine = make_engine()
    root = engine.prompt("chosen")
    ((first, second),) = engine.top_tokens([root], 2)
    a, b = root.fork(2)
    engine.extend(
        [a, b], [[first.token_id], [second.token_id]], [[first.logprob], [second.logprob]]
    )
    assert a.cum_logprob == pytest.approx(first.logprob)
    assert b.logprobs[-1] == pytest.approx(second.logprob)
    b.extend("given")
    assert b.cum_logprob == pytest.approx(second.logprob)
