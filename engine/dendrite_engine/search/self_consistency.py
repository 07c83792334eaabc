"""Self-consistency: the answer that most texts agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import number
from dendrite_engine.search.votes import Vote, VoteState


@dataclass(frozen=True, kw_only=True)
class SelfConsistency(Vote):
    """Self-consistency: samples `n` texts and returns the answer that most of them give.

        answer = argmax over a of #{i : extract(text_i) = a}

    (Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", ICLR
    2023.) The oldest text with an answer stands for it, and no evaluator is asked. With
    `confidence` below 1 the vote may also end when it is likely enough to be decided: with v1 and
    v2 votes for the two leading answers, that the first is the commoner one has the probability

        P(p1 > p2) = P(Beta(v1 + 1, v2 + 1) > 1/2)

    (Aggarwal et al., "Let's Sample Step by Step: Adaptive-Consistency", EMNLP 2023).

    Args:
        confidence: end when the lead is real with this probability, in (0.5, 1]; 1 waits until
            nothing can change it.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "self-consistency"
    needs_values: ClassVar[bool] = False

    confidence: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("confidence", self.confidence, 0.5, above=True)
        if self.confidence > 1:
            raise InvalidArgument(f"confidence must be at most 1, got {self.confidence}")

    def _is_decided(self, state: VoteState) -> str | None:
        reason = super()._is_decided(state)
        ballots = self.leading(state)
        if reason is not None or not ballots or not self._to_come(state):
            return reason
        second = ballots[1].votes if len(ballots) > 1 else 0
        sure = lead_probability(ballots[0].votes, second) >= self.confidence
        return "decided" if self.stop_when_decided and self.confidence < 1 and sure else None


def lead_probability(first: int, second: int) -> float:
    """`P(Beta(first + 1, second + 1) > 1/2)`, exactly. O(first + second).

    A beta distribution function at whole parameters is a binomial tail: the probability of at most
    `first` heads in `first + second + 1` fair tosses.
    """
    tosses = first + second + 1
    at_most = sum(math.comb(tosses, heads) for heads in range(first + 1))
    return float(at_most / 2**tosses)
