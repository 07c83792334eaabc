"""What a search ends with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from dendrite_engine.search.tree import Node

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


class FoundText(NamedTuple):
    """One of the texts that a search found.

    Attributes:
        text: what the search wrote, special tokens left out.
        value: the number by which the search ranks it.
        token_ids: its tokens, special ones included.
        node: where it ends. Its branch is pruned, unless it is the best or pinned, or the search
            was to keep its tree.
    """

    text: str
    value: float
    token_ids: tuple[int, ...]
    node: Node


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found, what it spent and why it ended.

    Attributes:
        best: live branch of the best node; `None` where the root was pruned meanwhile, or where
            pages do not suffice to make it again.
        text: what the search wrote on the path to the best node, special tokens left out.
        value: the best node's value (MCTS: what the evaluator gave it; beam search: its score).
        nodes: nodes added to the tree.
        iterations: trials told.
        tokens: tokens decoded, rollouts included.
        compute: token-forwards, see `Budget.compute`.
        seconds: time in batches.
        reason: `exhausted` (nothing left to try), `finished`, `target`, `decided` (no vote to come
            can change the outcome), `stopped`, or the limit that was reached: `tokens`, `nodes`,
            `seconds`, `pages`, `iterations`, `compute`.
        token_ids: tokens of `text`, special ones included.
        node: the best node; `node.path()` leads to it.
        released: branches released for a time because pages ran short.
        remade: branches made again because the search returned to them.
        found: all texts that the algorithm has to offer, in its order (beams, samples, answers);
            the best alone where it says no more.
    """

    best: Branch | None
    text: str
    value: float
    nodes: int
    iterations: int
    tokens: int
    compute: int
    seconds: float
    reason: str
    token_ids: tuple[int, ...] = field(repr=False)
    node: Node = field(repr=False)
    found: tuple[FoundText, ...] = field(repr=False)
    _prune: Callable[[], int] = field(repr=False)
    released: int = 0
    remade: int = 0

    def prune(self) -> int:
        """Prune every branch that the search left alive (the path to the best, pinned ones).

        The branch that the search started from stays. Calling it again does nothing.

        Returns:
            Pages freed.
        """
        return self._prune()
