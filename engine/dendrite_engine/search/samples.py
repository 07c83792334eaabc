"""What best-of-N, self-consistency and the weighted vote share: N whole texts from one root."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, TypeVar

from dendrite_engine.search.base import Outcome, Trial
from dendrite_engine.search.budget import BatchPlan
from dendrite_engine.search.checks import whole
from dendrite_engine.search.sampled import SampledSearch, SampledState
from dendrite_engine.search.tree import Node

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class SamplesState(SampledState):
    """State of a search over whole texts.

    Attributes:
        texts: the texts sampled so far, in the order of asking.
    """

    texts: list[Node] = field(default_factory=list)


S = TypeVar("S", bound=SamplesState)


@dataclass(frozen=True, kw_only=True)
class SampleSearch(SampledSearch[S]):
    """Base: samples `n` texts from the root, `parallel` in a batch, and judges each.

    Text `i` is drawn by the seed and `i` alone: the first 8 of 16 are the same as the 8 of 8.

    Args:
        n: texts.
        max_tokens: longest text.
        parallel: texts in a batch. A smaller one can stop earlier, a larger one is faster.
    """

    live_options: ClassVar[frozenset[str]] = frozenset({"n", "parallel"})

    n: int = 16
    max_tokens: int = 256
    parallel: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "max_tokens", "parallel"):
            whole(name, getattr(self, name), 1)
        self._refuse_greedy("n", self.n)

    @abstractmethod
    def init(self, root: Branch) -> S:
        """A state without texts."""

    @abstractmethod
    def _judge(self, state: S, node: Node) -> None:
        """Take a new text in and release those that can't win any more."""

    def _is_decided(self, state: S) -> str | None:  # noqa: ARG002
        """Why no further text is needed; `None` where more are."""
        return None

    def plan(self, state: S) -> BatchPlan:  # noqa: ARG002
        """`parallel` texts, each worth sampling alone."""
        return BatchPlan(self.parallel, 1, self.max_tokens, 1)

    def ask(self, state: S, n: int) -> list[Trial]:
        """Up to `n` more texts."""
        root = state.tree.root
        trials: list[Trial] = []
        params = self._params(self.max_tokens)
        while state.reason is None and len(trials) < n and root.attempts < self.n:
            trials.append(self._ask_child(state, root, root.attempts, params))
        if not trials:
            self._check_end(state)
        return trials

    def tell(self, state: S, results: Sequence[Outcome]) -> None:
        """Judge the texts in the order of asking.

        Raises:
            InvalidArgument: the search can't work with a value; nothing was changed.
        """
        for outcome in results:
            self._check(outcome.value)
        for trial, outcome in self._in_order(state, results):
            node = self._grow(state, trial, outcome)
            if node is not None:
                node.status, node.exhausted = "terminal", True
                node.finish_reason = outcome.finish_reason
                state.texts.append(node)
                self._judge(state, node)
        self._check_end(state)

    def drop(self, state: S, node: Node) -> None:
        """Take a text out."""
        state.tree.drop(node)
        state.texts = [text for text in state.texts if text.status != "pruned"]

    def _check(self, value: float | None) -> None:
        """Refuse values that the search can't work with."""

    def _check_end(self, state: S) -> None:
        if state.reason is not None:
            return
        state.reason = self._is_decided(state)
        all_told = not state.pending and not state.held
        if state.reason is None and state.tree.root.attempts >= self.n and all_told:
            state.reason = "finished" if state.texts else "exhausted"

    def _release(self, state: S, node: Node) -> None:
        """Let a loser's branch go."""
        if not self.keep_tree:
            state.tree.release(node)
