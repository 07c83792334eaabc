"""Monte Carlo tree search over runs of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.base import Outcome, Trial
from dendrite_engine.search.budget import BatchPlan, Budget
from dendrite_engine.search.checks import number, one_of, whole
from dendrite_engine.search.selecting import SelectingSearch, SelectingState
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class MCTSState(SelectingState):
    """State of an MCTS; see `SelectingState`."""


@dataclass(frozen=True, kw_only=True)
class MCTS(SelectingSearch[MCTSState]):
    """MCTS: each node is a run of tokens, each simulation adds one child and values it.

    Select walks down from the root. At a node with fewer attempts than it may have (`width`,
    widening) it stops and expands: one child is forked and written. Elsewhere it takes the child
    that the selection rule scores highest; the default is

        UCT(c) = Q(c) + exploration * sqrt(ln N(parent) / N(c)),   Q(c) = mean value of c

    (ties to the lowest node id; see `selection` for the others). With a rule that has priors
    (PUCT), the next untried child competes with the tried ones. The evaluator values the child, or
    with `rollout_tokens` a sampled continuation of it, and the value is added to every node on the
    path, times `discount` for each step up. `parallel` simulations share a batch: each one under
    way counts on its path as `virtual_loss` visits of the lowest value, which sends the next
    elsewhere (Chaslot, Winands & van den Herik, "Parallel Monte-Carlo Tree Search", CG 2008).

    A child whose tokens from the root equal those of an older node is merged: its value counts as
    another visit of every node on both paths. A node is exhausted when its text has ended, or
    all attempts were made and all children are exhausted; select never returns to it, so its branch
    is pruned unless it lies on the path to the best. Select costs O(depth * width), backpropagate
    O(depth). Options not listed here are those of `SelectingSearch`, `DescendingSearch` (select),
    `ExpandingSearch` and `WritingSearch` (expand).

    Args:
        rollout_tokens: length of the continuation that is valued in a child's place; 0 values the
            child.
        discount: in (0, 1]; the value of a node d levels above the child gets `discount ** d` times
            the child's.
        final: what `best` returns: `score` the node that the evaluator valued highest (ties: lowest
            id), `visits` the end of the most visited path (robust child; better with rollouts,
            whose text is not kept).

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "mcts"
    live_options: ClassVar[frozenset[str]] = frozenset(
        {"exploration", "width", "parallel", "tokens_per_node", "rollout_tokens", "target"}
    )
    default_budget: ClassVar[Budget] = Budget(iterations=256)

    rollout_tokens: int = 0
    discount: float = 1.0
    final: Literal["score", "visits"] = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("rollout_tokens", self.rollout_tokens, 0)
        number("discount", self.discount, 0, above=True)
        if self.discount > 1:
            raise InvalidArgument(f"discount must be in (0, 1], got {self.discount}")
        one_of("final", self.final, ("score", "visits"))

    # -- the ask/tell contract ------------------------------------------------------------------

    def init(self, root: Branch) -> MCTSState:
        """A tree of one node, the root."""
        return MCTSState(Tree(root))

    def plan(self, state: MCTSState) -> BatchPlan:
        """`parallel` simulations, each worth running alone."""
        written = self.longest_run(state) if self.has_runs else self.tokens_per_node
        return BatchPlan(self.parallel, 1, written + self.rollout_tokens, 1)

    def ask(self, state: MCTSState, n: int) -> list[Trial]:
        """Select up to `n` nodes and ask for a child of each."""
        trials: list[Trial] = []
        details: dict[str, Any] = {"params": self.sampling_for(self.tokens_per_node)}
        if self.rollout_tokens:
            details["rollout"] = self.sampling_for(self.rollout_tokens, thought=False)
        while len(trials) < n and state.reason is None:
            node = self._select(state)
            if node is None:
                break
            self._count_in_flight(node, +1)
            state.note("select", node, {"path": [n.branch_id for n in node.path()]})
            trials.append(self.attempt(state, node, **details))
        if not trials and not state.pending and state.reason is None:
            state.reason = "exhausted"
        return trials

    def tell(self, state: MCTSState, results: Sequence[Outcome]) -> None:
        """Hang new children into the tree and backpropagate their values.

        Raises:
            InvalidArgument: a value is outside [0, 1] and `normalise` is "none"; nothing was
                changed.
        """
        for outcome in results:
            self._check_value(outcome.value)
        for trial, outcome in self.take_trials(state, results):
            self._count_in_flight(trial.node, -1)
            if trial.node.status == "pruned" or outcome.lost or outcome.value is None:
                self.discard(state, trial, outcome)
            else:
                self._grow(state, trial, outcome, outcome.value)
            self._close(state, trial.node)
        self._check_end(state)

    def best(self, state: MCTSState) -> Node:
        """The node valued highest, or the end of the most visited path. O(depth * width)."""
        if self.final == "score":
            return state.leader or state.tree.root
        node = state.tree.root
        while candidates := [c for c in node.children if c.status != "pruned"]:
            node = max(candidates, key=lambda c: (c.visits, c.value, -c.id))
        return node

    def rank(self, state: MCTSState, node: Node) -> float:
        """The score by which the rule picks; the mean value for the first root."""
        parent = node.parent
        if parent is None:
            return node.value
        visits = max(1.0, self._visits(parent))
        return self._score(state, node, visits, self._priors(state, parent))

    # -- evaluate and backpropagate -------------------------------------------------------------

    def _grow(self, state: MCTSState, trial: Trial, outcome: Outcome, value: float) -> None:
        """Make the child's node, or merge it into an equal one, and backpropagate."""
        child, is_new = self.hang(state, trial, outcome)
        if not is_new:
            self._backpropagate(state, child, value, also=trial.node)
            return
        child.score = value
        state.note("expand", trial.node, {"children": [child.branch_id]})
        state.note("evaluate", child, {"values": [value]})
        self._backpropagate(state, child, value)
        self._follow(state, child)

    def _backpropagate(
        self, state: MCTSState, node: Node, value: float, also: Node | None = None
    ) -> None:
        """Add one visit of `value` to the node and all above it, `also` and all above it once."""
        if not state.low <= value <= state.high:
            state.low, state.high = min(state.low, value), max(state.high, value)
            if self.normalise == "minmax":  # moves every score
                state.tree.dirty.update(range(len(state.tree)))
        path = node.path()
        self._add(state, path, value)
        if also is not None and also is not node.parent:
            known = {step.id for step in path}
            # the other way to the same text; its end is a step above the child's
            others = [step for step in also.path() if step.id not in known]
            self._add(state, others, value * self.discount)
        state.note("backpropagate", node, {"path": [n.branch_id for n in path], "value": value})

    def _add(self, state: MCTSState, path: Sequence[Node], value: float) -> None:
        """One visit for each node of a path that goes down; `value` for the last."""
        for step in reversed(path):
            step.visits += 1
            step.value_sum += value
            step.square_sum += value * value
            state.tree.touch(step)
            value *= self.discount

    def _check_value(self, value: float | None) -> None:
        if value is not None and self.normalise == "none" and not 0.0 <= value <= 1.0:
            raise InvalidArgument(
                f"the evaluator gave {value}; UCT wants values in [0, 1]: squash them in the "
                "evaluator, or use MCTS(normalise='minmax')"
            )
