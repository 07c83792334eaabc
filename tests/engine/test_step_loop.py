"""The engine's loop with a runner that only launches: what users see does not depend on it."""

from __future__ import annotations

import threading

import pytest
from step_fakes import defer, log_passes, run_in_step

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.errors import DendriteError, EngineClosed
from dendrite_engine.tree.branch import LogitsRow
from dendrite_engine.types import LogitsEpoch

FREE = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)


@pytest.fixture
def make_async(make_engine):
    """Engines whose runner returns before its step is done."""

    def make(**options):
        engine = make_engine(device="cuda-twin", attention="reference", **options)
        assert engine._parts.runner.is_async
        return engine

    return make


def events_of(engine, branches, params):
    """(branch number, token, text, logprob, top, reason) of each event, in order."""
    number = {branch: i for i, branch in enumerate(branches)}
    events = engine.generate(branches, params)
    return [
        (number[e.branch], e.token_id, e.text, e.logprob, e.top, e.finish_reason) for e in events
    ]


def per_branch(events):
    return {i: [e for e in events if e[0] == i] for i in {e[0] for e in events}}


MIXED = [
    FREE,
    FREE.replace(max_tokens=3),
    FREE.replace(logprobs=3, max_tokens=9),
    FREE.replace(logprobs=1, temperature=0.0),
    FREE.replace(repetition_penalty=1.3, frequency_penalty=0.2),
    FREE.replace(logit_bias={5: 40.0, 77: 40.5}, presence_penalty=1.0),
    FREE.replace(stop_token_ids=list(range(0, 259, 5))),
    FREE.replace(stop=["a", "zz", "M"], max_tokens=80),
    FREE.replace(ignore_eos=False, logit_bias={258: 8.0}, max_tokens=60),
    FREE.replace(seed=99, top_k=5, top_p=0.9, min_p=0.01),
]


def test_every_kind_of_lane_gives_the_same_events_with_either_kind_of_runner(make_async):
    results = []
    for is_async in (True, False):
        engine = make_async(seed=4)
        defer(engine)
        engine._loop._forward.is_async = is_async
        branches = engine.prompt("the same in any order").fork(len(MIXED))
        results.append(per_branch(events_of(engine, branches, MIXED)))
        for i, branch in enumerate(branches):
            tokens = [token for _, token, *_ in results[-1][i] if token is not None]
            assert branch.own_token_ids == tokens
            assert [e[-1] is None for e in results[-1][i]] == [True] * (len(tokens) - 1) + [False]
    assert results[0] == results[1]
    reasons = [events[-1][-1] for _, events in sorted(results[0].items())]
    assert reasons[:3] == ["length"] * 3
    assert {"stop", "eos"} <= set(reasons)


def test_lanes_that_need_more_do_not_change_what_their_neighbours_get(make_async):
    engine = make_async(deterministic=True)
    root = engine.prompt("neighbours")
    branches = root.fork(len(MIXED))
    together = per_branch(events_of(engine, branches, MIXED))
    for i, params in enumerate(MIXED):
        alone = root.fork()[0]
        alone._key = branches[i].path_key
        (events,) = per_branch(events_of(engine, [alone], params)).values()
        assert [(*e[1:3], e[-1]) for e in events] == [(*e[1:3], e[-1]) for e in together[i]]
        assert [e[3] for e in events] == pytest.approx([e[3] for e in together[i]], abs=1e-4)
        assert [len(e[4]) for e in events] == [params.logprobs] * len(events)


def test_tokens_are_reported_while_the_next_pass_runs(make_async):
    engine = make_async()
    log: list = []
    branches = engine.prompt("overlap").fork(2)
    log_passes(engine, log)
    engine.submit(branches, FREE.replace(max_tokens=4), on_event=lambda e: log.append("e")).result()
    # The first tokens come from the logits of the prompt; after the last there is no pass.
    assert log == ["pass", "e", "e"] * 3 + ["e", "e"]


def test_a_runner_that_computes_at_once_is_called_after_the_report(make_engine):
    engine = make_engine()
    log: list = []
    branches = engine.prompt("in turn").fork(2)
    log_passes(engine, log)
    engine.submit(branches, FREE.replace(max_tokens=4), on_event=lambda e: log.append("e")).result()
    assert log == ["e", "e", *["pass", "e", "e"] * 3]


def test_a_job_is_done_after_its_last_event_and_its_branches_are_free_then(make_async):
    engine = make_async()
    branches = engine.prompt("done").fork(3)
    log: list = []
    params = [FREE.replace(max_tokens=n) for n in (2, 5, 3)]
    job = engine.submit(branches, params, on_event=log.append)

    def done(job) -> None:
        log.append("done")
        log.extend(branch.is_generating for branch in job.branches)

    job.add_done_callback(done)
    job.result(60)
    assert log[-4:] == ["done", False, False, False]
    assert [e.finish_reason for e in log[:-4]].count("length") == 3
    assert len(log) == 2 + 5 + 3 + 4


def test_cancelling_in_flight_keeps_the_token_that_was_on_its_way(make_async):
    engine = make_async()
    sampler = defer(engine)
    a, b = engine.prompt("cancel").fork(2)
    events: list = []
    job = engine.submit([a], FREE, on_event=events.append)
    other = engine.submit([b], FREE)
    run_in_step(sampler, 4, job.cancel)
    (completion,) = job.result(60)
    assert completion.finish_reason == "cancelled"
    assert completion.token_ids == a.own_token_ids
    assert [e.token_id for e in events] == [*a.own_token_ids, None]
    assert 0 < len(a.own_token_ids) < 12
    assert other.result(60)[0].finish_reason == "length"
    assert engine.complete([a], FREE)[0].finish_reason == "length"


def test_pruning_in_flight_ends_that_branch_and_drops_its_token(make_async):
    engine = make_async()
    sampler = defer(engine)
    branches = engine.prompt("prune").fork(3)
    run_in_step(sampler, 3, branches[1].prune)
    results = engine.complete(branches, FREE)
    assert [r.finish_reason for r in results] == ["length", "stale", "length"]
    assert len(results[1].token_ids) == 2
    assert [len(r.token_ids) for r in results[::2]] == [12, 12]


@pytest.mark.parametrize("change", ["rollback", "extend"])
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("params", [FREE, FREE.replace(repetition_penalty=2.0, stop=["~~~"])])
def test_a_branch_that_changes_in_flight_goes_on_from_what_it_holds_then(
    make_async, change, step, params
):
    # Branch.extend and rollback refuse while it generates; a call that passed the check before the
    # job began still may arrive now, so the core is called as they do.
    engine = make_async(deterministic=True)
    sampler = defer(engine)
    a, b = engine.prompt("a moving target").fork(2)
    seen: dict[str, list] = {}

    def act() -> None:
        if change == "rollback":
            engine.core.rollback(a._handle, 3)
        else:
            engine.core.append(a._handle, [9, 8, 7])
        seen["held"] = a.token_ids

    run_in_step(sampler, step, act)
    first, second = engine.complete([a, b], params)
    assert (first.finish_reason, second.finish_reason) == ("length", "length")
    assert len(first.token_ids) == len(second.token_ids) == 12
    after = first.token_ids[step - 1 :]
    assert a.token_ids == seen["held"] + after
    copy = engine.prompt(seen["held"])
    copy._key = a.path_key
    # The copy counts nothing as generated, so presence and frequency would differ; repetition not.
    (fresh,) = engine.complete([copy], params.replace(max_tokens=len(after)))
    assert fresh.token_ids == after


def test_forks_made_in_flight_hold_what_the_trace_says(make_async):
    engine = make_async()
    sampler = defer(engine)
    a, b = engine.prompt("forks").fork(2)
    forks: list = []
    sampler.in_flight = lambda: forks.extend([*a.fork(), *b.fork()])
    engine.complete([a, b], FREE)
    sampler.in_flight = lambda: None
    length = {}
    for event in engine.trace:
        if event.kind == "prompt":
            length[event.branch_id] = len(event.data["tokens"])
        elif event.kind == "fork":
            assert event.data["position"] == length[event.data["parent"]]
            length[event.branch_id] = event.data["position"]
        elif event.kind == "extend":
            length[event.branch_id] += len(event.data["tokens"])
    assert {branch.id: branch.num_tokens for branch in engine.branches} == length
    results = engine.complete(forks, FREE.replace(max_tokens=2))
    assert [r.finish_reason for r in results] == ["length"] * len(forks)


def test_a_raising_callback_fails_its_job_and_nothing_else(make_async):
    engine = make_async()
    a, b = engine.prompt("callbacks").fork(2)

    def bad(event) -> None:
        raise RuntimeError("user code")

    job = engine.submit([a], FREE, on_event=bad)
    other = engine.submit([b], FREE)
    with pytest.raises(DendriteError, match="on_event raised RuntimeError: user code"):
        job.result(timeout=60)
    assert other.result(60)[0].finish_reason == "length"
    assert not a.is_generating


@pytest.mark.parametrize("is_async", [False, True])
def test_a_raising_done_callback_is_logged_and_all_others_are_called(make_async, is_async):
    engine = make_async()
    engine._loop._forward.is_async = is_async
    a, b = engine.prompt("done callbacks").fork(2)
    called = threading.Event()

    def bad(job) -> None:
        raise RuntimeError("user code")

    hold = threading.Event()
    job = engine.submit([a], FREE, on_event=lambda _: hold.wait(60))
    other = engine.submit([b], FREE.replace(max_tokens=30))
    job.add_done_callback(bad)
    job.add_done_callback(lambda _: called.set())
    hold.set()
    assert other.result(60)[0].finish_reason == "length"
    assert job.result(60)[0].finish_reason == "length"
    assert called.is_set()
    errors = [e.data["error"] for e in engine.trace if e.kind == "error"]
    assert errors == ["RuntimeError: user code"]


def test_logits_are_read_and_prompts_prefilled_while_others_decode(make_async):
    engine = make_async(max_batch_tokens=32, prefill_chunk=8, deterministic=True)
    defer(engine)
    root = engine.prompt("a mix of lanes")
    expected = engine.top_tokens([root], 4)
    (alone,) = engine.complete(root.fork(), FREE.replace(max_tokens=60))
    branches = root.fork(5)
    for branch in branches:
        branch._key = alone.branch.path_key
    job = engine.submit(branches, FREE.replace(max_tokens=60))
    tops, lengths = [], []
    for i in range(4):
        other = root.fork()[0]
        other.rollback(1)
        other.extend([root.token_ids[-1]])  # its logits have to be computed
        tops += engine.top_tokens([other, root], 4)
        lengths.append(engine.prompt(f"{i} a prompt of several chunks, " * 3).num_tokens)
    for top in tops:
        assert [x.token_id for x in top] == [x.token_id for x in expected[0]]
        assert [x.logprob for x in top] == pytest.approx([x.logprob for x in expected[0]], abs=1e-4)
    assert min(lengths) > 3 * 8
    assert [r.token_ids for r in job.result(60)] == [alone.token_ids] * 5


def test_an_error_in_flight_fails_the_jobs_but_not_the_tokens_before(make_async):
    engine = make_async()
    sampler = defer(engine)
    a, b = engine.prompt("fault").fork(2)

    def fail() -> None:
        raise MemoryError("injected")

    run_in_step(sampler, 4, fail)
    events: list = []
    job = engine.submit([a], FREE, on_event=events.append)
    with pytest.raises(MemoryError, match="injected"):
        job.result(60)
    assert [e.token_id for e in events] == a.own_token_ids
    assert len(events) == 3
    assert engine.complete([a, b], FREE)[1].finish_reason == "length"


def test_closing_in_flight_delivers_what_branches_hold_and_fails_the_jobs(tiny_model):
    engine = Engine.from_pretrained(
        tiny_model("llama"), num_pages=64, device="cuda-twin", attention="reference"
    )
    sampler = defer(engine)
    a, b = engine.prompt("bye").fork(2)
    events: list = []
    short = FREE.replace(max_tokens=4)
    run_in_step(sampler, 4, engine._loop.stop)
    ended = engine.submit([a], short)
    job = engine.submit([b], FREE.replace(max_tokens=500), on_event=events.append)
    with pytest.raises(EngineClosed):
        job.result(60)
    engine.close()
    assert [e.token_id for e in events] == b.own_token_ids
    assert ended.result(60)[0].token_ids == a.own_token_ids


def test_logits_that_were_overwritten_are_computed_again(make_async):
    engine = make_async(deterministic=True)
    root = engine.prompt("stale rows")
    (expected,) = engine.complete(root.fork(), FREE)
    branch = root.fork()[0]
    branch._key = expected.branch.path_key
    row = root._logits
    branch._logits = LogitsRow(row.num_tokens, row.tensor * -1, row.row, LogitsEpoch(False))
    steps = engine.stats().steps
    assert engine.complete([branch], FREE)[0].token_ids == expected.token_ids
    assert engine.stats().steps - steps == 12


def test_branches_keep_no_logits_of_a_step(make_async):
    engine = make_async()
    branches = engine.prompt("buffers").fork(3)
    engine.complete(branches, FREE)
    assert [branch._logits for branch in branches] == [None] * 3
    engine.top_tokens(branches, 2)
    for branch in branches:
        assert branch._logits.epoch is None
        assert branch._logits.tensor.shape[0] == 1


def test_a_context_that_is_full_ends_the_branch(make_async):
    engine = make_async(max_context=40)
    root = engine.prompt("x" * 30)
    results = engine.complete(root.fork(2), [FREE.replace(max_tokens=99), FREE])
    assert [r.finish_reason for r in results] == ["context_full", "context_full"]
    assert [r.branch.num_tokens for r in results] == [40, 40]
    (full,) = engine.complete(root.fork(), FREE.replace(max_tokens=10))
    assert full.finish_reason == "length"
