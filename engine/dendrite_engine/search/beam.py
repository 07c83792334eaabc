"""Beam search over single tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.search.beam_groups import GroupedBeam


@dataclass(frozen=True, kw_only=True)
class BeamSearch(GroupedBeam):
    """Token-level beam search: keeps the `width` likeliest texts, a token longer at each step.

    Each step looks up the next-token log-probabilities of all live beams in one forward and ranks
    all continuations by the sum of log-probabilities. Of the best `width`, those that end (a stop
    token, or `max_tokens` reached) become hypotheses with the score

        score = sum of log-probabilities / length ** length_penalty

    (length counts the stop token; Wu et al., "Google's Neural Machine Translation System", 2016,
    for the penalty) and the best `width` that do not end are the next beams. This is the procedure
    of `transformers` 5 `generate(num_beams=width, do_sample=False)`, stopping rules included, and
    gives the same tokens. A beam continues on its parent's branch where it is the first child and
    forks where it is not; beams that fall out are pruned at once. O(width^2) bookkeeping a step.

    Args:
        width: beams.
        length_penalty: above 0 favours long hypotheses (scores are negative), below 0 short ones.
        max_tokens: longest hypothesis.
        early_stopping: when to end with `width` hypotheses complete: `False` when the best live
            beam's score at its present length is below the worst hypothesis, `True` at once,
            `"never"` when no live beam can beat the worst hypothesis at any length.
        stop_token_ids: tokens that complete a hypothesis, besides the model's end-of-text tokens.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "beam"

    def _widths(self) -> list[int]:
        return [self.width]
