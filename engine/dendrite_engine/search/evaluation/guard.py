"""The guard between a search and its evaluator: one branch's failure stays its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dendrite_engine.search.evaluation.base import Answer, Evaluator, checked, tokens_computed

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(frozen=True)
class Valued:
    """A value, and what went wrong where it is only a stand-in."""

    value: float
    error: str | None = None


class EvaluatorGuard:
    """Keeps one branch's failing evaluation from the others.

    When a batch raises, its branches are valued one by one. A branch that raises, or whose value is
    not finite, gets the worst value seen so far (0 where there is none). An evaluator that has
    never answered, or that failed `PATIENCE` times in a row, is taken to be broken and its
    exception goes up.
    """

    PATIENCE = 8

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluate = evaluator
        self._worst: float | None = None
        self._failed_in_row = 0
        self._tokens_before = tokens_computed(evaluator)

    @property
    def tokens(self) -> int:
        """Tokens that a model computed for the evaluator since this guard was made."""
        return tokens_computed(self._evaluate) - self._tokens_before

    def memory(self) -> dict[str, Any]:
        """What a checkpoint has to know; an evaluator with a method `checkpoint` adds its own."""
        saved = getattr(self._evaluate, "checkpoint", None)
        return {
            "worst": self._worst,
            "failed_in_row": self._failed_in_row,
            "evaluator": None if saved is None else saved(),
        }

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take what `memory` gave; an evaluator with a method `restore` gets its own back."""
        self._worst = memory.get("worst")
        self._failed_in_row = memory.get("failed_in_row", 0)
        restore = getattr(self._evaluate, "restore", None)
        if restore is not None and memory.get("evaluator") is not None:
            restore(memory["evaluator"])

    def __call__(self, branches: Sequence[Branch]) -> list[Valued]:
        """Value a batch.

        Raises:
            SearchError: the evaluator's answer isn't one number for each branch.
            Exception: whatever the evaluator raises once it is taken to be broken.
        """
        if not branches:
            return []
        found = self._values(branches)
        finite = [v for v in found if not isinstance(v, Exception) and math.isfinite(v)]
        if finite:
            self._worst = min(finite) if self._worst is None else min(self._worst, *finite)
        stand_in = 0.0 if self._worst is None else self._worst
        return [self._valued(value, stand_in) for value in found]

    def _values(self, branches: Sequence[Branch]) -> list[Answer]:
        found: list[Answer]
        try:
            values = self._evaluate(branches)
        except Exception as error:  # whatever user code raises stays with its branch
            found = self._one_by_one(branches, error)
        else:
            found = checked(values, len(branches))
        self._judge(found)
        return found

    def _one_by_one(self, branches: Sequence[Branch], first: Exception) -> list[Answer]:
        if len(branches) == 1:
            return [first]
        found: list[Answer] = []
        for branch in branches:
            try:
                values = self._evaluate([branch])
            except Exception as error:  # noqa: PERF203 the point is to go on
                found.append(error)
            else:
                found += checked(values, 1)
        return found

    def _judge(self, found: list[Answer]) -> None:
        for value in found:
            self._failed_in_row = self._failed_in_row + 1 if isinstance(value, Exception) else 0
        broken = self._worst is None or self._failed_in_row >= self.PATIENCE
        errors = [value for value in found if isinstance(value, Exception)]
        if broken and len(errors) == len(found):
            raise errors[0]

    @staticmethod
    def _valued(value: Answer, stand_in: float) -> Valued:
        if isinstance(value, Exception):
            return Valued(stand_in, f"evaluator raised {type(value).__name__}: {value}")
        if not math.isfinite(value):
            return Valued(stand_in, f"evaluator returned {value}")
        return Valued(value)
