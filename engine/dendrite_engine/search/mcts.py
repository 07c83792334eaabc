"""Monte Carlo tree search over runs of tokens, with UCT selection."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.base import ENDED, Outcome, Search, State, Trial
from dendrite_engine.search.budget import BatchPlan, Budget
from dendrite_engine.search.checks import number, one_of, strings, whole
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class MCTSState(State):
    """State of an MCTS.

    Attributes:
        leader: node with the highest score so far, `None` before the first.
        low: lowest value backpropagated.
        high: highest value backpropagated.
        merged: sampled children that were token for token equal to an older sibling.
        failed: trials that left no child.
    """

    leader: Node | None = None
    low: float = math.inf
    high: float = -math.inf
    merged: int = 0
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class MCTS(Search[MCTSState]):
    """UCT-MCTS: each node is a run of tokens, each simulation adds one child and values it.

    Select walks down from the root. At a node with fewer than `width` attempts it stops and
    expands: one child is forked and sampled (untried children come before tried ones). Elsewhere it
    takes the child with the highest

        UCT(c) = Q(c) + exploration * sqrt(ln N(parent) / N(c)),   Q(c) = mean value of c

    (UCB1 applied to trees: Kocsis & Szepesvari, "Bandit based Monte-Carlo Planning", ECML 2006;
    ties to the lowest node id). The evaluator values the child, or with `rollout_tokens` a sampled
    continuation of it, and the value is added to every node on the path. `parallel` simulations
    share a batch: each one under way counts on its path as `virtual_loss` visits of the lowest
    value, which sends the next elsewhere (Chaslot, Winands & van den Herik, "Parallel Monte-Carlo
    Tree Search", CG 2008).

    A sampled child that equals an older sibling token for token is merged: its value counts as
    another visit of the sibling. A node is exhausted when its text has ended, or `width` attempts
    were made and all children are exhausted; select never returns to it, so its branch is pruned
    unless it lies on the path to the best. Select costs O(depth * width), backpropagate O(depth).

    Args:
        exploration: weight of the exploration term; sqrt(2) is UCB1's for values in [0, 1].
        width: attempts at children of a node.
        tokens_per_node: tokens of a child, at most; fewer where its text ends.
        max_depth: nodes on a path below the root; `None` for no limit.
        rollout_tokens: length of the continuation that is valued in a child's place; 0 values the
            child.
        parallel: simulations in a batch.
        virtual_loss: visits of the lowest value that a simulation under way stands for.
        expansion: `sample` draws the child's tokens; `top_k` begins the n-th child of a node with
            the n-th most likely token, then samples.
        stop: strings that end the text, so that the node is terminal; `None` keeps those of
            `sampling`. A string that spans two nodes is not seen.
        sampling: how tokens are drawn; `None` for temperature 1.
        normalise: `none` wants values in [0, 1]; `minmax` scales all values seen so far to [0, 1]
            when selecting (Schrittwieser et al., MuZero, Nature 2020, appendix B).
        target: end as soon as a node's value reaches this; `None` never.
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

    exploration: float = 1.414
    width: int = 3
    tokens_per_node: int = 16
    max_depth: int | None = None
    rollout_tokens: int = 0
    parallel: int = 4
    virtual_loss: int = 1
    expansion: Literal["sample", "top_k"] = "sample"
    stop: Sequence[str] | str | None = None
    sampling: SamplingParams | None = None
    normalise: Literal["none", "minmax"] = "none"
    target: float | None = None
    final: Literal["score", "visits"] = "score"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("exploration", self.exploration, 0)
        for name, low in (
            ("width", 1),
            ("tokens_per_node", 1),
            ("rollout_tokens", 0),
            ("parallel", 1),
            ("virtual_loss", 0),
        ):
            whole(name, getattr(self, name), low)
        if self.max_depth is not None:
            whole("max_depth", self.max_depth, 1)
        if self.target is not None:
            number("target", self.target)
        if isinstance(self.stop, str):  # as SamplingParams takes it
            object.__setattr__(self, "stop", (self.stop,))
        if self.stop is not None:
            strings("stop", self.stop)
        one_of("expansion", self.expansion, ("sample", "top_k"))
        one_of("normalise", self.normalise, ("none", "minmax"))
        one_of("final", self.final, ("score", "visits"))
        self._check_sampling()

    def _check_sampling(self) -> None:
        greedy = self.sampling is not None and self.sampling.temperature == 0
        if greedy and self.width > 1 and self.expansion == "sample":
            raise InvalidArgument(
                f"sampling.temperature=0 would make all width={self.width} children of a node the "
                "same; use a temperature above 0, width=1, or expansion='top_k'"
            )

    # -- the ask/tell contract ------------------------------------------------------------------

    def init(self, root: Branch) -> MCTSState:
        """A tree of one node, the root."""
        return MCTSState(Tree(root))

    def plan(self, state: MCTSState) -> BatchPlan:  # noqa: ARG002
        """`parallel` simulations, each worth running alone."""
        return BatchPlan(self.parallel, 1, self.tokens_per_node + self.rollout_tokens, 1)

    def ask(self, state: MCTSState, n: int) -> list[Trial]:
        """Select up to `n` nodes and ask for a child of each."""
        trials: list[Trial] = []
        params = self._params(self.tokens_per_node)
        rollout = self._params(self.rollout_tokens) if self.rollout_tokens else None
        while len(trials) < n and state.reason is None:
            node = self._select(state)
            if node is None:
                break
            trials.append(self._expand(state, node, params, rollout))
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
                self._lose(state, trial, outcome)
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
        """The node's UCT score; the mean value for the root, infinite for an unvisited child."""
        if node.parent is None:
            return node.value
        return self._uct_score(state, node, self._log_visits(node.parent))

    def drop(self, state: MCTSState, node: Node) -> None:
        """Take a subtree out; the best node is found anew when it was in there. O(subtree)."""
        state.tree.drop(node)
        if state.leader is not None and state.leader.status == "pruned":
            scored = [n for n in state.tree.nodes if n.score is not None and n.status != "pruned"]
            state.leader = max(scored, key=lambda n: (n.score or 0.0, -n.id), default=None)
        if node.parent is not None:
            self._close(state, node.parent)

    # -- select ---------------------------------------------------------------------------------

    def _select(self, state: MCTSState) -> Node | None:
        """The node to expand next; backs out of subtrees where everything is in flight."""
        root = state.tree.root
        if self._can_expand(root):
            return root
        path = [(root, self._by_score(state, root))]
        while path:
            node = next(path[-1][1], None)
            if node is None:
                # everything below is in flight, or a smaller width left nothing to try
                self._close(state, path.pop()[0])
            elif self._can_expand(node):
                return node
            else:
                path.append((node, self._by_score(state, node)))
        return None

    def _can_expand(self, node: Node) -> bool:
        return (
            node.branch is not None
            and not node.exhausted
            and node.attempts < self.width
            and (self.max_depth is None or node.depth < self.max_depth)
        )

    def _by_score(self, state: MCTSState, node: Node) -> Iterator[Node]:
        """Children worth descending into, best first; lazily, the first one nearly always does."""
        log_visits = self._log_visits(node)
        open_children = [child for child in node.children if not child.exhausted]
        keyed = [(-self._uct_score(state, c, log_visits), c.id, c) for c in open_children]
        if keyed:
            first = min(keyed)
            yield first[2]
            yield from (entry[2] for entry in sorted(keyed) if entry is not first)

    def _log_visits(self, parent: Node) -> float:
        return math.log(max(1, parent.visits + self.virtual_loss * parent.virtual))

    def _uct_score(self, state: MCTSState, node: Node, log_parent_visits: float) -> float:
        """UCT(c) = W(c) / n + exploration * sqrt(ln N / n) + bonus, n with virtual visits."""
        visits = node.visits + self.virtual_loss * node.virtual
        if not visits:
            return math.inf
        wins = node.value_sum
        if self.normalise == "minmax":
            spread = state.high - state.low
            wins = (wins - node.visits * state.low) / spread if spread > 0 else 0.5 * node.visits
        return wins / visits + self.exploration * math.sqrt(log_parent_visits / visits) + node.bonus

    # -- expand ---------------------------------------------------------------------------------

    def _expand(
        self, state: MCTSState, node: Node, params: SamplingParams, rollout: SamplingParams | None
    ) -> Trial:
        """Ask for the next child of `node` and count the simulation on its path."""
        ordinal = node.attempts
        node.attempts += 1
        self._count_in_flight(node, +1)
        state.note("select", node, {"path": [n.branch_id for n in node.path()]})
        return self.open_trial(
            state,
            "expand",
            node,
            ordinal=ordinal,
            params=params,
            alternative=ordinal if self.expansion == "top_k" else None,
            rollout=rollout,
            k=self.width if self.expansion == "top_k" else 0,
            key=self.node_key(node, ordinal),
        )

    def _params(self, max_tokens: int) -> SamplingParams:
        sampling = self.sampling
        if sampling is None:
            from dendrite_engine.sampling_params import SamplingParams

            sampling = SamplingParams(temperature=1.0)
        changes: dict[str, Any] = {"max_tokens": max_tokens}
        if self.seed is not None:
            changes["seed"] = self.seed
        if self.stop is not None:
            changes["stop"] = tuple(self.stop)
        return sampling.replace(**changes)

    @staticmethod
    def _count_in_flight(node: Node, step: int) -> None:
        node.in_flight += step
        above: Node | None = node
        while above is not None:
            above.virtual += step
            above = above.parent

    # -- evaluate and backpropagate -------------------------------------------------------------

    def _grow(self, state: MCTSState, trial: Trial, outcome: Outcome, value: float) -> None:
        """Make the child's node, or merge it into an equal sibling, and backpropagate."""
        twin = next((c for c in trial.node.children if c.token_ids == outcome.token_ids), None)
        if twin is not None:
            state.merged += 1
            state.tree.orphan(outcome.branch)
            self._backpropagate(state, twin, value)
            return
        child = state.tree.add(
            trial.node,
            outcome.token_ids,
            outcome.logprobs,
            branch=outcome.branch,
            ordinal=trial.ordinal,
        )
        child.prior = math.exp(sum(outcome.logprobs))
        child.score = value
        at_limit = self.max_depth is not None and child.depth >= self.max_depth
        if outcome.finish_reason in ENDED or at_limit:
            child.status = "terminal"
            child.exhausted = True
            ended = outcome.finish_reason in ENDED
            child.finish_reason = outcome.finish_reason if ended else "depth"
        state.note("expand", trial.node, {"children": [child.branch_id]})
        state.note("evaluate", child, {"values": [value]})
        self._backpropagate(state, child, value)
        self._follow(state, child)

    def _backpropagate(self, state: MCTSState, node: Node, value: float) -> None:
        """Add one visit of `value` to the node and all above it."""
        if not state.low <= value <= state.high:
            state.low, state.high = min(state.low, value), max(state.high, value)
            if self.normalise == "minmax":  # moves every score
                state.tree.dirty.update(range(len(state.tree)))
        path = node.path()
        for step in path:
            step.visits += 1
            step.value_sum += value
            state.tree.touch(step)
        state.note("backpropagate", node, {"path": [n.branch_id for n in path], "value": value})

    def _lose(self, state: MCTSState, trial: Trial, outcome: Outcome) -> None:
        """A trial left no child; a node whose own branch is gone can't expand again."""
        state.failed += 1
        state.tree.orphan(outcome.branch)
        node = trial.node
        gone = node.branch is not None and not node.branch.is_alive
        if outcome.finish_reason == "stale" and gone:
            node.branch = None
            node.status = "pruned"
            state.tree.dirty.add(node.id)

    def _check_value(self, value: float | None) -> None:
        if value is not None and self.normalise == "none" and not 0.0 <= value <= 1.0:
            raise InvalidArgument(
                f"the evaluator gave {value}; UCT wants values in [0, 1]: squash them in the "
                "evaluator, or use MCTS(normalise='minmax')"
            )

    # -- releasing losers -----------------------------------------------------------------------

    def _follow(self, state: MCTSState, child: Node) -> None:
        """Make `child` the leader when it beats it, and let go of the old leader's path."""
        old = state.leader
        if old is not None and (child.score or 0.0) <= (old.score or 0.0):
            self._release_exhausted(state, child)
            return
        state.leader = child
        for node in old.path() if old is not None else ():
            self._release_exhausted(state, node)

    def _release_exhausted(self, state: MCTSState, node: Node) -> None:
        keep = self.keep_tree or (state.leader is not None and node in state.leader.path())
        if node.exhausted and not keep:
            state.tree.release(node)

    def _close(self, state: MCTSState, node: Node) -> None:
        """Mark nodes from `node` upwards that have nothing left to try, release their branches."""
        above: Node | None = node
        while above is not None and not above.exhausted:
            if above.in_flight or self._can_expand(above):
                return
            if not all(child.exhausted for child in above.children):
                return
            above.exhausted = True
            state.tree.dirty.add(above.id)
            self._release_exhausted(state, above)
            above = above.parent

    def _check_end(self, state: MCTSState) -> None:
        leader = state.leader
        if self.target is not None and leader is not None and (leader.score or 0.0) >= self.target:
            state.reason = "target"
        elif state.tree.root.exhausted:
            state.reason = "exhausted"
