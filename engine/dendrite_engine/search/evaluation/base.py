"""What an evaluator is, and the few things that all of them share.

An evaluator is any callable `evaluate(branches) -> one value for each branch`, higher is better;
UCT wants values in [0, 1]. It runs on the search's thread, so it may use the engine. An `async`
callable is awaited. An exception in the place of a value stays with that branch.

Optional methods:

* `bind(root) -> evaluator` is called once with the branch the search starts from; the evaluators
  here use it to look only at what the search wrote.
* `tokens_computed() -> int` says how many tokens a model has computed for it so far; what is added
  during a search counts towards `Budget.compute`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import SearchError
from dendrite_engine.search.evaluation.waiting import Awaited, is_async

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

Answer = float | Exception
Answers = Sequence[Answer]
Evaluator = Callable[[Sequence["Branch"]], Answers | Awaitable[Answers]]


def bind(evaluator: Evaluator, root: Branch) -> Evaluator:
    """The evaluator for a search from `root`, made synchronous; itself where it does not care."""
    binder = getattr(evaluator, "bind", None)
    bound: Evaluator = evaluator if binder is None else binder(root)
    return Awaited(bound) if is_async(bound) else bound


def written(branch: Branch, start: int) -> str:
    """Text of the tokens from position `start` on, special tokens left out."""
    text: str = branch.engine.tokenizer.decode(branch.token_ids[start:], skip_special=True)
    return text


def tokens_computed(evaluator: object) -> int:
    """Tokens that a model has computed for an evaluator so far; 0 where it does not say."""
    method = getattr(evaluator, "tokens_computed", None)
    return 0 if method is None else int(method())


@dataclass(slots=True)
class Tally:
    """A count of tokens that a bound evaluator and the methods it calls add to."""

    tokens: float = 0.0


def answers(evaluator: Evaluator, branches: Sequence[Branch]) -> list[Answer]:
    """Ask a bound evaluator and check what it says; see `checked`."""
    return checked(evaluator(branches), len(branches))


def checked(values: Any, count: int) -> list[Answer]:
    """An evaluator's answer as floats and exceptions.

    Raises:
        SearchError: it isn't one number or exception for each of the `count` branches.
    """
    try:
        found = [v if isinstance(v, Exception) else float(v) for v in values]
    except (TypeError, ValueError) as error:
        raise SearchError(
            f"the evaluator must return one number for each of {count} branches, got {values!r}"
        ) from error
    if len(found) != count:
        raise SearchError(f"the evaluator returned {len(found)} values for {count} branches")
    return found
