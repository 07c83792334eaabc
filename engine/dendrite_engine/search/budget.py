"""What a search may spend, and the meter that is read before every batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import number, whole

Clock = Callable[[], float]


@dataclass(frozen=True)
class Budget:
    """Limits of one search; `None` means no limit. The first one reached ends the search.

    The batch size is cut so that tokens, nodes and iterations are not overrun at all where the cost
    of a trial is known beforehand, and no limit is ever overrun by more than one batch.

    Args:
        tokens: tokens that the model decodes for the search, rollouts included.
        nodes: nodes added to the search tree.
        seconds: time in batches; time spent paused does not count.
        pages: KV pages live in the engine above what was live when the search began.
        iterations: trials told (MCTS: simulations; beam search: next-token look-ups).
        compute: token-forwards: tokens that a model computes for the search, each once. Those are
            `tokens` and what evaluators report (the prompts they append, rollouts, a reward model's
            prefill). One token-forward takes about 2 * parameters floating-point operations.

    Raises:
        InvalidArgument: a limit is not positive; the message names it.

    Example:
        >>> Budget(tokens=2000, seconds=30)
        Budget(tokens=2000, nodes=None, seconds=30, pages=None, iterations=None, compute=None)
    """

    tokens: int | None = None
    nodes: int | None = None
    seconds: float | None = None
    pages: int | None = None
    iterations: int | None = None
    compute: int | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "nodes", "pages", "iterations", "compute"):
            value = getattr(self, name)
            if value is not None:
                whole(f"budget.{name}", value, 1)
        if self.seconds is not None:
            number("budget.seconds", self.seconds, 0, above=True)


@dataclass(frozen=True)
class BatchPlan:
    """What a search would like to run next, in worst-case costs.

    Attributes:
        trials: trials that it can use in one batch.
        minimum: fewer than this are not worth running.
        tokens: tokens decoded by one trial at most.
        nodes: nodes made by one trial at most.
    """

    trials: int
    minimum: int = 1
    tokens: int = 1
    nodes: int = 1


@dataclass(frozen=True)
class Usage:
    """What a search has spent so far, in the units of `Budget`."""

    tokens: int = 0
    nodes: int = 0
    seconds: float = 0.0
    pages: int = 0
    iterations: int = 0
    compute: int = 0


class Meter:
    """Adds up what a search spends and says how many trials the next batch may hold.

    Args:
        budget: the limits.
        clock: seconds from any origin; inject one in tests.
        page_size: tokens in a page, to foresee the pages of a trial.
    """

    def __init__(
        self, budget: Budget, *, clock: Clock = time.monotonic, page_size: int = 16
    ) -> None:
        self.budget = budget
        self.tokens = 0
        self.nodes = 0
        self.iterations = 0
        self.compute = 0
        self.pages = 0
        self._seconds = 0.0
        self._began: float | None = None
        self._clock = clock
        self._page_size = page_size

    @property
    def seconds(self) -> float:
        """Seconds spent in batches, the present one included."""
        running = 0.0 if self._began is None else self._clock() - self._began
        return self._seconds + running

    def begin(self) -> None:
        """Start the clock of a batch."""
        self._began = self._clock()

    def end(self) -> None:
        """Stop the clock of a batch; harmless when it is not running."""
        self._seconds, self._began = self.seconds, None

    def allow(self, plan: BatchPlan) -> tuple[int, str | None]:
        """How many trials the next batch may hold, and which limit says that it may hold none.

        Returns:
            `(trials, None)`, or `(0, limit)` where fewer than `plan.minimum` would fit.
        """
        if self.budget.seconds is not None and self.seconds >= self.budget.seconds:
            return 0, "seconds"
        page_cost = math.ceil(plan.tokens / self._page_size)
        allowed = plan.trials
        for name, cost in (
            ("iterations", 1),
            ("nodes", plan.nodes),
            ("tokens", plan.tokens),
            ("compute", plan.tokens),
            ("pages", page_cost),
        ):
            limit = getattr(self.budget, name)
            if limit is None or cost == 0:
                continue
            fits = max(0, limit - getattr(self, name)) // cost
            if fits < plan.minimum:
                return 0, name
            allowed = min(allowed, fits)
        return allowed, None

    def check_start(self, plan: BatchPlan) -> None:
        """Refuse a budget that can't pay for the first batch.

        Raises:
            InvalidArgument: a limit is below the cost of the smallest batch; the message names it.
        """
        _, short = self.allow(plan)
        if short is not None:
            raise InvalidArgument(
                f"budget.{short}={getattr(self.budget, short)} can't pay for the first batch: "
                f"{plan.minimum} trials of up to {plan.tokens} tokens and {plan.nodes} nodes each"
            )

    def usage(self) -> Usage:
        """What was spent so far."""
        return Usage(
            self.tokens, self.nodes, self.seconds, self.pages, self.iterations, self.compute
        )

    def restore(self, usage: Usage) -> None:
        """Go on from what was spent before; pages are measured afresh."""
        for name, value in asdict(usage).items():
            setattr(self, "_seconds" if name == "seconds" else name, value)

    def columns(self) -> dict[str, float | int]:
        """What was spent so far, as JSON-serialisable data for the trace."""
        return asdict(self.usage())
