"""Several evaluators made one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import number, one_of
from dendrite_engine.search.evaluation.base import (
    Answer,
    Evaluator,
    answers,
    bind,
    tokens_computed,
)

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

How = Literal["mean", "sum", "product", "min"]


@dataclass(frozen=True)
class CombinedEvaluator:
    """Several evaluators made one; see `combine`."""

    parts: tuple[Evaluator, ...]
    weights: tuple[float, ...]
    how: How

    def bind(self, root: Branch) -> CombinedEvaluator:
        """Bind every part."""
        return replace(self, parts=tuple(bind(part, root) for part in self.parts))

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """Run each part once over the whole batch and combine its values branch by branch.

        A branch on which one part failed has that failure as its answer.
        """
        columns = [answers(part, branches) for part in self.parts]
        return [self._one(row) for row in zip(*columns, strict=True)]

    def tokens_computed(self) -> int:
        """Tokens computed for the parts."""
        return sum(map(tokens_computed, self.parts))

    def _one(self, row: tuple[Answer, ...]) -> Answer:
        values: list[float] = []
        for answer in row:
            if isinstance(answer, Exception):
                return answer
            values.append(answer)
        if self.how == "min":
            return min(values)
        if self.how == "product":
            return math.prod(float(v**w) for v, w in zip(values, self.weights, strict=True))
        total = math.fsum(v * w for v, w in zip(values, self.weights, strict=True))
        return total if self.how == "sum" else total / math.fsum(self.weights)


@dataclass(frozen=True)
class FirstAnswer:
    """The first evaluator that answers; see `first_of`."""

    parts: tuple[Evaluator, ...]

    def bind(self, root: Branch) -> FirstAnswer:
        """Bind every part."""
        return replace(self, parts=tuple(bind(part, root) for part in self.parts))

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """Ask each part about the branches that none before it answered."""
        found: dict[int, Answer] = {}
        left = list(range(len(branches)))
        for part in self.parts:
            if not left:
                break
            found.update(zip(left, self._ask(part, [branches[i] for i in left]), strict=True))
            left = [i for i in left if not _is_answer(found[i])]
        return [found[i] for i in range(len(branches))]

    def tokens_computed(self) -> int:
        """Tokens computed for the parts."""
        return sum(map(tokens_computed, self.parts))

    @staticmethod
    def _ask(part: Evaluator, branches: Sequence[Branch]) -> list[Answer]:
        try:
            return answers(part, branches)
        except Exception as error:  # a part that fails has not answered
            return [error] * len(branches)


def combine(
    *evaluators: Evaluator, weights: Sequence[float] | None = None, how: How = "mean"
) -> CombinedEvaluator:
    """One evaluator out of several: their weighted mean, sum, product, or minimum.

    Values in [0, 1] stay in [0, 1], but for a sum.

    Args:
        evaluators: at least one.
        weights: one positive number for each evaluator; 1 where not given; unused by `min`.
        how: `mean` (arithmetic), `sum`, `product` (of value ** weight) or `min`.
    """
    one_of("how", how, ("mean", "sum", "product", "min"))
    _check(evaluators)
    chosen = tuple(weights) if weights is not None else (1.0,) * len(evaluators)
    if len(chosen) != len(evaluators):
        raise InvalidArgument(f"weights has {len(chosen)} entries for {len(evaluators)} evaluators")
    for weight in chosen:
        number("weights", weight, 0, above=True)
    return CombinedEvaluator(evaluators, chosen, how)


def first_of(*evaluators: Evaluator) -> FirstAnswer:
    """The value of the first evaluator that answers; the next one is asked only where it did not.

    An evaluator does not answer where it raises, or where its value is not finite: a verifier that
    returns NaN where it can't tell, backed by a model that always can.

    Args:
        evaluators: at least one, the preferred one first.
    """
    _check(evaluators)
    return FirstAnswer(evaluators)


def _check(evaluators: Sequence[object]) -> None:
    if not evaluators or not all(callable(e) for e in evaluators):
        raise InvalidArgument("evaluators must be callables, at least one of them")


def _is_answer(answer: Answer) -> bool:
    return not isinstance(answer, Exception) and math.isfinite(answer)
