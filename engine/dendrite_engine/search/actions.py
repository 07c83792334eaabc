"""Actions: what a search may write next, where that is not left to the model.

Actions are given as texts that are allowed everywhere, as a callable that is shown a branch and
says what is allowed there (a game's legal moves, the alternatives of a grammar), or as "grammar":
the tokens that the branch's own constraint allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

Action = str | Sequence[int]
Actions = Sequence[str] | Callable[["Branch"], Sequence[Action]] | Literal["grammar"]
Runs = tuple[tuple[int, ...], ...]


def check_actions(actions: object) -> None:
    """Require one of the three forms.

    Raises:
        InvalidArgument: it is something else.
    """
    texts = isinstance(actions, (tuple, list)) and actions
    if actions == "grammar" or callable(actions):
        return
    if not texts or not all(isinstance(text, str) and text for text in actions):  # type: ignore[attr-defined]
        raise InvalidArgument(
            "actions must be a sequence of non-empty texts, a callable of a branch, or 'grammar'; "
            f"got {actions!r}"
        )


def allowed_runs(actions: Actions, branch: Branch) -> Runs:
    """Token runs that may come next on `branch`, each once, in the order given.

    Raises:
        InvalidArgument: an action is neither text nor token ids, or has no tokens; or the branch
            has no constraint ("grammar").
        Exception: whatever the callable raises.
    """
    if actions == "grammar":
        return tuple((token,) for token in _allowed_tokens(branch))
    given = actions(branch) if callable(actions) else actions
    if isinstance(given, str):
        raise InvalidArgument(f"actions must return a sequence of texts, got the text {given!r}")
    runs = (_run(action, branch) for action in given)
    return tuple(dict.fromkeys(runs))


def _run(action: Action, branch: Branch) -> tuple[int, ...]:
    if isinstance(action, str):
        token_ids = tuple(branch.engine.tokenizer.encode(action))
    else:
        try:
            token_ids = tuple(int(token) for token in action)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                f"an action is text or token ids, got {action!r}: {error}"
            ) from error
    size = branch.engine.model_config.vocab_size
    if not token_ids or not all(0 <= token < size for token in token_ids):
        raise InvalidArgument(
            f"action {action!r} has no tokens, or one outside the vocabulary of {size}"
        )
    return token_ids


def _allowed_tokens(branch: Branch) -> list[int]:
    allowed = getattr(branch, "allowed_tokens", None)
    if allowed is None:
        raise InvalidArgument(
            "actions='grammar' asks the branch for its allowed_tokens(), and it has none: attach a "
            "constraint to the root first"
        )
    return [int(token) for token in allowed()]
