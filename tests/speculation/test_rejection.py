"""Verification by rejection: one position against its exact distribution, and what it is worth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dendrite_engine import DraftModel, SamplingParams
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.reference_sampling import probabilities
from dendrite_engine.sampling import SamplerState, SamplingRows
from dendrite_engine.speculation import Chances
from dendrite_engine.speculation.rejection import follow, logprob_of

VOCAB = 12
DRAWN = SamplingParams(temperature=1.3, max_tokens=40, ignore_eos=True)
TEXT = "one two three, one two four; one two three, one two "


def test_one_position_has_the_exact_distribution_whatever_the_guesses_are_drawn_from():
    """40,000 positions; each frequency within 4.9 standard deviations of its probability, which a
    right distribution leaves with probability 12 x 10^-6.
    """
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(0, 2, (1, VOCAB)).astype(np.float32))
    params = SamplingParams(temperature=0.9, top_p=0.97, logit_bias={4: 1.5}, seed=5)
    state = SamplerState(params, 5, 77)
    settings = SamplingRows.of([state])
    ids, p = probabilities(logits[0].numpy(), settings.batch(np.zeros(1, np.int32)), 0)
    support = np.array([0, 3, 4, 7, 9])
    q = Chances(support, rng.dirichlet(np.ones(5)))
    counts, kept, trials = np.zeros(VOCAB), 0, 40_000
    batch = settings.batch(np.zeros(1, np.int32))
    for position in range(trials):
        guess = int(rng.choice(support, p=q.values))
        right, instead = follow(
            [guess], [q], logits, np.zeros(1, np.int64), batch, 0, np.array([position]), state
        )
        kept += right
        counts[guess if instead is None else instead] += 1
    exact = np.zeros(VOCAB)
    exact[ids] = p
    deviation = np.sqrt(trials * exact * (1 - exact))
    assert (np.abs(counts - trials * exact) <= 4.9 * deviation).all()
    assert kept / trials == pytest.approx(np.minimum(p, q.of(ids)).sum(), abs=0.012)


def test_probabilities_are_those_that_the_sampler_draws_from():
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 3, 40).astype(np.float32)
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02)
    rows = SamplingRows.of([SamplerState(params, 1, 2)])
    ids, p = probabilities(logits, rows.batch(np.zeros(1, np.int32)), 0)
    weights = np.exp(logits.astype(np.float64) / 0.7)
    order = np.argsort(-weights)[:20]
    mass = np.cumsum(weights[order]) / weights[order].sum()
    order = order[: 1 + int((mass < 0.9).sum())]
    order = order[weights[order] >= 0.02 * weights[order[0]]]
    assert ids.tolist() == order.tolist()
    np.testing.assert_allclose(p, weights[order] / weights[order].sum(), rtol=1e-6)
    assert logprob_of(logits, 3) == pytest.approx(float(torch.from_numpy(logits).log_softmax(0)[3]))


def test_a_guess_that_could_not_come_is_never_kept():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    state = SamplerState(SamplingParams(temperature=1.0, logit_bias={1: float("-inf")}), 1, 2)
    batch = SamplingRows.of([state]).batch(np.zeros(1, np.int32))
    q = Chances(np.array([1]), np.array([1.0]))
    for position in range(200):
        kept, token = follow(
            [1], [q], logits, np.zeros(1, np.int64), batch, 0, np.array([position]), state
        )
        assert kept == 0
        assert token in (0, 2)


def test_rejection_keeps_more_of_a_draft_models_guesses(make_engine):
    rates = []
    for rejection in (False, True):
        engine, draft = make_engine(debug=False), make_engine("llama-bias", debug=False)
        speculate = DraftModel(draft, tokens=3, adaptive=False, rejection=rejection)
        forks = engine.prompt(TEXT).fork(24)
        engine.complete(forks, DRAWN, speculate=speculate)
        rates.append(engine.stats().speculation.total.accept_rate)
    assert rates[1] > 1.5 * rates[0]


def test_rejection_repeats_itself_and_leaves_greedy_tokens_alone(make_engine):
    def run(params, rejection):
        engine, draft = make_engine(), make_engine("llama-bias")
        speculate = DraftModel(draft, tokens=3, adaptive=False, rejection=rejection)
        forks = engine.prompt(TEXT).fork(3)
        return [c.token_ids for c in engine.complete(forks, params, speculate=speculate)]

    assert run(DRAWN, True) == run(DRAWN, True)
    assert run(DRAWN, True) != run(DRAWN, False)
    greedy = DRAWN.replace(temperature=0.0)
    assert run(greedy, True) == run(greedy, False)


def test_a_draft_model_that_is_the_model_is_nearly_always_right(make_engine):
    engine, draft = make_engine(), make_engine()
    speculate = DraftModel(draft, tokens=4, adaptive=False, rejection=True)
    forks = engine.prompt(TEXT).fork(4)
    done = engine.complete(forks, DRAWN.replace(top_k=30), speculate=speculate)
    assert engine.stats().speculation.total.accept_rate > 0.95
    for branch, completion in zip(forks, done, strict=True):
        expected = make_engine().prompt(branch.token_ids[:-1])
        assert expected.num_tokens == branch.num_tokens - 1
        assert branch.logprobs[-40:] == pytest.approx(completion.logprobs)


def test_trees_and_devices_are_refused(make_engine):
    draft = make_engine()
    with pytest.raises(InvalidArgument, match="width must be 1"):
        DraftModel(draft, width=2, rejection=True)
    engine = make_engine("llama-wide", device="cuda-twin", dtype="float32")
    with pytest.raises(InvalidArgument, match="device path"):
        engine.submit(engine.prompt("x"), speculate=DraftModel(draft, rejection=True))
