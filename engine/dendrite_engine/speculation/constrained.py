"""Guesses of branches that a constraint holds: walk its state along them, and back.

A branch with a `constraint` that can walk is drafted for like any other: guesses end before the
first token that is not allowed, and each row of the verification gets the bitmask that plain
decoding would use there. A constraint that can't walk is no error: its branch goes on token by
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np


class WalkingConstraint(Protocol):
    """What a branch's constraint has to offer so that guesses can be made for it."""

    def advance(self, token_id: int) -> bool:
        """Go on by a token; False, and no change, where it is not allowed."""

    def rollback(self, n: int) -> None:
        """Take the last `n` advances back."""

    def fill_mask(self, out: np.ndarray) -> None:
        """Write what is allowed next, i32 [ceil(vocab / 32)]; see `SamplingBatch.mask`."""


_VERBS = ("advance", "rollback", "fill_mask")


def constraint_of(branch: Any) -> Any:
    """The branch's constraint, or None."""
    return getattr(branch, "constraint", None)


def can_walk(constraint: Any) -> bool:
    """Whether guesses can be made under it."""
    return all(callable(getattr(constraint, verb, None)) for verb in _VERBS)


def keep_allowed(branch: Any, tokens: list[int]) -> list[int]:
    """The guesses up to the first one that the branch's constraint refuses."""
    constraint = constraint_of(branch)
    if constraint is None:
        return tokens
    if not can_walk(constraint):
        return []
    walker = cast("WalkingConstraint", constraint)
    count = 0
    try:
        while count < len(tokens) and walker.advance(tokens[count]):
            count += 1
    finally:
        if count:
            walker.rollback(count)
    return tokens[:count]


def masks_along(constraint: WalkingConstraint, tokens: Sequence[int], words: int) -> np.ndarray:
    """What is allowed before the first guess, after the first, ..., i32 [guesses + 1, words]."""
    masks = np.zeros((len(tokens) + 1, words), np.int32)
    done = 0
    try:
        for row, token in enumerate([*tokens, None]):
            constraint.fill_mask(masks[row])
            if token is None or not constraint.advance(token):
                break
            done += 1
    finally:
        if done:
            constraint.rollback(done)
    return masks
