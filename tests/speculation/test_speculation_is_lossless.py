"""Speculative decoding gives what plain decoding gives: tokens, ends, log-probabilities, events."""

from __future__ import annotations

import numpy as np
import pytest
from proposers import Scripted, noise, oracle

from dendrite_engine import DraftModel, PromptLookup, SamplingParams

TEXT = "one two three, one two four; one two three, one two "
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
PARAMS = {
    "greedy": GREEDY,
    "drawn": GREEDY.replace(temperature=0.8, top_p=0.95),
    "hot": GREEDY.replace(temperature=1.5, top_k=20, min_p=0.01),
    "penalties": GREEDY.replace(
        temperature=0.7, repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.2
    ),
    "greedy penalties": GREEDY.replace(repetition_penalty=1.3, frequency_penalty=0.5),
    "bias": GREEDY.replace(logit_bias={65: 2.0, 66: -3.0}, temperature=0.9),
    "alternatives": GREEDY.replace(temperature=0.8, logprobs=4),
}
LOOKUPS = {
    "chain": PromptLookup(),
    "tree": PromptLookup(tokens=6, width=3, shortest=1, adaptive=False),
    "siblings": PromptLookup(shortest=1, siblings=True, adaptive=False),
    "noise": Scripted(noise(1, 250)),
}


def run(engine, params, speculate=None, branches=3):
    """What users see of a run on a few branches of different lengths."""
    forks = engine.prompt(TEXT).fork(branches)
    for i, branch in enumerate(forks[1:]):
        branch.extend("x" * (i * 9 + 1))
    events = list(engine.generate(forks, params, speculate=speculate))
    engine.check_integrity()
    return [
        (
            branch.token_ids,
            branch.logprobs,
            [(e.token_id, e.text, e.logprob, e.top, e.finish_reason) for e in mine],
        )
        for branch in forks
        if (mine := [e for e in events if e.branch is branch])
    ]


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("how", LOOKUPS)
def test_everything_is_bitwise_what_plain_decoding_gives(make_engine, name, how):
    plain = make_engine(deterministic=True)
    speculating = make_engine(deterministic=True)
    params = PARAMS[name]
    assert run(speculating, params, LOOKUPS[how]) == run(plain, params)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_every_model_and_page_size_keeps_the_tokens(make_engine, kind, page_size):
    options = {"page_size": page_size, "num_pages": 4096 // page_size}
    plain, speculating = make_engine(kind, **options), make_engine(kind, **options)
    guess = Scripted(noise(2, 250))
    expected = run(plain, PARAMS["drawn"])
    texts = [tokens for tokens, _, _ in expected]
    for speculate in (guess, Scripted(oracle(texts)), Scripted(oracle(texts, mistake_every=7))):
        engine = speculating
        got = run(engine, PARAMS["drawn"], speculate)
        assert [tokens for tokens, _, _ in got] == texts
        engine.prune_all()
    counts = speculating.stats().speculation.total
    assert 0 < counts.accepted < counts.proposed


def test_log_probabilities_agree_without_the_deterministic_mode(make_engine):
    plain, speculating = make_engine(), make_engine()
    for ours, theirs in zip(
        run(speculating, PARAMS["drawn"], LOOKUPS["tree"]), run(plain, PARAMS["drawn"]), strict=True
    ):
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(np.array(ours[1], float), np.array(theirs[1], float), atol=1e-4)


def test_right_guesses_save_steps_and_wrong_ones_do_not_cost_any(make_engine):
    engine = make_engine()
    root = engine.prompt(TEXT)
    (plain,) = engine.complete(root.fork(), GREEDY)
    text = plain.branch.token_ids
    for guess, most in ((oracle([text]), 6), (oracle([text], 1), 39)):
        before = engine.stats()
        (fork,) = root.fork()
        (done,) = engine.complete([fork], GREEDY, speculate=Scripted(guess))
        after = engine.stats()
        assert done.token_ids == plain.token_ids
        assert after.steps - before.steps <= most
        counts = after.speculation.branches[fork.id]
        assert counts.steps_saved == 39 - (after.steps - before.steps)


@pytest.mark.parametrize("cut", ["stop", "stop_token_ids", "max_tokens", "eos", "context"])
@pytest.mark.parametrize("depth", range(1, 9))
def test_ends_come_at_the_token_where_plain_decoding_ends(make_engine, cut, depth):
    options = {"max_context": len(TEXT) + 4 + depth} if cut == "context" else {}
    plain, speculating = make_engine(**options), make_engine(**options)
    params = GREEDY.replace(temperature=0.8)
    reference = make_engine()
    (free,) = reference.complete([reference.prompt(TEXT)], params)
    if cut == "stop":
        params = params.replace(stop=[free.text[depth : depth + 3] or "?"])
    elif cut == "stop_token_ids":
        params = params.replace(stop_token_ids=[free.token_ids[depth]])
    elif cut == "max_tokens":
        params = params.replace(max_tokens=depth)
    elif cut == "eos":
        params = params.replace(ignore_eos=False, logit_bias={258: 6.0})
    expected = _end(plain, params, None)
    beyond = [*expected[3], *free.token_ids[len(expected[0]) :], *range(8)]
    assert _end(speculating, params, Scripted(oracle([beyond]))) == expected
    assert speculating.stats().speculation.total.accepted >= min(depth, len(expected[0])) - 2
    assert expected[2] in {"stop", "length", "eos", "context_full"}


def _end(engine, params, speculate):
    branch = engine.prompt(TEXT)
    (done,) = engine.complete([branch], params, speculate=speculate)
    return done.token_ids, done.text, done.finish_reason, branch.token_ids


def test_a_draft_model_keeps_the_tokens(make_engine):
    plain, speculating = make_engine("qwen3"), make_engine("qwen3")
    draft = make_engine("llama")
    for params in (GREEDY, PARAMS["drawn"], PARAMS["penalties"]):
        expected = run(plain, params)
        for speculate in (DraftModel(draft), DraftModel(draft, tokens=3, width=3, adaptive=False)):
            got = run(speculating, params, speculate)
            assert [row[0] for row in got] == [row[0] for row in expected]
    assert draft.branches == []


@pytest.mark.parametrize("width", [1, 3])
def test_a_draft_model_that_is_the_model_is_always_right(make_engine, width):
    engine, draft = make_engine(), make_engine()
    for params in (GREEDY, PARAMS["hot"]):
        forks = engine.prompt(TEXT).fork(2)
        before = engine.stats()
        speculate = DraftModel(draft, tokens=4, width=width, adaptive=False)
        engine.complete(forks, params.replace(max_tokens=41), speculate=speculate)
        assert engine.stats().steps - before.steps == 8
    total = engine.stats().speculation.total
    assert width > 1 or total.accept_rate == 1


def test_other_jobs_run_beside_one_that_speculates(make_engine):
    plain, speculating = make_engine(), make_engine()
    results = []
    for engine, speculate in ((plain, None), (speculating, Scripted(noise(5, 250)))):
        a, b, c = engine.prompt(TEXT).fork(3)
        job = engine.submit([a, b], PARAMS["drawn"], speculate=speculate)
        other = engine.submit([c], PARAMS["hot"].replace(max_tokens=60))
        late = engine.prompt("a prompt that comes meanwhile " * 6)
        engine.complete([late], GREEDY)
        job.result(), other.result()
        results.append([branch.token_ids for branch in (a, b, c, late)])
    assert results[0] == results[1]


def test_speculation_that_is_off_changes_nothing(make_engine):
    engine = make_engine()
    run(engine, GREEDY)
    assert engine.stats().speculation.total.steps == 0
    assert engine.stats().speculation.branches == {}
