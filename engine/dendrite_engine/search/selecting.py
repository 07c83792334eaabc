"""Base of MCTS: walks down the tree by a selection rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, TypeVar

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import number, one_of, whole
from dendrite_engine.search.descending import DescendingSearch, DescendingState
from dendrite_engine.search.draws import generator
from dendrite_engine.search.selection import (
    PUCT,
    UCT,
    Arm,
    EpsilonGreedy,
    SelectionRule,
    UCB1Tuned,
    selection_rule,
)
from dendrite_engine.search.tree import Node

# for an untried child in the order of choices: tried ones of the same score come first
_LAST = 1 << 62


@dataclass(slots=True)
class SelectingState(DescendingState):
    """State of a search that selects by score.

    Attributes:
        leader: node with the highest score so far, `None` before the first.
        low: lowest value backpropagated.
        high: highest value backpropagated.
        root_priors: priors of the root's children with their noise, by root, number of children
            and how many of them the model has ranked.
    """

    leader: Node | None = None
    low: float = math.inf
    high: float = -math.inf
    root_priors: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)


M = TypeVar("M", bound=SelectingState)


@dataclass(frozen=True, kw_only=True)
class SelectingSearch(DescendingSearch[M], Generic[M]):
    """Options that say how the tree is walked down.

    Args:
        exploration: weight of the exploration term; sqrt(2) is UCB1's for values in [0, 1].
        virtual_loss: visits of the lowest value that a simulation under way stands for.
        selection: `uct`, `ucb1_tuned`, `puct`, `epsilon_greedy`, or a rule with its own options
            such as `PUCT(noise=0.25)`.
        widening: progressive widening: a node visited N times may have
            `ceil(widening * N ** widening_power)` attempts at children, `width` at most (Coulom,
            "Computing Elo Ratings of Move Patterns in the Game of Go", 2007; Couetoux et al.,
            "Continuous Upper Confidence Trees", LION 2011); `None` for `width` at once.
        widening_power: see `widening`.
        normalise: `none` wants values in [0, 1]; `minmax` scales all values seen so far to [0, 1]
            when selecting (Schrittwieser et al., MuZero, Nature 2020, appendix B).
    """

    saved_types: ClassVar[tuple[type, ...]] = (UCT, UCB1Tuned, PUCT, EpsilonGreedy)

    exploration: float = 1.414
    virtual_loss: int = 1
    selection: SelectionRule | str = "uct"
    widening: float | None = None
    widening_power: float = 0.5
    normalise: Literal["none", "minmax"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("exploration", self.exploration, 0)
        whole("virtual_loss", self.virtual_loss, 0)
        object.__setattr__(self, "selection", selection_rule(self.selection))
        if self.widening is not None:
            number("widening", self.widening, 0, above=True)
        number("widening_power", self.widening_power, 0, above=True)
        if self.widening_power > 1:
            raise InvalidArgument(f"widening_power must be in (0, 1], got {self.widening_power}")
        one_of("normalise", self.normalise, ("none", "minmax"))

    @property
    def rule(self) -> SelectionRule:
        """The selection rule in force."""
        return selection_rule(self.selection)

    def _choices(self, state: M, node: Node) -> Iterator[Node]:
        """Children by score; the node itself first, or where the rule ranks its next child."""
        rule, can_expand = self.rule, self._can_expand(state, node)
        if can_expand and rule.untried_first:
            yield node
            return
        visits = max(1.0, self._visits(node))
        priors = self._priors(state, node)
        keyed = [
            (-self._score(state, child, visits, priors), child.id, child)
            for child in node.children
            if not child.exhausted
        ]
        if can_expand:
            keyed.append((-self._untried_score(state, node, visits, priors), _LAST, node))
        if keyed:
            stray = rule.stray(
                len(keyed), lambda: generator(self.seed, "stray", node.ordinals(), visits)
            )
            first = min(keyed) if stray is None else keyed[stray]
            yield first[2]
            yield from (entry[2] for entry in sorted(keyed) if entry is not first)

    def _allowed(self, state: M, node: Node) -> int:
        allowed = self.attempts_allowed(state, node)
        if self.widening is None or all(child.exhausted for child in node.children):
            return allowed  # where no child can be gone back to, waiting for visits would be vain
        visits = max(1, node.visits + node.virtual)
        wide: float = self.widening * visits**self.widening_power
        return min(allowed, math.ceil(wide))

    def _visits(self, node: Node) -> float:
        return node.visits + self.virtual_loss * node.virtual

    def _score(self, state: M, node: Node, parent_visits: float, priors: Sequence[float]) -> float:
        """The rule's score of a child, virtual visits counted, and its bonus."""
        prior = priors[node.ordinal] if node.ordinal < len(priors) else 0.0
        visits = self._visits(node)
        mean, variance = 0.0, 0.0
        if node.visits:
            scale, wins = self._scaled(state, node)
            mean = wins / visits
            variance = max(0.0, node.square_sum / node.visits - node.value**2) * scale * scale
        arm = Arm(visits, mean, variance, prior)
        return self.rule.score(arm, parent_visits, self.exploration) + node.bonus

    def _untried_score(self, state: M, node: Node, visits: float, priors: Sequence[float]) -> float:
        """Score of the next child of a node, before it was tried."""
        mean = self._scaled(state, node)[1] / node.visits if node.visits else 0.0
        arm = Arm(0, self.rule.untried_mean(mean), 0.0, priors[node.attempts])
        return self.rule.score(arm, visits, self.exploration)

    def _scaled(self, state: M, node: Node) -> tuple[float, float]:
        """Scale of values, and the sum of a node's values on it."""
        wins = node.value_sum
        if self.normalise == "none":
            return 1.0, wins
        spread = state.high - state.low
        if spread <= 0:
            return 0.0, 0.5 * node.visits
        return 1.0 / spread, (wins - node.visits * state.low) / spread

    def _priors(self, state: M, node: Node) -> Sequence[float]:
        """Priors of a node's children by attempt, with noise at the root; none for most rules."""
        if self.rule.untried_first:
            return []
        count = self.width
        if node.branch is not None:
            count = max(1, self.attempts_allowed(state, node))
        count = max(count, node.attempts)
        if node is not state.tree.root:
            return self.sibling_priors(node, count)
        key = (node.id, count, len(node.candidates or node.alternatives))
        found = state.root_priors.get(key)
        if found is None:
            found = self.rule.noisy(
                self.sibling_priors(node, count),
                lambda: generator(self.seed, "noise", node.ordinals()),
            )
            state.root_priors[key] = found
        return found
