"""Posteriors of an arm's value, drawn from by Thompson sampling."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from dendrite_engine.search.checks import number


class Posterior(ABC):
    """A conjugate prior of values. A subclass is a frozen dataclass of its prior's parameters.

    Attributes:
        unit_values: values have to lie in [0, 1].
    """

    unit_values: ClassVar[bool] = False

    @abstractmethod
    def draw(self, values: Sequence[float], source: Random) -> float:
        """One draw from the posterior after these values; with none, from the prior. O(values)."""


@dataclass(frozen=True)
class GaussianPosterior(Posterior):
    """Values are normal with unknown mean and variance; the prior is normal-inverse-chi-squared.

    After n values with mean m and squares around it S = sum of (r - m)^2:

        kappa' = kappa + n,  nu' = nu + n,  mean' = (kappa * mean + n * m) / kappa'
        nu' * scale' = nu * scale + S + n * kappa / kappa' * (mean - m)^2

    and a draw is from the posterior predictive distribution of the next value, a Student t:
    variance = nu' * scale' / chi2(nu'), then normal(mean', variance * (1 + 1 / kappa')).
    Inoue et al., "Wider or Deeper? Scaling LLM Inference-Time Compute with Adaptive Branching Tree
    Search", 2025 (AB-MCTS-A, Gaussian); the update is that of Murphy, "Conjugate Bayesian analysis
    of the Gaussian distribution", 2007, section 5. Values should lie in [0, 1] for this prior.

    Args:
        mean: prior mean.
        kappa: how many values the prior mean is worth.
        nu: how many values the prior variance is worth.
        scale: prior variance.
    """

    mean: float = 0.0
    kappa: float = 1.0
    nu: float = 1.0
    scale: float = 0.1

    def __post_init__(self) -> None:
        number("mean", self.mean)
        for name in ("kappa", "nu", "scale"):
            number(name, getattr(self, name), 0, above=True)

    def draw(self, values: Sequence[float], source: Random) -> float:
        """See the class."""
        mean, kappa, nu, spread = self.updated(values)
        # chi-squared of nu degrees of freedom is a gamma of shape nu / 2 and scale 2
        variance = spread / max(source.gammavariate(nu / 2.0, 2.0), 1e-300)
        return source.gauss(mean, math.sqrt(variance * (1.0 + 1.0 / kappa)))

    def updated(self, values: Sequence[float]) -> tuple[float, float, float, float]:
        """mean', kappa', nu' and nu' * scale' after these values."""
        count = len(values)
        kappa, nu = self.kappa + count, self.nu + count
        if not count:
            return self.mean, kappa, nu, nu * self.scale
        average = math.fsum(values) / count
        squares = math.fsum((value - average) ** 2 for value in values)
        shift = count * self.kappa / kappa * (self.mean - average) ** 2
        mean = (self.kappa * self.mean + count * average) / kappa
        return mean, kappa, nu, self.nu * self.scale + squares + shift


@dataclass(frozen=True)
class BetaPosterior(Posterior):
    """Values in [0, 1] count as that much success: the posterior of their mean is

        Beta(alpha + sum of r, beta + sum of (1 - r))

    (Inoue et al. 2025, AB-MCTS-A, Beta; alpha = beta = 1/2 is Jeffreys' prior). Best for verifiers
    that say yes or no.

    Args:
        alpha: successes that the prior is worth.
        beta: failures that the prior is worth.
    """

    unit_values: ClassVar[bool] = True

    alpha: float = 0.5
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            number(name, getattr(self, name), 0, above=True)

    def draw(self, values: Sequence[float], source: Random) -> float:
        """See the class."""
        won = math.fsum(values)
        return source.betavariate(self.alpha + won, self.beta + len(values) - won)
