"""Stochastic beam search samples without replacement: against exact inclusion probabilities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from search_fakes import EOS, FakeEngine

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import Runner, StochasticBeam, start_search
from dendrite_engine.search.stochastic_beam import condition_on_max

ENDLESS = -1e9
RUNS = 3000


def every_text(engine, prompt, max_tokens):
    """Probability of every complete text."""
    texts = {}
    for length in range(1, max_tokens + 1):
        for text in itertools.product(range(engine.model_config.vocab_size), repeat=length):
            if EOS in text[:-1] or (text[-1] != EOS and length < max_tokens):
                continue
            total = 0.0
            for i, token in enumerate(text):
                total += engine.logprobs_after([*prompt, *text[:i]])[token]
            texts[text] = math.exp(total)
    return texts


def sample(engine, root, **options):
    search = StochasticBeam(**options)
    runner, state = Runner(engine, root), search.init(root)
    while not search.done(state):
        search.tell(state, runner.run(search.ask(state, search.plan(state).trials)))
        runner.settle(state)
    runner.keeper.prune_all()
    return search, state


def texts_of(search, state):
    return [tuple(state.tree.tokens(node)) for node in search.found(state)]


@pytest.fixture(scope="module")
def samples():
    """Many samples of 3 texts of at most 3 tokens out of 4, and the texts' probabilities."""
    engine = FakeEngine(4, seed=5, eos=0.7)
    root = engine.prompt([1, 2])
    runs = [sample(engine, root, width=3, max_tokens=3, seed=seed) for seed in range(RUNS)]
    assert engine.branches == [root]
    return every_text(engine, [1, 2], 3), runs


def test_a_sample_holds_no_text_twice(samples):
    texts, runs = samples
    assert sum(texts.values()) == pytest.approx(1.0)
    for search, state in runs:
        found = texts_of(search, state)
        assert len(set(found)) == len(found) == 3
        assert set(found) <= set(texts)


def test_the_first_text_is_a_sample_of_the_model(samples):
    texts, runs = samples
    counts = dict.fromkeys(texts, 0)
    for search, state in runs:
        counts[texts_of(search, state)[0]] += 1
    chi = sum((counts[t] - RUNS * p) ** 2 / (RUNS * p) for t, p in texts.items())
    degrees = len(texts) - 1
    assert chi < degrees + 5 * math.sqrt(2 * degrees)


def test_the_second_text_is_a_sample_of_what_is_left(samples):
    texts, runs = samples
    pairs = {}
    for search, state in runs:
        pair = tuple(texts_of(search, state)[:2])
        pairs[pair] = pairs.get(pair, 0) + 1
    likely = sorted(texts, key=texts.get, reverse=True)[:5]
    for first, second in itertools.permutations(likely, 2):
        expected = texts[first] * texts[second] / (1 - texts[first])
        error = math.sqrt(expected * (1 - expected) / RUNS)
        assert abs(pairs.get((first, second), 0) / RUNS - expected) < 4.5 * error


def test_inclusion_probabilities_are_those_of_sampling_without_replacement(samples):
    texts, runs = samples
    counts = dict.fromkeys(texts, 0)
    for search, state in runs:
        for text in texts_of(search, state):
            counts[text] += 1
    exact = dict.fromkeys(texts, 0.0)
    for a, b, c in itertools.permutations(texts, 3):
        left = 1 - texts[a]
        p = texts[a] * texts[b] / left * texts[c] / (left - texts[b])
        for text in (a, b, c):
            exact[text] += p
    assert sum(exact.values()) == pytest.approx(3.0)
    for text, p in exact.items():
        assert abs(counts[text] / RUNS - p) < 4.5 * math.sqrt(p * (1 - p) / RUNS) + 1e-9


def test_weighting_by_inclusion_gives_unbiased_means(samples):
    texts, runs = samples
    for function in (len, lambda text: float(text[0] == 1), lambda text: 1.0):
        truth = sum(p * function(t) for t, p in texts.items())
        estimates = []
        for search, state in runs:
            total = 0.0
            for node in search.found(state):
                text = tuple(state.tree.tokens(node))
                total += texts[text] / search.inclusion(state, node) * function(text)
            estimates.append(total)
        error = np.std(estimates) / math.sqrt(RUNS)
        assert abs(np.mean(estimates) - truth) < 4.5 * error


def test_a_sample_of_everything_is_exhaustive_search():
    engine = FakeEngine(3, seed=2, eos=0.5)
    texts = every_text(engine, [1], 3)
    root = engine.prompt([1])
    result = start_search(engine, root, StochasticBeam(width=100, max_tokens=3)).wait(60)
    assert {found.token_ids for found in result.found} == set(texts)
    best = max(texts, key=texts.get)
    assert result.token_ids == best
    assert result.value == pytest.approx(math.log(texts[best]))


def test_a_temperature_and_candidates_change_what_is_sampled_from():
    engine = FakeEngine(5, seed=1, eos=ENDLESS)
    root = engine.prompt([1, 2])
    cold = [
        texts_of(*sample(engine, root, width=1, max_tokens=1, seed=s, temperature=0.05))[0]
        for s in range(60)
    ]
    logprobs = engine.logprobs_after([1, 2])
    likely = sorted(range(5), key=lambda token: -logprobs[token])
    assert cold.count((likely[0],)) > 50
    some = {
        texts_of(*sample(engine, root, width=1, max_tokens=1, seed=s, candidates=2))[0]
        for s in range(60)
    }
    assert some == {(likely[0],), (likely[1],)}


def test_tokens_keep_the_models_own_log_probabilities():
    engine = FakeEngine(5, seed=1, eos=ENDLESS)
    _, state = sample(engine, engine.prompt([1, 2]), width=2, max_tokens=3, temperature=0.5)
    for node in state.tree.nodes[1:]:
        before = [1, 2, *state.tree.tokens(node.parent)]
        assert node.logprobs[0] == pytest.approx(engine.logprobs_after(before)[node.token_ids[0]])


def test_the_shift_of_gumbels_keeps_their_order_and_has_the_wanted_maximum():
    values = np.array([-1.0, 3.0, 2.9999999999, -50.0, 3.0, -800.0])
    shifted = condition_on_max(values, 0.25)
    assert shifted.max() == pytest.approx(0.25, abs=1e-12)
    assert np.isfinite(shifted).all()
    assert (np.diff(shifted[np.argsort(values, kind="stable")]) >= -1e-12).all()
    plain = -np.log(np.exp(-0.25) - np.exp(-3.0) + np.exp(-values[[0, 2]]))
    assert shifted[[0, 2]] == pytest.approx(plain)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0}, "temperature"),
        ({"candidates": 0}, "candidates"),
        ({"width": 4, "candidates": 3}, "candidates=3 must be at least width=4"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, named):
    with pytest.raises(InvalidArgument, match=named):
        StochasticBeam(**options)
