"""Verification by rejection: other tokens than plain decoding, but of the same distribution.

A guess g that was drawn from a distribution q is kept with probability min(1, p(g) / q(g)), p being
what the model's next token is drawn from; where it is not, the token is drawn from what is left of
p, max(p - q, 0) normalised (Leviathan et al. 2023, algorithm 1; Chen et al. 2023). That keeps as
many guesses drawn from q as any scheme can, sum of min(p, q), while comparing with plain decoding's
own draw keeps fewer the hotter the distribution is (`dendrite-lab bench spec` has numbers).

Both decisions have random numbers of their own, keyed by position like all others, so a run can be
repeated. A guess that was dropped unseen, behind one that was refused, has had no influence on
anything, so its random number is as good as new when its position comes again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dendrite_engine.kernels.reference_sampling import probabilities
from dendrite_engine.kernels.sampling_batch import SamplingBatch
from dendrite_engine.sampling import SamplerState, uniform
from dendrite_engine.speculation.base import Chances

_ACCEPT, _AGAIN = 0x5AFEC0DE5EED0001, 0x5AFEC0DE5EED0002  # apart from the draws themselves


def follow(
    guesses: Sequence[int],
    chances: Sequence[Chances],
    logits: torch.Tensor,
    rows: np.ndarray,
    batch: SamplingBatch,
    first: int,
    positions: np.ndarray,
    sampler: SamplerState,
) -> tuple[int, int | None]:
    """How many of a branch's guesses are kept, and the token that replaces the next one.

    Args:
        guesses: tokens, each drawn from its distribution.
        chances: those distributions.
        logits: fp32 [R, vocab], in host memory.
        rows: row in `logits` of each row of the step, i64.
        batch: how each row of the step is sampled.
        first: row of the step behind which the first guess comes; the others follow.
        positions: of the tokens that come after each row of the step, i32.
        sampler: whose draws these are.

    Returns:
        (guesses kept, token); None where all were kept, so that the token after them is drawn as in
        plain decoding, or where a row is not finite.
    """
    for depth, (guess, chance) in enumerate(zip(guesses, chances, strict=True)):
        raw = logits[int(rows[first + depth])].numpy()
        position = int(positions[first + depth])
        if not np.isfinite(raw).all():
            return depth, None
        ids, p = probabilities(raw, batch, first + depth)
        q = chance.of(ids)
        mine = p[ids == guess].sum()
        if uniform(sampler.seed, sampler.path_key ^ _ACCEPT, position) * chance.at(guess) < mine:
            continue
        left = np.maximum(p - q, 0.0)
        if left.sum() <= 0:  # p == q up to rounding: a refusal had no probability
            left = p
        running = np.cumsum(left)
        target = uniform(sampler.seed, sampler.path_key ^ _AGAIN, position) * running[-1]
        return depth, int(ids[min(int((running <= target).sum()), len(ids) - 1)])
    return len(guesses), None


def logprob_of(raw: np.ndarray, token: int) -> float:
    """Log-probability of a token under the unmodified model."""
    x = raw.astype(np.float64)
    top = x.max()
    return float(x[token] - top - np.log(np.exp(x - top).sum()))
