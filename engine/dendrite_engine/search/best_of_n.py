"""Best-of-N: sample, value, keep the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dendrite_engine.search.checks import number
from dendrite_engine.search.samples import SampleSearch, SamplesState
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class BestOfNState(SamplesState):
    """State of best-of-N.

    Attributes:
        leader: the best text so far.
    """

    leader: Node | None = None


@dataclass(frozen=True, kw_only=True)
class BestOfN(SampleSearch[BestOfNState]):
    """Best-of-N: samples `n` texts and returns the one that the evaluator values highest.

        best = argmax over i of value(text_i),   text_i ~ model

    (Stiennon et al., "Learning to summarize from human feedback", 2020; Cobbe et al.,
    "Training Verifiers to Solve Math Word Problems", 2021.) Ties go to the older text. A text that
    is not the best so far can never be it again, so its branch is pruned at once. O(1) a text.

    Args:
        target: end as soon as a text's value reaches this; `None` never.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "best-of-n"
    live_options: ClassVar[frozenset[str]] = frozenset({"n", "parallel", "target"})

    target: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None:
            number("target", self.target)

    def init(self, root: Branch) -> BestOfNState:
        """A state without texts."""
        return BestOfNState(Tree(root))

    def best(self, state: BestOfNState) -> Node:
        """The text valued highest; the root before the first."""
        return state.leader or state.tree.root

    def rank(self, state: BestOfNState, node: Node) -> float:  # noqa: ARG002
        """The text's value, and what a person added to it."""
        return (node.score or 0.0) + node.bonus

    def found(self, state: BestOfNState) -> list[Node]:
        """All texts, best first."""
        return sorted(state.texts, key=lambda text: (-self.rank(state, text), text.id))

    def drop(self, state: BestOfNState, node: Node) -> None:
        """Take a text out; the best of the others leads then."""
        super().drop(state, node)
        if state.leader is not None and state.leader.status == "pruned":
            state.leader = next(iter(self.found(state)), None)

    def _judge(self, state: BestOfNState, node: Node) -> None:
        old = state.leader
        if old is not None and self.rank(state, node) <= self.rank(state, old):
            self._release(state, node)
            return
        state.leader = node
        if old is not None:
            self._release(state, old)

    def _is_decided(self, state: BestOfNState) -> str | None:
        leader = state.leader
        if self.target is None or leader is None or (leader.score or 0.0) < self.target:
            return None
        return "target"
