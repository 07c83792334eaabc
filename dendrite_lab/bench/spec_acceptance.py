"""How often a draft model's guess would be kept, by the two ways of verifying sampled guesses.

Computed, not sampled: for every position of a text the two models' distributions are known, so the
probability that a guess is kept is a sum over the vocabulary. The draft models are the model itself
with layers left out, from good to poor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dendrite_engine.scoring import Scorer, ScoringModel
from dendrite_lab.bench.workload import prompt_ids

F64 = NDArray[np.float64]
_LEFT_OUT = ((14,), (12, 18), (10, 14, 18, 22), (8, 10, 12, 14, 16, 18, 20, 22))
_TEMPERATURES = (0.3, 0.7, 1.0)
_SKIPPED = 16  # first positions, where no model knows much


def acceptance(model: str, tokens: int = 160) -> list[dict[str, Any]]:
    """One row for each draft model and temperature: mean probabilities that a guess is kept.

    `rejection`: sampled and verified by rejection, sum of min(p, q): the most for sampled ones.
    `same_draws`: drawn with the random numbers that the model will use. `likeliest`: the draft's
    most likely token, p(argmax q).
    """
    loaded = ScoringModel.load(model)
    ids = prompt_ids(loaded.tokenizer, tokens)
    logits = _logits(loaded, ids, ())
    rows = []
    for left_out in _LEFT_OUT:
        if max(left_out) >= loaded.config.num_layers:
            continue
        guesses = _logits(loaded, ids, left_out)
        for temperature in _TEMPERATURES:
            p, q = _softmax(logits / temperature), _softmax(guesses / temperature)
            likeliest = p[np.arange(len(p)), q.argmax(-1)]
            rows.append(
                {
                    "layers_left_out": len(left_out),
                    "temperature": temperature,
                    "rejection": round(float(np.minimum(p, q).sum(-1).mean()), 3),
                    "same_draws": round(float(np.mean([*map(_coupled, p, q)])), 3),
                    "likeliest": round(float(likeliest.mean()), 3),
                }
            )
    return rows


def _logits(model: ScoringModel, ids: list[int], left_out: tuple[int, ...]) -> F64:
    """Logits after each token, f64 [T, vocab], without some layers."""
    layers = model.transformer.layers
    pages = model.pages("fp32", len(ids))
    kept = [layer for place, layer in enumerate(layers) if place not in left_out]
    views = list(pages.views())[: len(kept)]
    pages.views = lambda: views  # type: ignore[method-assign]
    model.transformer.layers = kept
    try:
        found: F64 = Scorer(model, pages).feed(ids)[_SKIPPED:].double().numpy()
    finally:
        model.transformer.layers = layers
    return found


def _softmax(x: F64) -> F64:
    weights = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _coupled(p: F64, q: F64) -> float:
    """Probability that one uniform number gives the same token by both inverse distributions, each
    over its own tokens in order of probability: the overlap of the tokens' intervals.
    """
    (low_p, high_p), (low_q, high_q) = _intervals(p), _intervals(q)
    return float(np.maximum(0, np.minimum(high_p, high_q) - np.maximum(low_p, low_q)).sum())


def _intervals(p: F64) -> tuple[F64, F64]:
    order = np.argsort(-p, kind="stable")
    high = np.empty_like(p)
    high[order] = np.cumsum(p[order])
    return high - p, high
