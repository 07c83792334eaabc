"""Evaluators: batched callables that give each branch a value.

An evaluator is any callable `evaluate(branches) -> sequence of floats`, one value for each branch,
higher is better; UCT wants them in [0, 1]. It runs on the search's thread, so it may use the
engine. Where it has a method `bind(root) -> evaluator`, that is called once with the branch the
search starts from; the evaluators here use it to look only at what the search wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dendrite_engine.errors import InvalidArgument, SearchError
from dendrite_engine.search.checks import flag, number, one_of, strings

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

Evaluator = Callable[[Sequence["Branch"]], Sequence[float]]


def bind(evaluator: Evaluator, root: Branch) -> Evaluator:
    """The evaluator for a search from `root`; itself where it does not care."""
    binder = getattr(evaluator, "bind", None)
    return evaluator if binder is None else binder(root)


def written(branch: Branch, start: int) -> str:
    """Text of the tokens from position `start` on, special tokens left out."""
    text: str = branch.engine.tokenizer.decode(branch.token_ids[start:], skip_special=True)
    return text


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


@dataclass(frozen=True)
class TextEvaluator:
    """A function of the text that the search wrote; see `verifier` and `keyword_coverage`."""

    fn: Callable[[str], float | bool]
    start: int = 0

    def bind(self, root: Branch) -> TextEvaluator:
        """Show `fn` only text after `root`."""
        return replace(self, start=root.num_tokens)

    def __call__(self, branches: Sequence[Branch]) -> list[float]:
        """One call of `fn` for each branch."""
        return [float(self.fn(written(branch, self.start))) for branch in branches]


def verifier(fn: Callable[[str], float | bool]) -> TextEvaluator:
    """Value a branch by `fn(text)`, the text being what the search wrote on it.

    Args:
        fn: returns a value in [0, 1], or a bool.

    Example:
        >>> evaluate = verifier(lambda text: "because" in text)
    """
    if not callable(fn):
        raise InvalidArgument(f"fn must be callable, got {fn!r}")
    return TextEvaluator(fn)


def keyword_coverage(words: Sequence[str], *, ignore_case: bool = True) -> TextEvaluator:
    """Value a branch by the share of `words` that occur in what the search wrote, in [0, 1].

    Args:
        words: strings to look for, at least one.
        ignore_case: compare case-folded.
    """
    strings("words", words)
    flag("ignore_case", ignore_case)
    if not words:
        raise InvalidArgument("words is empty; give at least one")
    wanted = tuple(w.casefold() if ignore_case else w for w in words)

    def coverage(text: str) -> float:
        found = text.casefold() if ignore_case else text
        return sum(word in found for word in wanted) / len(wanted)

    return TextEvaluator(coverage)


@dataclass(frozen=True)
class CombinedEvaluator:
    """Several evaluators made one; see `combine`."""

    parts: tuple[Evaluator, ...]
    weights: tuple[float, ...]
    how: Literal["mean", "product", "min"]

    def bind(self, root: Branch) -> CombinedEvaluator:
        """Bind every part."""
        return replace(self, parts=tuple(bind(part, root) for part in self.parts))

    def __call__(self, branches: Sequence[Branch]) -> list[float]:
        """Run each part once over the whole batch and combine its values branch by branch."""
        columns = [checked(part(branches), len(branches)) for part in self.parts]
        return [self._one(row) for row in zip(*columns, strict=True)]

    def _one(self, values: tuple[float, ...]) -> float:
        if self.how == "min":
            return min(values)
        if self.how == "product":
            return math.prod(float(v**w) for v, w in zip(values, self.weights, strict=True))
        total = math.fsum(v * w for v, w in zip(values, self.weights, strict=True))
        return total / math.fsum(self.weights)


def combine(
    *evaluators: Evaluator,
    weights: Sequence[float] | None = None,
    how: Literal["mean", "product", "min"] = "mean",
) -> CombinedEvaluator:
    """One evaluator out of several: their weighted mean, weighted product or minimum.

    Values in [0, 1] stay in [0, 1].

    Args:
        evaluators: at least one.
        weights: one positive number for each evaluator; 1 where not given; unused by `min`.
        how: `mean` (arithmetic), `product` (of value ** weight) or `min`.
    """
    one_of("how", how, ("mean", "product", "min"))
    if not evaluators or not all(callable(e) for e in evaluators):
        raise InvalidArgument("evaluators must be callables, at least one of them")
    chosen = tuple(weights) if weights is not None else (1.0,) * len(evaluators)
    if len(chosen) != len(evaluators):
        raise InvalidArgument(f"weights has {len(chosen)} entries for {len(evaluators)} evaluators")
    for weight in chosen:
        number("weights", weight, 0, above=True)
    return CombinedEvaluator(evaluators, chosen, how)


def checked(values: Sequence[float], count: int) -> list[float]:
    """An evaluator's answer as floats.

    Raises:
        SearchError: it isn't one number for each of the `count` branches.
    """
    try:
        found = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise SearchError(
            f"the evaluator must return one number for each of {count} branches, got {values!r}"
        ) from error
    if len(found) != count:
        raise SearchError(f"the evaluator returned {len(found)} values for {count} branches")
    return found


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

    def _values(self, branches: Sequence[Branch]) -> list[float | Exception]:
        try:
            values = self._evaluate(branches)
        except Exception as error:  # whatever user code raises stays with its branch
            found = self._one_by_one(branches, error)
        else:
            found = list(checked(values, len(branches)))
        self._judge(found)
        return found

    def _one_by_one(self, branches: Sequence[Branch], first: Exception) -> list[float | Exception]:
        if len(branches) == 1:
            return [first]
        found: list[float | Exception] = []
        for branch in branches:
            try:
                values = self._evaluate([branch])
            except Exception as error:  # noqa: PERF203 the point is to go on
                found.append(error)
            else:
                found += checked(values, 1)
        return found

    def _judge(self, found: list[float | Exception]) -> None:
        for value in found:
            self._failed_in_row = self._failed_in_row + 1 if isinstance(value, Exception) else 0
        broken = self._worst is None or self._failed_in_row >= self.PATIENCE
        errors = [value for value in found if isinstance(value, Exception)]
        if broken and len(errors) == len(found):
            raise errors[0]

    @staticmethod
    def _valued(value: float | Exception, stand_in: float) -> Valued:
        if isinstance(value, Exception):
            return Valued(stand_in, f"evaluator raised {type(value).__name__}: {value}")
        if not math.isfinite(value):
            return Valued(stand_in, f"evaluator returned {value}")
        return Valued(value)
