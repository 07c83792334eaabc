"""What fixes the random draws of a branch and of its forks; see `sampling.child_key`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


class Draws(NamedTuple):
    """Key and counter of a branch: two branches with equal draws, tokens and seed go on alike.

    Attributes:
        key: the branch's `path_key`.
        forks: forks made of it so far; the next one's key depends on it.
    """

    key: Any
    forks: int


def draws_of(branch: Branch) -> Draws:
    """The draws of a live branch. O(depth) at first, then O(1)."""
    return Draws(branch.path_key, branch._num_forks)


def set_draws(branch: Branch, draws: Draws) -> None:
    """Have a branch that was made again go on as the one it stands for."""
    branch._key, branch._num_forks = draws
