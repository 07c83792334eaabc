"""REBASE, reward balanced search: each round's budget is shared out by reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.search.checks import number, whole
from dendrite_engine.search.steps import StepSearch, StepState
from dendrite_engine.search.tree import Node


@dataclass(frozen=True, kw_only=True)
class REBASE(StepSearch):
    """Reward balanced search: the children of a round are shared out by a softmax of rewards.

    The root samples `width` steps. Complete texts keep their places; with C of them so far, the
    nodes j of a round that go on share `width - C` children as

        children_j ~ (width - C) * exp(R_j / balance) / sum over k of exp(R_k / balance)

    with R the rank of a node. (Wu et al., "An Empirical Analysis of Compute-Optimal Inference for
    Problem-Solving with Language Models", 2024, who name the method REBASE.) Shares
    are rounded by largest remainder, so that they add up to `width - C` exactly; nodes whose share
    is 0 are pruned. The search ends with `width` complete texts.

    Args:
        width: children of a round, and complete texts in the end.
        balance: temperature of the softmax: near 0 all go to the best, a large one shares equally.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "rebase"
    live_options: ClassVar[frozenset[str]] = StepSearch.live_options | {"balance"}

    width: int = 16
    balance: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("width", self.width, 1)
        number("balance", self.balance, 0, above=True)
        self._refuse_greedy("width", self.width)

    def _first(self) -> int:
        return self.width

    def _choose(self, state: StepState, children: list[Node]) -> list[tuple[Node, int]]:
        going: list[Node] = []
        for node in children:
            if node.status == "terminal":
                self._complete(state, node)
            else:
                going.append(node)
        rewards = [self.rank(state, node) for node in going]
        counts = shares(rewards, self.width - len(state.finished), self.balance)
        return list(zip(going, counts, strict=True))


def shares(rewards: Sequence[float], budget: int, balance: float) -> list[int]:
    """Whole parts of `budget` in proportion to `exp(reward / balance)`, by largest remainder.

    They add up to `budget` exactly where there are rewards, and a higher reward never gets less.
    Ties go to the earlier. O(n log n).
    """
    if not rewards:
        return []
    top = max(rewards)
    weights = [math.exp((reward - top) / balance) for reward in rewards]
    total = math.fsum(weights)
    exact = [budget * weight / total for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], -rewards[i], i))
    for index in by_remainder[: budget - sum(counts)]:
        counts[index] += 1
    return counts
