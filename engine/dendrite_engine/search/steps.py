"""What the PRM-guided beam, DVTS and REBASE share: texts that grow in valued steps, in rounds."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from dendrite_engine.search.base import ENDED, Outcome, Trial
from dendrite_engine.search.budget import BatchPlan
from dendrite_engine.search.checks import one_of, strings, whole
from dendrite_engine.search.sampled import SampledSearch, SampledState
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

Aggregate = Literal["last", "min", "product", "mean"]
AGGREGATES: dict[Aggregate, Callable[[Sequence[float]], float]] = {
    "last": lambda scores: scores[-1],
    "min": min,
    "product": math.prod,
    "mean": lambda scores: math.fsum(scores) / len(scores),
}


@dataclass(slots=True)
class StepState(SampledState):
    """State of a search in steps.

    Attributes:
        frontier: nodes that this round expands; at the start the root.
        queue: `(node, ordinal)` of children not asked for yet.
        children: children that this round made.
        finished: complete texts, in the order in which they were found.
        leader: the best complete text.
        subtree: number of the independent subtree that a node is in, by node id (DVTS).
    """

    frontier: list[Node] = field(default_factory=list)
    queue: deque[tuple[Node, int]] = field(default_factory=deque)
    children: list[Node] = field(default_factory=list)
    finished: list[Node] = field(default_factory=list)
    leader: Node | None = None
    subtree: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StepSearch(SampledSearch[StepState]):
    """Base: every round samples one step more below the nodes that the round before chose.

    A step ends with one of the `stop` strings or after `tokens_per_step`, and the evaluator (a
    process reward model, PRM) values it with all before it. A text is ranked by `aggregate` over
    the values of its steps. It is complete when the model ends it, when a step holds one of the
    `end` strings, or after `max_steps`. Children that were not chosen are pruned with the round; so
    are complete texts that are not the best. Bookkeeping is O(children * depth) a round.

    Args:
        tokens_per_step: longest step.
        max_steps: longest text.
        stop: strings that end a step; `None` keeps those of `sampling`.
        end: strings that complete a text; they end a step too. One that spans two steps is not
            seen.
        aggregate: how values of steps make that of a text: `last`, `min`, `product` or `mean`
            (Lightman et al., "Let's Verify Step by Step", 2023, for min and product; Snell et al.,
            "Scaling LLM Test-Time Compute Optimally", 2024, for last).
    """

    live_options: ClassVar[frozenset[str]] = frozenset({"tokens_per_step", "max_steps"})

    tokens_per_step: int = 64
    max_steps: int = 16
    stop: Sequence[str] | str | None = ("\n\n",)
    end: Sequence[str] | str = ()
    aggregate: Aggregate = "last"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokens_per_step", "max_steps"):
            whole(name, getattr(self, name), 1)
        if isinstance(self.end, str):
            object.__setattr__(self, "end", (self.end,))
        strings("end", self.end)
        one_of("aggregate", self.aggregate, tuple(AGGREGATES))

    @abstractmethod
    def _first(self) -> int:
        """Children of the root."""

    @abstractmethod
    def _choose(self, state: StepState, children: list[Node]) -> list[tuple[Node, int]]:
        """What the next round expands, given all children of this one, complete ones included.

        Returns:
            `(child, number of children it gets)`. Complete texts to keep go into `state.finished`
            by `_complete`.
        """

    # -- the ask/tell contract ------------------------------------------------------------------

    def init(self, root: Branch) -> StepState:
        """The first round: children of the root."""
        state = StepState(Tree(root))
        self._enqueue(state, [(state.tree.root, self._first())])
        return state

    def plan(self, state: StepState) -> BatchPlan:
        """The round, or what is left of it; each step is worth sampling alone."""
        return BatchPlan(max(1, len(state.queue)), 1, self.tokens_per_step, 1)

    def ask(self, state: StepState, n: int) -> list[Trial]:
        """Up to `n` children of this round."""
        self._advance_if_ready(state)
        trials: list[Trial] = []
        params = self._params(self.tokens_per_step)
        ends = tuple(s for s in self.end if s not in params.stop)
        params = params.replace(stop=(*params.stop, *ends))
        while state.reason is None and len(trials) < n and state.queue:
            node, ordinal = state.queue.popleft()
            trials.append(self._ask_child(state, node, ordinal, params))
        return trials

    def tell(self, state: StepState, results: Sequence[Outcome]) -> None:
        """Make the children; with the last one, end the round."""
        for trial, outcome in self._in_order(state, results):
            # before the node owns it: the text can be read only while its branch is there
            complete = self._is_complete(outcome, trial.node.depth + 1)
            child = self._grow(state, trial, outcome)
            if child is None:
                continue
            if complete is not None:
                child.status, child.exhausted, child.finish_reason = "terminal", True, complete
            state.children.append(child)
        self._advance_if_ready(state)

    def best(self, state: StepState) -> Node:
        """The best complete text; without one the best unfinished text of the last round."""
        if state.leader is not None:
            return state.leader
        going = state.children or state.frontier
        ranked = self._ranked(state, going)
        return ranked[0] if ranked else state.tree.root

    def found(self, state: StepState) -> list[Node]:
        """Complete texts, best first; without any the unfinished ones."""
        return self._ranked(state, state.finished or state.children or state.frontier)

    def rank(self, state: StepState, node: Node) -> float:  # noqa: ARG002
        """The aggregated value of the steps on the path, and what a person added; O(depth)."""
        scores = [step.score or 0.0 for step in node.path()[1:]]
        return (AGGREGATES[self.aggregate](scores) if scores else 0.0) + node.bonus

    def drop(self, state: StepState, node: Node) -> None:
        """Take a node and all below it out."""
        state.tree.drop(node)
        for nodes in (state.frontier, state.children, state.finished):
            nodes[:] = [other for other in nodes if other.status != "pruned"]
        state.queue = deque(entry for entry in state.queue if entry[0].status != "pruned")
        if state.leader is not None and state.leader.status == "pruned":
            state.leader = next(iter(self._ranked(state, state.finished)), None)

    # -- a round --------------------------------------------------------------------------------

    def _enqueue(self, state: StepState, chosen: list[tuple[Node, int]]) -> None:
        state.frontier = [node for node, _ in chosen]
        state.queue.extend((node, i) for node, count in chosen for i in range(count))
        state.children = []

    def _advance_if_ready(self, state: StepState) -> None:
        if state.reason is None and not (state.queue or state.pending or state.held):
            self._advance(state)

    def _advance(self, state: StepState) -> None:
        """End the round: choose among its children, let go of the others and of their parents."""
        children, parents = state.children, state.frontier
        chosen = [(node, count) for node, count in self._choose(state, children) if count > 0]
        kept = {node.id for node, _ in chosen}
        for node in children:
            if node.id not in kept:
                node.exhausted = True
                self._release(state, node)
        if children:  # else the parents are the best that there is
            for node in parents:
                node.exhausted = True
                self._release(state, node)
        if chosen:
            self._enqueue(state, chosen)
        else:
            state.reason = "finished" if state.finished else "exhausted"

    def _complete(self, state: StepState, node: Node) -> None:
        """Take a text among the complete ones; only the best of them keeps its branch."""
        state.finished.append(node)
        old = state.leader
        if old is None or self.rank(state, node) > self.rank(state, old):
            state.leader = node
            if old is not None:
                self._release(state, old)

    def _release(self, state: StepState, node: Node) -> None:
        if not self.keep_tree and node is not state.leader:
            state.tree.release(node)

    def _ranked(self, state: StepState, nodes: Sequence[Node]) -> list[Node]:
        """Nodes best first, ties by age."""
        return sorted(nodes, key=lambda node: (-self.rank(state, node), node.id))

    def _is_complete(self, outcome: Outcome, depth: int) -> str | None:
        """Why a child completes its text; `None` where the text goes on."""
        reason = outcome.finish_reason
        if reason in ENDED and reason != "stop":
            return reason
        if reason == "stop" and self.end and outcome.branch is not None:
            decode = outcome.branch.engine.tokenizer.decode
            text = decode(outcome.token_ids, skip_special=True)
            if any(end in text for end in self.end):
                return "stop"
        return "depth" if depth >= self.max_steps else None
