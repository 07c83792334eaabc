"""Tree of thought: breadth-first, depth-first with backtracking, best-first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.actions import Runs
from dendrite_engine.search.base import Outcome, Trial
from dendrite_engine.search.budget import BatchPlan
from dendrite_engine.search.checks import number, one_of, whole
from dendrite_engine.search.expanding import ExpandingSearch, ExpandingState, unranked
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class ThoughtState(ExpandingState):
    """State of a tree of thought. A round expands some nodes and ends with a choice.

    Attributes:
        frontier: thoughts that may be expanded next; depth-first takes the last.
        round: thoughts that are being expanded.
        phase: of the round: `propose` writes proposals, `grow` makes children, `vote` compares
            them.
        queue: nodes that the phase has not asked for yet (`propose`, `vote`).
        told: outcomes of the phase so far.
        fresh: children of this round.
        leader: best complete path so far, `None` before the first.
    """

    frontier: list[Node] = field(default_factory=list)
    round: list[Node] = field(default_factory=list)
    phase: Literal["propose", "grow", "vote"] = "grow"
    queue: list[Node] = field(default_factory=list)
    told: list[tuple[Trial, Outcome]] = field(default_factory=list)
    fresh: list[Node] = field(default_factory=list)
    leader: Node | None = None


def lines_of(text: str) -> list[str]:
    """The lines of a text that hold something, each with its line break."""
    return [line + "\n" for line in text.splitlines() if line.strip()]


@dataclass(frozen=True, kw_only=True)
class TreeOfThought(ExpandingSearch[ThoughtState]):
    """Tree of thought (Yao et al., "Tree of Thoughts: Deliberate Problem Solving with Large
    Language Models", NeurIPS 2023; its algorithms 1 and 2).

    A round expands thoughts of the frontier into at most `width` children each, in one batch, gets
    a value for every child, and chooses:

    * `bfs`: all thoughts of a level are expanded; the `breadth` best children are the next level.
    * `dfs`: the latest thoughts are expanded, `parallel` at a time, best child first; children
      below `threshold` are cut off with all that would follow, and the search backtracks.
    * `best_first`: the `parallel` best thoughts of the whole frontier are expanded.

    A path is complete at `max_depth` thoughts, or where its text ends; the best of these is the
    result (ties: lowest id). Thoughts are sampled one by one, with `expansion="propose"` written
    by the model as a list, or given as actions. Equal paths are merged. Branches that the search
    can't return to are pruned at once. A round costs O(children * log children + live nodes).
    Options not listed here are those of `ExpandingSearch` and `WritingSearch`.

    Args:
        order: see above.
        breadth: thoughts kept of a level (`bfs`).
        parallel: thoughts expanded at once (`dfs`, `best_first`).
        threshold: children with a lower value are cut off; `None` for none.
        judge: `value` asks the evaluator about every child of a round in the batch that makes it;
            `vote` asks it once about all children of a round together, after they are written,
            so that it can compare them (see `prompted_vote`).
        lookahead: values a child by what follows: greedily for so many nodes more (k-step
            lookahead), of which nothing is kept; 0 values the child itself.
        propose: text after which the model lists its proposals (`expansion="propose"`).
        propose_tokens: tokens of such a list, at most.
        parse: takes the list apart into thoughts; `None` for one a line.
        target: end as soon as the value of a complete path reaches this; `None` never.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "tot"
    expansions: ClassVar[tuple[str, ...]] = ("sample", "top_k", "top_p", "actions", "propose")
    live_options: ClassVar[frozenset[str]] = frozenset(
        {"breadth", "parallel", "threshold", "tokens_per_node", "target", "width"}
    )

    max_depth: int | None = 4
    order: Literal["bfs", "dfs", "best_first"] = "bfs"
    breadth: int = 2
    parallel: int = 1
    threshold: float | None = None
    judge: Literal["value", "vote"] = "value"
    lookahead: int = 0
    propose: str | None = None
    propose_tokens: int = 64
    parse: Callable[[str], Sequence[str]] | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("order", self.order, ("bfs", "dfs", "best_first"))
        one_of("judge", self.judge, ("value", "vote"))
        for name, low in (("breadth", 1), ("parallel", 1), ("lookahead", 0), ("propose_tokens", 1)):
            whole(name, getattr(self, name), low)
        for name in ("threshold", "target"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))
        if (self.expansion == "propose") != bool(self.propose):
            raise InvalidArgument("propose and expansion='propose' go together: give both or none")
        if self.lookahead and self.judge == "vote":
            raise InvalidArgument("lookahead values children one by one; use judge='value'")

    # -- the ask/tell contract ------------------------------------------------------------------

    def init(self, root: Branch) -> ThoughtState:
        """The root is the first frontier."""
        state = ThoughtState(Tree(root))
        state.frontier = [state.tree.root]
        self._open_round(state)
        return state

    def plan(self, state: ThoughtState) -> BatchPlan:
        """All that is left of the round's phase: a part of it would lead to no choice."""
        wanted = max(1, self._wanted(state))
        if state.phase == "vote":
            return BatchPlan(wanted, wanted, 0, 0)
        if state.phase == "propose":
            asked = len(state.tree.root.branch.engine.tokenizer.encode(self.propose or ""))  # type: ignore[union-attr]
            return BatchPlan(wanted, wanted, asked + self.propose_tokens, 0)
        written = self.longest_run(state) if self.has_runs else self.tokens_per_node
        return BatchPlan(wanted, wanted, written + self.lookahead * self.tokens_per_node, 1)

    def ask(self, state: ThoughtState, n: int) -> list[Trial]:
        """Up to `n` trials of the phase."""
        self._go_on(state)
        trials: list[Trial] = []
        while len(trials) < n and state.reason is None and self._wanted(state):
            trials.append(self._next_trial(state))
        return trials

    def tell(self, state: ThoughtState, results: Sequence[Outcome]) -> None:
        """Keep the outcomes; with the last of a phase, go on to the next."""
        state.told += self.take_trials(state, results)
        self._go_on(state)

    def best(self, state: ThoughtState) -> Node:
        """The best complete path; before there is one, the best thought that can go on."""
        if state.leader is not None:
            return state.leader
        open_ones = [n for n in (*state.frontier, *state.round) if n.score is not None]
        return max(open_ones, key=self._by_value, default=state.tree.root)

    def rank(self, state: ThoughtState, node: Node) -> float:  # noqa: ARG002
        """The value, and what a person added to it."""
        return (node.score or 0.0) + node.bonus

    def drop(self, state: ThoughtState, node: Node) -> None:
        """Take a thought and all below it out."""
        state.tree.drop(node)
        for nodes in (state.frontier, state.round, state.queue, state.fresh):
            nodes[:] = [n for n in nodes if n.status != "pruned"]
        if state.leader is not None and state.leader.status == "pruned":
            complete = [n for n in state.tree.nodes if n.status == "terminal"]
            state.leader = max(complete, key=self._by_value, default=None)

    # -- asking ---------------------------------------------------------------------------------

    def _wanted(self, state: ThoughtState) -> int:
        """Trials that the phase has not asked for yet."""
        if state.phase != "grow":
            return len(state.queue)
        return sum(
            max(0, self.attempts_allowed(state, node) - node.attempts)
            for node in state.round
            if node.branch is not None and node.status != "pruned"
        )

    def _next_trial(self, state: ThoughtState) -> Trial:
        if state.phase == "vote":
            return self.open_trial(state, "evaluate", state.queue.pop(0))
        if state.phase == "propose":
            return self._ask_proposals(state, state.queue.pop(0))
        node = next(
            n
            for n in state.round
            if n.branch is not None
            and n.status != "pruned"
            and n.attempts < self.attempts_allowed(state, n)
        )
        state.note("select", node, {"path": [n.branch_id for n in node.path()]})
        details: dict[str, Any] = {"valued": self.judge == "value"}
        details["params"] = self.sampling_for(self.tokens_per_node)
        if self.lookahead:
            ahead = self.sampling_for(self.lookahead * self.tokens_per_node, thought=False)
            details["rollout"] = ahead.replace(temperature=0.0)
        return self.attempt(state, node, **details)

    def _ask_proposals(self, state: ThoughtState, node: Node) -> Trial:
        encode = node.branch.engine.tokenizer.encode  # type: ignore[union-attr]
        return self.open_trial(
            state,
            "expand",
            node,
            params=self.sampling_for(self.propose_tokens, thought=False),
            forced=tuple(encode(self.propose)),
            key=self.node_key(node, -1),
            valued=False,
        )

    # -- from phase to phase --------------------------------------------------------------------

    def _go_on(self, state: ThoughtState) -> None:
        """End phases that have nothing left to ask or to wait for."""
        while state.reason is None and not state.pending and not self._wanted(state):
            told, state.told = sorted(state.told, key=lambda pair: pair[0].id), []
            if state.phase == "propose":
                self._take_proposals(state, told)
            elif state.phase == "grow":
                self._take_children(state, told)
            else:
                self._take_votes(state, told)

    def _take_proposals(self, state: ThoughtState, told: list[tuple[Trial, Outcome]]) -> None:
        parse = self.parse or lines_of
        for trial, outcome in told:
            node = trial.node
            runs: Runs = ()
            state.tree.orphan(outcome.branch)
            if not outcome.lost and node.branch is not None:
                encode = node.branch.engine.tokenizer.encode
                try:
                    texts = [text for text in parse(outcome.text) if text]
                    runs = tuple(dict.fromkeys(tuple(encode(text)) for text in texts))
                except Exception as error:  # whatever the caller's parser raises stays here
                    text = f"parse raised {type(error).__name__}: {error}"
                    state.note("error", node, {"node": node.id, "error": text})
            state.runs[node.id] = tuple(run for run in runs if run)
            node.candidates = unranked(state.runs[node.id])
        state.phase = "grow"

    def _take_children(self, state: ThoughtState, told: list[tuple[Trial, Outcome]]) -> None:
        for trial, outcome in told:
            unvalued = outcome.value is None and self.judge == "value"
            if outcome.lost or unvalued or trial.node.status == "pruned":
                self.discard(state, trial, outcome)
                continue
            child, is_new = self.hang(state, trial, outcome)
            if is_new:
                state.fresh.append(child)
                state.note("expand", trial.node, {"children": [child.branch_id]})
                if outcome.value is not None:
                    self._give_value(state, child, outcome.value)
        if self.judge == "vote" and state.fresh:
            state.phase, state.queue = "vote", list(state.fresh)
        else:
            self._choose(state)

    def _take_votes(self, state: ThoughtState, told: list[tuple[Trial, Outcome]]) -> None:
        for trial, outcome in told:
            if outcome.value is None or outcome.lost:
                self.drop(state, trial.node)
            else:
                self._give_value(state, trial.node, outcome.value)
        self._choose(state)

    @staticmethod
    def _give_value(state: ThoughtState, node: Node, value: float) -> None:
        node.score, node.visits, node.value_sum = value, 1, value
        state.tree.dirty.add(node.id)
        state.note("evaluate", node, {"values": [value]})

    # -- choosing -------------------------------------------------------------------------------

    def _choose(self, state: ThoughtState) -> None:
        """End the round: cut off, keep, and open the next."""
        low = self.threshold
        fresh = [n for n in state.fresh if low is None or self.rank(state, n) >= low]
        for node in fresh:
            leader = state.leader
            if node.status == "terminal" and (
                leader is None or self._by_value(node) > self._by_value(leader)
            ):
                state.leader = node
        going = sorted((n for n in fresh if n.status == "open"), key=self._by_value, reverse=True)
        if self.order == "bfs":
            state.frontier = going[: self.breadth]
        elif self.order == "dfs":
            # children of the better of several thoughts come first, of each the best first
            place = {node.id: index for index, node in enumerate(state.round)}
            going.sort(key=lambda n: place.get(n.parent.id if n.parent else -1, 0))
            state.frontier += reversed(going)
        else:
            state.frontier = sorted((*state.frontier, *going), key=self._by_value, reverse=True)
        self._release_losers(state)
        state.fresh = []
        leader = state.leader
        if self.target is not None and leader is not None and (leader.score or 0.0) >= self.target:
            state.reason = "target"
        else:
            self._open_round(state)

    def _open_round(self, state: ThoughtState) -> None:
        """Take the thoughts that are expanded next out of the frontier."""
        frontier = [n for n in state.frontier if n.branch is not None]
        if self.order == "bfs":
            state.round, state.frontier = frontier, []
        elif self.order == "dfs":
            state.round = frontier[-self.parallel :][::-1]
            state.frontier = frontier[: -self.parallel]
        else:
            state.round, state.frontier = frontier[: self.parallel], frontier[self.parallel :]
        if not state.round:
            state.reason = "finished" if self.order == "bfs" else "exhausted"
        elif self.expansion == "propose":
            state.phase, state.queue = "propose", list(state.round)
        else:
            state.phase = "grow"

    def _release_losers(self, state: ThoughtState) -> None:
        """Prune what lies on the way to no thought of the frontier and not to the best path."""
        wanted = [*state.frontier, *([state.leader] if state.leader is not None else [])]
        needed = {step.id for node in wanted for step in node.path()}
        going = {node.id for node in state.frontier}
        for node in state.tree.nodes[1:]:
            if node.branch is None or node.status == "pruned":
                continue
            node.exhausted = node.id not in going
            if node.id not in needed and not self.keep_tree:
                state.tree.release(node)

    @staticmethod
    def _by_value(node: Node) -> tuple[float, int]:
        """Sorts thoughts, the best last."""
        return (node.score or 0.0) + node.bonus, -node.id
