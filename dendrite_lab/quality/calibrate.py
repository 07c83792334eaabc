"""`dendrite-lab calibrate`: the mean of each head's K, stored beside the weights.

It is found on text that the model itself writes (sampled at temperature 1, fixed seeds), so that it
needs no data and leaves every text free to be measured on.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dendrite_engine.cache.key_mean import save_key_mean
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.scoring import AttentionProbe, Scorer, ScoringModel

_OPENINGS = (
    "The", "In the beginning", "def main():\n", "Question:", "Once upon a time", "Chapter 1\n",
    "According to", "# Introduction\n",
)  # fmt: skip


def calibrate(model: str | Path, tokens: int = 4096, seed: int = 0) -> Path:
    """Find the mean and write it; returns the file.

    Args:
        model: what `Engine.from_pretrained` takes.
        tokens: how many sampled tokens it is taken over.
        seed: of the sampling.

    Raises:
        InvalidArgument: tokens is below one for each opening.
        ModelError: the model can't be read, or its folder not written.
    """
    if tokens < len(_OPENINGS):
        raise InvalidArgument(f"tokens must be at least {len(_OPENINGS)}, got {tokens}")
    loaded = ScoringModel.load(model)
    return save_key_mean(loaded.path, key_mean(loaded, tokens, seed))


def key_mean(model: ScoringModel, tokens: int, seed: int) -> torch.Tensor:
    """Mean of K over sampled text, fp32 [num_layers, kv_heads, head_dim]."""
    each = min(tokens // len(_OPENINGS), model.config.max_context - 64)
    probe = AttentionProbe(model, {})
    scorer = Scorer(model, model.pages("fp32", each + 64), probe)
    generator = torch.Generator().manual_seed(seed)
    for opening in _OPENINGS:
        scorer.reset()
        logits = scorer.feed(model.tokenizer.encode(opening), 1)
        for _ in range(each):
            weights = torch.softmax(logits[-1], -1)
            logits = scorer.feed([int(torch.multinomial(weights, 1, generator=generator))])
    return probe.key_mean()
