"""Sampled tokens have the model's distribution: against all probabilities of a tiny model, computed
without the engine.

Two tokens are drawn at temperature from the 5 likeliest; each of the 25 pairs has a probability
known exactly. A chi-square test over N independent branches accepts with probability 1 - 10^-6 when
the distribution is right. The seed is fixed, so a pass stays a pass; a wrong distribution of the
size of a typical mistake is noticed, which the last test shows.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from proposers import Scripted, noise

from dendrite_engine import DraftModel, SamplingParams
from dendrite_engine.models.tokenizer import Tokenizer
from tiny_models import reference_model

TEXT = "the exact distribution of the next tokens"
DRAWN = SamplingParams(temperature=1.4, top_k=5, max_tokens=4, ignore_eos=True, seed=11)
BRANCHES = 1500
FALSE_ALARM = 1e-6


def next_probabilities(model, ids: list[int]) -> dict[int, float]:
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    top = torch.topk(logits, DRAWN.top_k)
    weights = torch.softmax(top.values / DRAWN.temperature, 0)
    return dict(zip(top.indices.tolist(), weights.tolist(), strict=True))


@pytest.fixture(scope="module", name="pairs")
def _pairs(tiny_model):
    """Probability of each first and second token after the text."""
    model = reference_model(tiny_model("llama"))
    ids = Tokenizer(tiny_model("llama")).encode(TEXT)
    return {
        (a, b): first * second
        for a, first in next_probabilities(model, ids).items()
        for b, second in next_probabilities(model, [*ids, a]).items()
    }


def chi_square_limit(freedom: int) -> float:
    """The value that a right distribution exceeds with probability `FALSE_ALARM`: Wilson and
    Hilferty's cube root (1931), with the normal quantile of 10^-6.
    """
    quantile = 4.753424
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + quantile * math.sqrt(spread)) ** 3


def statistic(drawn: list[tuple[int, ...]], pairs: dict[tuple[int, int], float]) -> float:
    counts = dict.fromkeys(pairs, 0)
    for pair in drawn:
        counts[pair] += 1  # a pair that can't be drawn is a KeyError
    return sum((counts[p] - len(drawn) * q) ** 2 / (len(drawn) * q) for p, q in pairs.items())


def draw(engine, speculate) -> list[tuple[int, ...]]:
    """The first two of four tokens of many branches: no branch ends at what is tested."""
    root = engine.prompt(TEXT[:-1])
    root.extend(TEXT[-1])  # the first token is drawn after a forward pass, so it can be guessed
    forks = root.fork(BRANCHES)
    done = []
    for start in range(0, BRANCHES, 100):
        batch = forks[start : start + 100]
        done += engine.complete(batch, DRAWN, speculate=speculate)
        for branch in batch:
            branch.prune()
    return [tuple(completion.token_ids[:2]) for completion in done]


def test_the_limit_is_that_of_the_chi_square_distribution():
    rng = np.random.default_rng(0)
    over = (rng.chisquare(24, 4_000_000) > chi_square_limit(24)).sum()
    assert 0 <= over <= 20


@pytest.mark.parametrize(
    "how", ["plain", "tree of noise", "draft model", "tree of a draft model", "rejection"]
)
def test_pairs_come_with_their_exact_probabilities(make_engine, pairs, how):
    assert sum(pairs.values()) == pytest.approx(1)
    engine = make_engine(debug=False, num_pages=4000)
    draft = make_engine("llama-bias", debug=False, num_pages=4000)
    speculate = {
        "plain": None,
        "tree of noise": Scripted(noise(1, 250)),
        "draft model": DraftModel(draft, tokens=2, adaptive=False),
        "tree of a draft model": DraftModel(draft, tokens=2, width=3, adaptive=False),
        "rejection": DraftModel(draft, tokens=3, adaptive=False, rejection=True),
    }[how]
    assert statistic(draw(engine, speculate), pairs) < chi_square_limit(len(pairs) - 1)
    assert how == "plain" or engine.stats().speculation.total.proposed > BRANCHES


def test_a_slightly_wrong_distribution_is_noticed(make_engine, pairs):
    """What comes out when guesses are kept a little too often."""
    drawn = draw(make_engine(debug=False, num_pages=4000), None)
    likely = max(pairs, key=pairs.__getitem__)
    rng = np.random.default_rng(2)
    biased = [likely if rng.random() < 0.12 else pair for pair in drawn]
    assert statistic(biased, pairs) > chi_square_limit(len(pairs) - 1)
