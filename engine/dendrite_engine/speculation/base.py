"""What guesses tokens, and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.sampling_params import SamplingParams

MAX_DRAFT_TOKENS = 64
MAX_WIDTH = 16


@dataclass(frozen=True, slots=True)
class Chances:
    """A distribution that a guess was drawn from.

    Attributes:
        ids: tokens with a probability, distinct, i64 [n].
        values: their probabilities, f64 [n]; they add up to 1.
    """

    ids: np.ndarray
    values: np.ndarray

    def at(self, token: int) -> float:
        """Probability of one token."""
        return float(self.values[self.ids == token].sum())

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Probability of each of these tokens, f64 [m]."""
        order = np.argsort(self.ids)
        place = np.minimum(np.searchsorted(self.ids[order], ids), len(order) - 1)
        found = self.ids[order][place] == ids
        return np.where(found, self.values[order][place], 0.0)


class SampledPath(list[int]):
    """A continuation whose tokens were drawn from known distributions, one each in `chances`: it is
    verified by rejection.
    """

    def __init__(self, tokens: Sequence[int], chances: Sequence[Chances]) -> None:
        super().__init__(tokens)
        self.chances = tuple(chances)


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """One branch that wants guesses.

    Attributes:
        key: the branch, as long as its job runs.
        tokens: all its tokens, prompt included; read only, and the same list every time.
        limit: tokens of a guess at most, at least 1.
        params: how its next tokens are drawn.
        seed, path_key: with the position they fix each draw, see `sampling.uniform`.
    """

    key: int
    tokens: Sequence[int]
    limit: int
    params: SamplingParams
    seed: int
    path_key: int


class Proposer(Protocol):
    """Guesses for the branches of one job; used by the engine thread only."""

    def propose(self, requests: Sequence[DraftRequest]) -> Sequence[Sequence[Sequence[int]]]:
        """For each request, continuations of at most `limit` tokens, the likeliest first.

        Several continuations of one branch are verified together as a tree. None is fine. What is
        raised here ends the guessing of the job, not the job.
        """

    def forget(self, key: int) -> None:
        """The branch is done."""


@dataclass(slots=True)
class Guessing:
    """The guesses of one job.

    Attributes:
        settings: how to guess.
        proposer: what guesses; None once it failed.
        token_cost: see Speculation.cost_for.
    """

    settings: Speculation
    proposer: Proposer | None
    token_cost: float


class Speculation(ABC):
    """Settings of a way to guess; one object serves any number of jobs.

    Attributes:
        tokens: length of a guess at most.
        width: continuations of a branch at most; more than 1 makes a tree.
        adaptive: shorten guesses, down to none, where they are seldom right.
    """

    tokens: int
    width: int
    adaptive: bool

    def cost_for(self, engine: Engine) -> float:
        """What guessing one more token costs, as a share of a plain decode step."""
        del engine
        return 0.0

    def check(self, engine: Engine) -> None:
        """Refuse an engine that this can't guess for.

        Raises:
            InvalidArgument: with the reason.
        """
        del engine

    @abstractmethod
    def start(self) -> Proposer:
        """A proposer for one job."""

    def open(self, engine: Engine) -> Guessing:
        """What a job of this engine needs; raises what `check` raises."""
        self.check(engine)
        return Guessing(self, self.start(), self.cost_for(engine))

    def _check_sizes(self) -> None:
        check_int(type(self).__name__, "tokens", self.tokens, 1, MAX_DRAFT_TOKENS)
        check_int(type(self).__name__, "width", self.width, 1, MAX_WIDTH)


def check_int(owner: str, name: str, value: object, low: int, high: int) -> None:
    """InvalidArgument unless `value` is an integer in low..high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{owner}.{name} must be an integer in {low}..{high}, got {value!r}")
