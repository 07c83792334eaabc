"""Values out of the text that the search wrote: verifiers, keywords, reward functions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import flag, strings
from dendrite_engine.search.evaluation.base import Answer, checked, written
from dendrite_engine.search.evaluation.waiting import Waiter, is_async

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

TextFunction = Callable[[str], "float | bool | Awaitable[float | bool]"]
BatchFunction = Callable[[list[str]], "Sequence[float] | Awaitable[Sequence[float]]"]


@dataclass(frozen=True)
class TextEvaluator:
    """A function of the text that the search wrote; see `verifier` and `keyword_coverage`."""

    fn: TextFunction
    start: int = 0
    waiter: Waiter = field(default_factory=Waiter, repr=False, compare=False)

    def bind(self, root: Branch) -> TextEvaluator:
        """Show `fn` only text after `root`."""
        return replace(self, start=root.num_tokens)

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """One call of `fn` for each branch; what it raises is that branch's answer."""
        texts = [written(branch, self.start) for branch in branches]
        if is_async(self.fn):
            found = self.waiter.wait_all([self.fn(text) for text in texts])  # type: ignore[misc]
            return checked(found, len(branches))
        return [self._one(text) for text in texts]

    def _one(self, text: str) -> Answer:
        try:
            return float(self.fn(text))  # type: ignore[arg-type]
        except Exception as error:  # whatever user code raises stays with its branch
            return error


def verifier(fn: TextFunction) -> TextEvaluator:
    """Value a branch by `fn(text)`, the text being what the search wrote on it.

    Args:
        fn: returns a value in [0, 1], or a bool. Calls of an `async` function for one batch run
            together.

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
class RewardFunction:
    """A function of all texts of a batch; see `reward`."""

    fn: BatchFunction
    with_prompt: bool
    start: int = 0
    waiter: Waiter = field(default_factory=Waiter, repr=False, compare=False)

    def bind(self, root: Branch) -> RewardFunction:
        """Show `fn` only text after `root`, unless it wants the prompt too."""
        return replace(self, start=0 if self.with_prompt else root.num_tokens)

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """One call of `fn` for the whole batch."""
        texts = [written(branch, self.start) for branch in branches]
        return checked(self.waiter.wait(self.fn(texts)), len(branches))


def reward(fn: BatchFunction, *, with_prompt: bool = False) -> RewardFunction:
    """Value branches by `fn(texts)`, one call for a batch: a reward model of any library.

    Args:
        fn: takes the texts that the search wrote, returns one number for each; may be `async`.
        with_prompt: give it the prompt as well, at the front of each text.

    Example:
        >>> evaluate = reward(lambda texts: [len(text) / 100 for text in texts])
    """
    if not callable(fn):
        raise InvalidArgument(f"fn must be callable, got {fn!r}")
    flag("with_prompt", with_prompt)
    return RewardFunction(fn, with_prompt)
