"""How MCTS picks among the children of a node: UCT, UCB1-tuned, PUCT, epsilon-greedy.

A rule sees an arm's statistics and nothing of the tree, so each is a formula and its source.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, NamedTuple

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.registry import Registry
from dendrite_engine.search.checks import number, one_of

Draw = Callable[[], Random]  # makes the generator of this decision, where a rule wants one


class Arm(NamedTuple):
    """A child of a node, as a rule sees it.

    Attributes:
        visits: simulations through it, virtual ones included.
        mean: mean value of them in [0, 1], virtual ones counted as 0.
        variance: of the values of the simulations that were told.
        prior: probability that the model gives it among its siblings.
    """

    visits: float
    mean: float
    variance: float = 0.0
    prior: float = 1.0


class SelectionRule(ABC):
    """Base of the rules. A subclass is a frozen dataclass of its own options.

    Attributes:
        name: what `MCTS(selection=...)` calls it.
        untried_first: children that were never tried come before all others; otherwise an untried
            child competes with the tried ones by its score.
    """

    name: ClassVar[str]
    untried_first: ClassVar[bool] = True

    @abstractmethod
    def score(self, arm: Arm, visits: float, weight: float) -> float:
        """An arm's score; the highest is taken.

        Args:
            arm: the child.
            visits: simulations through its parent, virtual ones included; at least 1.
            weight: of exploration (`MCTS.exploration`).
        """

    def stray(self, count: int, draw: Draw) -> int | None:  # noqa: ARG002
        """Which of `count` children to take whatever their scores; `None` to go by them."""
        return None

    def untried_mean(self, parent_mean: float) -> float:
        """What counts as the mean value of a child that was never tried."""
        return parent_mean

    def noisy(self, priors: list[float], draw: Draw) -> list[float]:  # noqa: ARG002
        """Priors of the root's children, with the noise that this rule adds there."""
        return priors


@dataclass(frozen=True)
class UCT(SelectionRule):
    """UCB1 applied to trees: `mean + weight * sqrt(ln N / n)`.

    N counts visits of the parent, n of the child. Kocsis & Szepesvari, "Bandit based Monte-Carlo
    Planning", ECML 2006; `weight = sqrt(2)` is UCB1's.
    """

    name: ClassVar[str] = "uct"

    def score(self, arm: Arm, visits: float, weight: float) -> float:
        """See the class."""
        if not arm.visits:
            return math.inf
        return arm.mean + weight * math.sqrt(math.log(visits) / arm.visits)


@dataclass(frozen=True)
class UCB1Tuned(SelectionRule):
    """UCB1-tuned: explores children with steady values less.

        mean + weight * sqrt(ln N / n * min(1/4, variance + sqrt(2 ln N / n)))

    Auer, Cesa-Bianchi & Fischer, "Finite-time Analysis of the Multiarmed Bandit Problem", Machine
    Learning 47, 2002, section 4; `weight = 1` is theirs. 1/4 is the largest variance of a value in
    [0, 1].
    """

    name: ClassVar[str] = "ucb1_tuned"

    def score(self, arm: Arm, visits: float, weight: float) -> float:
        """See the class."""
        if not arm.visits:
            return math.inf
        ratio = math.log(visits) / arm.visits
        bound = min(0.25, arm.variance + math.sqrt(2.0 * ratio))
        return arm.mean + weight * math.sqrt(ratio * bound)


@dataclass(frozen=True)
class PUCT(SelectionRule):
    """PUCT with priors: `mean + c(N) * prior * sqrt(N) / (1 + n)`.

    `c(N) = weight + ln((1 + N + base) / base)`. An untried child has n = 0 and the mean value of
    its parent, or `first_play`. At the root, priors are `(1 - noise) * prior + noise * eta` with
    eta drawn from a symmetric Dirichlet distribution of concentration `alpha`, once for a root.
    Silver et al., "A general reinforcement learning algorithm that masters chess, shogi, and Go
    through self-play", Science 362, 2018 (there weight = 1.25, base = 19652, noise = 0.25).

    Args:
        base: visits at which exploration begins to grow.
        noise: share of noise in the root's priors, 0 for none.
        alpha: concentration of the noise; about 10 / children is usual.
        first_play: value of an untried child; `None` takes its parent's mean.
    """

    name: ClassVar[str] = "puct"
    untried_first: ClassVar[bool] = False

    base: float = 19652.0
    noise: float = 0.0
    alpha: float = 1.0
    first_play: float | None = None

    def __post_init__(self) -> None:
        number("base", self.base, 0, above=True)
        number("noise", self.noise, 0)
        if self.noise > 1:
            raise InvalidArgument(f"noise must be in [0, 1], got {self.noise}")
        number("alpha", self.alpha, 0, above=True)
        if self.first_play is not None:
            number("first_play", self.first_play)

    def score(self, arm: Arm, visits: float, weight: float) -> float:
        """See the class."""
        growth = weight + math.log((1.0 + visits + self.base) / self.base)
        return arm.mean + growth * arm.prior * math.sqrt(visits) / (1.0 + arm.visits)

    def untried_mean(self, parent_mean: float) -> float:
        """`first_play`, or the parent's mean."""
        return parent_mean if self.first_play is None else self.first_play

    def noisy(self, priors: list[float], draw: Draw) -> list[float]:
        """Mix Dirichlet noise into the root's priors."""
        if not self.noise or not priors:
            return priors
        source = draw()
        gammas = [source.gammavariate(self.alpha, 1.0) for _ in priors]
        total = math.fsum(gammas) or 1.0
        return [
            (1.0 - self.noise) * prior + self.noise * gamma / total
            for prior, gamma in zip(priors, gammas, strict=True)
        ]


@dataclass(frozen=True)
class EpsilonGreedy(SelectionRule):
    """Takes the child of the highest mean value, or with probability `epsilon` any child.

    Sutton & Barto, "Reinforcement Learning", 2nd edition, section 2.2. `exploration` plays no part.

    Args:
        epsilon: in [0, 1].
    """

    name: ClassVar[str] = "epsilon_greedy"

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        number("epsilon", self.epsilon, 0)
        if self.epsilon > 1:
            raise InvalidArgument(f"epsilon must be in [0, 1], got {self.epsilon}")

    def score(self, arm: Arm, visits: float, weight: float) -> float:  # noqa: ARG002
        """The mean value."""
        return arm.mean if arm.visits else math.inf

    def stray(self, count: int, draw: Draw) -> int | None:
        """Any child, with probability epsilon."""
        source = draw()
        return source.randrange(count) if source.random() < self.epsilon else None


RULES: Registry[type[SelectionRule]] = Registry(
    "selection rule",
    {
        rule.name: f"{__name__}:{rule.__name__}"
        for rule in (EpsilonGreedy, PUCT, UCB1Tuned, UCT)
    },
)  # fmt: skip


def selection_rule(selection: SelectionRule | str) -> SelectionRule:
    """The rule of this name with its default options; a rule stays what it is.

    Raises:
        InvalidArgument: there is none of this name.
    """
    if isinstance(selection, SelectionRule):
        return selection
    one_of("selection", selection, RULES.names())
    return RULES.get(selection)()
