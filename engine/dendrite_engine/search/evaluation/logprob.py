"""Values out of the model's own log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dendrite_engine.search.checks import flag

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(frozen=True)
class LogprobEvaluator:
    """Mean or summed log-probability of the generated tokens; see `mean_logprob`, `sum_logprob`."""

    mean: bool
    squash: bool
    start: int = 0

    def bind(self, root: Branch) -> LogprobEvaluator:
        """Count only tokens after `root`."""
        return replace(self, start=root.num_tokens)

    def __call__(self, branches: Sequence[Branch]) -> list[float]:
        """One value for each branch. O(tokens)."""
        return [self._value(branch) for branch in branches]

    def _value(self, branch: Branch) -> float:
        # forced tokens have no log-probability and don't count
        known = [x for x in branch.logprobs[self.start :] if x is not None and x == x]
        total = math.fsum(known)
        value = total / max(1, len(known)) if self.mean else total
        return math.exp(value) if self.squash else value


def mean_logprob(*, squash: bool = True) -> LogprobEvaluator:
    """Mean log-probability of the tokens that the search generated on a branch.

    Args:
        squash: return its exponential, the geometric mean probability, in (0, 1]; without it values
            are <= 0 and UCT needs `normalise="minmax"`.
    """
    flag("squash", squash)
    return LogprobEvaluator(mean=True, squash=squash)


def sum_logprob(*, squash: bool = False) -> LogprobEvaluator:
    """Summed log-probability of the tokens that the search generated on a branch.

    Args:
        squash: return its exponential, the probability of the text, in (0, 1]; it falls fast with
            length, so `normalise="minmax"` on the plain sum (<= 0) is mostly the better choice.
    """
    flag("squash", squash)
    return LogprobEvaluator(mean=False, squash=squash)
