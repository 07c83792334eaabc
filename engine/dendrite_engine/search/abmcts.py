"""Adaptive branching MCTS: every node may always get another child, or be gone deeper into."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.base import Outcome, Trial
from dendrite_engine.search.budget import BatchPlan, Budget
from dendrite_engine.search.descending import DescendingSearch, DescendingState
from dendrite_engine.search.draws import generator
from dendrite_engine.search.posterior import BetaPosterior, GaussianPosterior, Posterior
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class ABMCTSState(DescendingState):
    """State of an adaptive branching MCTS.

    Attributes:
        below: values of a node and of all nodes below it, by its id: what choosing it has brought.
        deeper: values of the nodes two levels below a node and further, by its id: what going on
            with its children has brought.
        told: outcomes of the batch so far.
        refine_ids: tokens of the text between an answer and its refinement.
    """

    below: dict[int, list[float]] = field(default_factory=dict)
    deeper: dict[int, list[float]] = field(default_factory=dict)
    told: list[tuple[Trial, Outcome]] = field(default_factory=list)
    refine_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ABMCTS(DescendingSearch[ABMCTSState]):
    """AB-MCTS-A: Thompson sampling decides at every node whether to go wider or deeper.

    (Inoue et al., "Wider or Deeper? Scaling LLM Inference-Time Compute with Adaptive Branching Tree
    Search", 2025, the variant with node aggregation.) At a node, one value is drawn from the
    posterior of each of two arms:

    * generate: write another child; its observations are the values of the node's children;
    * refine: go on with the children; its observations are the values of all nodes further below.

    Where refine draws higher, the same is done among the children, the observations of a child
    being its own value and those of all nodes below it; and so on down. Ties generate. A child of
    the root is an answer; a child of an answer is a refinement of it, written after the text
    `refine`. With `refine=None` nodes are pieces of one text, and a text that has ended has no
    children.

    Draws are a function of the seed, the node and the number of the trial. Outcomes are taken
    in when a batch is complete. Select costs O(depth * width + observations on the path). Options
    not listed here are those of `DescendingSearch`, `ExpandingSearch` and `WritingSearch`; children
    are sampled, and `width` is only a limit.

    Args:
        posterior: `GaussianPosterior()` (the paper's prior, for values in [0, 1]) or
            `BetaPosterior()`, with their own options.
        refine: text put between an answer and its refinement.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "abmcts"
    saved_types: ClassVar[tuple[type, ...]] = (GaussianPosterior, BetaPosterior)
    expansions: ClassVar[tuple[str, ...]] = ("sample",)
    live_options: ClassVar[frozenset[str]] = frozenset(
        {"width", "parallel", "tokens_per_node", "target"}
    )
    default_budget: ClassVar[Budget] = Budget(iterations=64)

    width: int = 64
    tokens_per_node: int = 64
    posterior: Posterior = field(default_factory=GaussianPosterior)
    refine: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.posterior, Posterior):
            raise InvalidArgument(
                f"posterior must be a GaussianPosterior or a BetaPosterior, got {self.posterior!r}"
            )
        if self.refine is not None and (not isinstance(self.refine, str) or not self.refine):
            raise InvalidArgument(f"refine must be a text that is not empty, got {self.refine!r}")

    # -- the ask/tell contract ------------------------------------------------------------------

    def init(self, root: Branch) -> ABMCTSState:
        """A tree of one node, the root."""
        state = ABMCTSState(Tree(root))
        if self.refine is not None:
            state.refine_ids = tuple(root.engine.tokenizer.encode(self.refine))
        return state

    def plan(self, state: ABMCTSState) -> BatchPlan:
        """`parallel` children, each worth writing alone."""
        return BatchPlan(self.parallel, 1, self.tokens_per_node + len(state.refine_ids), 1)

    def ask(self, state: ABMCTSState, n: int) -> list[Trial]:
        """Choose up to `n` nodes and ask for a child of each."""
        trials: list[Trial] = []
        params = self.sampling_for(self.tokens_per_node)
        while len(trials) < n and state.reason is None:
            node = self._select(state)
            if node is None:
                break
            self._count_in_flight(node, +1)
            state.note("select", node, {"path": [n.branch_id for n in node.path()]})
            details: dict[str, Any] = {"params": params}
            if node.parent is not None and state.refine_ids:
                details["forced"] = state.refine_ids
            trials.append(self.attempt(state, node, **details))
        if not trials and not state.pending and state.reason is None:
            state.reason = "exhausted"
        return trials

    def tell(self, state: ABMCTSState, results: Sequence[Outcome]) -> None:
        """Keep outcomes; with the last of a batch, hang all children into the tree.

        Raises:
            InvalidArgument: a value is outside [0, 1] and the posterior wants it there; nothing was
                changed.
        """
        for outcome in results:
            self._check_value(outcome.value)
        state.told += self.take_trials(state, results)
        if state.pending:
            return
        told, state.told = sorted(state.told, key=lambda pair: pair[0].id), []
        for trial, outcome in told:
            self._count_in_flight(trial.node, -1)
            if trial.node.status == "pruned" or outcome.lost or outcome.value is None:
                self.discard(state, trial, outcome)
            else:
                self._grow(state, trial, outcome, outcome.value)
            self._close(state, trial.node)
        self._check_end(state)

    def best(self, state: ABMCTSState) -> Node:
        """The node valued highest (ties: lowest id)."""
        return state.leader or state.tree.root

    def rank(self, state: ABMCTSState, node: Node) -> float:  # noqa: ARG002
        """The mean of the observations of a node; draws decide, so this only describes."""
        return node.value + node.bonus

    def ends_text(self, outcome: Outcome) -> bool:
        """An answer that can be refined is not the end of the text; a full context is."""
        if self.refine is not None:
            return outcome.finish_reason == "context_full"
        return super().ends_text(outcome)

    # -- select ---------------------------------------------------------------------------------

    def _choices(self, state: ABMCTSState, node: Node) -> Iterator[Node]:
        """The node itself where generating draws at least as high as refining, else children."""
        source = generator(self.seed, "thompson", node.ordinals(), state.next_trial)
        can_expand = self._can_expand(state, node)
        children = [child for child in node.children if not child.exhausted]
        if can_expand:
            made = [child.score for child in node.children if child.score is not None]
            wider = self.posterior.draw(made, source)
            deeper = self.posterior.draw(state.deeper.get(node.id, ()), source)
            if not children or wider >= deeper:
                yield node
                return
        drawn = [
            (-self.posterior.draw(state.below[child.id], source) - child.bonus, child.id, child)
            for child in children
        ]
        yield from (child for _, _, child in sorted(drawn))
        if can_expand:
            yield node

    # -- evaluate and back up -------------------------------------------------------------------

    def _grow(self, state: ABMCTSState, trial: Trial, outcome: Outcome, value: float) -> None:
        """Make the child's node, or count it as another observation of an equal one."""
        child, is_new = self.hang(state, trial, outcome)
        if is_new:
            child.score = value
            state.note("expand", trial.node, {"children": [child.branch_id]})
            state.note("evaluate", child, {"values": [value]})
        path = child.path()
        for step in path:
            step.visits += 1
            step.value_sum += value
            step.square_sum += value * value
            state.tree.touch(step)
            state.below.setdefault(step.id, []).append(value)
            if child.depth - step.depth >= 2:
                state.deeper.setdefault(step.id, []).append(value)
        state.note("backpropagate", child, {"path": [n.branch_id for n in path], "value": value})
        if is_new:
            self._follow(state, child)

    def _check_value(self, value: float | None) -> None:
        if value is not None and self.posterior.unit_values and not 0.0 <= value <= 1.0:
            raise InvalidArgument(
                f"the evaluator gave {value}; {type(self.posterior).__name__} wants values in "
                f"[0, 1]: squash them in the evaluator, or use {GaussianPosterior.__name__}"
            )
