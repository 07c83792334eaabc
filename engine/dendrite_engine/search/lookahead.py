"""Lookahead: greedy by thoughts, each valued by what would follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.search.tree_of_thought import TreeOfThought


@dataclass(frozen=True, kw_only=True)
class Lookahead(TreeOfThought):
    """Writes one thought at a time: of `width` candidates the best after `lookahead` steps more.

    The candidates of a step are written in one batch, and their greedy continuations in a second.
    The continuation is valued in the candidate's place and pruned: `lookahead=1` looks one node
    ahead, k looks k nodes ahead, 0 values the candidates themselves. It is a tree of thought in
    breadth-first order that keeps one thought of a level, and takes the same options. (Lookahead
    of greedy rollouts: Snell et al., "Scaling LLM Test-Time Compute Optimally can be More Effective
    than Scaling Model Parameters", 2024, section 5.)
    """

    name: ClassVar[str] = "lookahead"

    breadth: int = 1
    lookahead: int = 1
    max_depth: int | None = 8
