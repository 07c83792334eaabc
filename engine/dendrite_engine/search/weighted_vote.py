"""The weighted vote: the answer whose texts are worth most together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.tree import Node
from dendrite_engine.search.votes import Vote


@dataclass(frozen=True, kw_only=True)
class WeightedVote(Vote):
    """Weighted vote: samples `n` texts and returns the answer with the greatest sum of values.

        answer = argmax over a of sum of value(text_i) over i with extract(text_i) = a

    (Li et al., "Making Language Models Better Reasoners with Step-Aware Verifier", ACL 2023; as
    weighted best-of-N in Snell et al., "Scaling LLM Test-Time Compute Optimally", 2024.) The text
    that is valued highest stands for its answer. Values must be in [0, 1].

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "weighted-vote"

    def _check(self, value: float | None) -> None:
        if value is not None and not 0.0 <= value <= 1.0:
            raise InvalidArgument(
                f"the evaluator gave {value}; a weighted vote wants values in [0, 1]: squash them "
                "in the evaluator"
            )

    def _weight(self, node: Node) -> float:
        return node.value

    def _speaks_better(self, node: Node, speaker: Node) -> bool:
        return node.value > speaker.value
