"""Speculative decoding: guess several tokens, verify them in one forward pass, keep the right ones.

The tokens are those of plain decoding, at every temperature: each position is drawn from the
model's own logits with the draw that plain decoding would use there, and a guess is kept where it
equals what was drawn. So guesses change how many forward passes a text takes, and nothing else.
(`DraftModel(rejection=True)` trades that for the distribution alone.)

    for event in engine.generate(branch, params, speculate=PromptLookup()): ...
"""

from __future__ import annotations

from dendrite_engine.speculation.base import (
    Chances,
    DraftRequest,
    Proposer,
    SampledPath,
    Speculation,
)
from dendrite_engine.speculation.draft_model import DraftModel
from dendrite_engine.speculation.prompt_lookup import PromptLookup

__all__ = [
    "Chances",
    "DraftModel",
    "DraftRequest",
    "PromptLookup",
    "Proposer",
    "SampledPath",
    "Speculation",
]
