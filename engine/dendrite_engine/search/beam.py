"""Beam search over single tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from dendrite_engine.errors import ContextTooLong
from dendrite_engine.search.base import Outcome, Search, State, Trial
from dendrite_engine.search.budget import BatchPlan
from dendrite_engine.search.checks import number, one_of, whole
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class BeamState(State):
    """State of a beam search.

    Attributes:
        live: beams that go on, best first; at the start the root.
        looked: alternatives of live beams by node id, until all of them are known.
        finished: complete hypotheses, best first, at most `width`; `score` of a node is its rank.
        total: sum of log-probabilities from the root, by node id.
        step: tokens in every live beam.
        stop_ids: tokens that complete a hypothesis.
        limit: longest hypothesis that the context can hold.
        fallen: best beam that was lost for want of pages.
    """

    live: list[Node] = field(default_factory=list)
    looked: dict[int, Outcome] = field(default_factory=dict)
    finished: list[Node] = field(default_factory=list)
    total: dict[int, float] = field(default_factory=dict)
    step: int = 0
    stop_ids: frozenset[int] = frozenset()
    limit: int = 0
    fallen: Node | None = None


class Candidate(NamedTuple):
    """A live beam with one more token; sorts best first, ties by beam, then by token id."""

    key: float
    beam: int
    token_id: int
    logprob: float
    total: float


@dataclass(frozen=True, kw_only=True)
class BeamSearch(Search[BeamState]):
    """Token-level beam search: keeps the `width` likeliest texts, a token longer at each step.

    Each step looks up the next-token log-probabilities of all live beams in one forward and ranks
    all continuations by the sum of log-probabilities. Of the best `width`, those that end (a stop
    token, or `max_tokens` reached) become hypotheses with the score

        score = sum of log-probabilities / length ** length_penalty

    (length counts the stop token; Wu et al., "Google's Neural Machine Translation System", 2016,
    for the penalty) and the best `width` that do not end are the next beams. This is the procedure
    of `transformers` 5 `generate(num_beams=width, do_sample=False)`, stopping rules included, and
    gives the same tokens. A beam continues on its parent's branch where it is the first child and
    forks where it is not; beams that fall out are pruned at once. O(width^2) bookkeeping a step.

    Args:
        width: beams.
        length_penalty: above 0 favours long hypotheses (scores are negative), below 0 short ones.
        max_tokens: longest hypothesis.
        early_stopping: when to end with `width` hypotheses complete: `False` when the best live
            beam's score at its present length is below the worst hypothesis, `True` at once,
            `"never"` when no live beam can beat the worst hypothesis at any length.
        stop_token_ids: tokens that complete a hypothesis, besides the model's end-of-text tokens.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "beam"
    live_options: ClassVar[frozenset[str]] = frozenset({"width", "length_penalty"})
    needs_values: ClassVar[bool] = False

    width: int = 4
    length_penalty: float = 1.0
    max_tokens: int = 64
    early_stopping: bool | Literal["never"] = False
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("width", self.width, 1)
        number("length_penalty", self.length_penalty)
        whole("max_tokens", self.max_tokens, 1)
        one_of("early_stopping", self.early_stopping, (False, True, "never"))
        for token_id in self.stop_token_ids:
            whole("stop_token_ids", token_id, 0)

    # -- the ask/tell contract ------------------------------------------------------------------

    def init(self, root: Branch) -> BeamState:
        """One live beam, the root, with a sum of 0.

        Raises:
            ContextTooLong: the root fills the model's context.
        """
        engine, held = root.engine, root.num_tokens
        if held >= engine.max_context:
            raise ContextTooLong(
                f"the root's {held} tokens fill the context of {engine.max_context}",
                num_tokens=held,
                max_context=engine.max_context,
            )
        tree = Tree(root)
        stop_ids = frozenset(engine.model_config.eos_token_ids) | frozenset(self.stop_token_ids)
        limit = min(self.max_tokens, engine.max_context - held)
        return BeamState(tree, live=[tree.root], total={0: 0.0}, stop_ids=stop_ids, limit=limit)

    def plan(self, state: BeamState) -> BatchPlan:
        """A look at every live beam; a part of a step would lead nowhere."""
        wanted = max(1, len(state.live) - len(state.looked))
        return BatchPlan(wanted, wanted, 1, 1)

    def ask(self, state: BeamState, n: int) -> list[Trial]:
        """Looks at live beams whose alternatives are not known yet."""
        self._advance_if_ready(state)
        asked = {trial.node.id for trial in state.pending.values()}
        k = self._keep(state)
        trials: list[Trial] = []
        for node in state.live if state.reason is None else ():
            if len(trials) < n and node.id not in state.looked and node.id not in asked:
                state.note("select", node, {"path": _branch_path(node)})
                trials.append(self.open_trial(state, "look", node, k=k))
        return trials

    def tell(self, state: BeamState, results: Sequence[Outcome]) -> None:
        """Keep the alternatives; with those of the last beam, go a token on."""
        for trial, outcome in self.take_trials(state, results):
            if trial.node not in state.live:
                continue
            if outcome.lost:
                self.lose(state, trial.node, outcome.finish_reason or "error")
            else:
                state.looked[trial.node.id] = outcome
        self._advance_if_ready(state)

    def best(self, state: BeamState) -> Node:
        """The best complete hypothesis, else the best live beam by the same score."""
        if state.finished:
            return state.finished[0]
        if state.live:
            return max(state.live, key=lambda beam: (self.rank(state, beam), -beam.id))
        return state.fallen or state.tree.root

    def rank(self, state: BeamState, node: Node) -> float:  # noqa: ARG002
        """The length-normalised score; 0 for the root."""
        return node.score if node.score is not None else 0.0

    def drop(self, state: BeamState, node: Node) -> None:
        """Take a beam or hypothesis out."""
        state.tree.drop(node)
        state.live = [beam for beam in state.live if beam.status != "pruned"]
        state.finished = [done for done in state.finished if done.status != "pruned"]
        if not state.live and state.reason is None:
            state.reason = "finished" if state.finished else "exhausted"

    def lose(self, state: BeamState, node: Node, reason: str) -> None:
        """Take out a beam that the engine could not go on with; remember the best of them."""
        if reason == "out_of_pages":
            fallen = state.fallen
            if fallen is None or self.rank(state, node) > self.rank(state, fallen):
                state.fallen = node
        was_last = state.reason is None and state.live == [node]
        self.drop(state, node)
        if was_last and reason == "out_of_pages" and not state.finished:
            state.reason = "pages"

    # -- one step -------------------------------------------------------------------------------

    def _keep(self, state: BeamState) -> int:
        """Candidates ranked in a step: enough that `width` remain when all stop tokens lead."""
        return max(2, 1 + len(state.stop_ids)) * self.width

    def _advance_if_ready(self, state: BeamState) -> None:
        ready = state.live and all(node.id in state.looked for node in state.live)
        if ready and state.reason is None:
            self._advance(state)

    def _advance(self, state: BeamState) -> None:
        """Make the next beams and hypotheses out of the looked-up alternatives."""
        candidates = self._candidates(state)[: self._keep(state)]
        beams, length = state.live, state.step + 1
        at_limit = length >= state.limit
        ending = [at_limit or c.token_id in state.stop_ids for c in candidates]
        going_on = [c for c, ends in zip(candidates, ending, strict=True) if not ends]
        complete = [c for c, ends in zip(candidates[: self.width], ending, strict=False) if ends]
        # live beams first: the first child of a beam takes its branch over
        state.live = [self._continue(state, beams, c, length) for c in going_on[: self.width]]
        self._finish(state, beams, complete, length)
        state.step = length
        state.looked.clear()
        self._note_step(state, beams)
        for beam in beams:
            beam.exhausted = True
            state.tree.release(beam)
        if self._should_stop(state):
            state.reason = "finished"
            for beam in state.live:
                state.tree.release(beam)

    def _candidates(self, state: BeamState) -> list[Candidate]:
        found: list[Candidate] = []
        for index, beam in enumerate(state.live):
            total = state.total[beam.id]
            for alternative in state.looked[beam.id].alternatives:
                new_total = total + alternative.logprob
                found.append(
                    Candidate(
                        -(new_total + beam.bonus),
                        index,
                        alternative.token_id,
                        alternative.logprob,
                        new_total,
                    )
                )
        found.sort()
        return found

    def _continue(
        self, state: BeamState, beams: list[Node], candidate: Candidate, length: int
    ) -> Node:
        """A node one token below its beam; its branch is made at the next settle."""
        beam = beams[candidate.beam]
        node = state.tree.add(beam, (candidate.token_id,), (candidate.logprob,))
        node.bonus = beam.bonus
        node.prior = math.exp(candidate.logprob)
        node.score = self._score(candidate.total, length)
        node.visits, node.value_sum = 1, node.score
        state.total[node.id] = candidate.total
        return node

    def _finish(
        self, state: BeamState, beams: list[Node], complete: list[Candidate], length: int
    ) -> None:
        """Enter complete candidates into the hypotheses; those that fall out are released."""
        for candidate in complete:
            node = self._continue(state, beams, candidate, length)
            node.status, node.exhausted = "terminal", True
            node.finish_reason = "eos" if candidate.token_id in state.stop_ids else "length"
            state.finished.append(node)
        state.finished.sort(key=lambda n: (-(n.score or 0.0), n.id))
        for node in state.finished[self.width :]:
            state.tree.release(node)
        del state.finished[self.width :]

    def _should_stop(self, state: BeamState) -> bool:
        if not state.live:
            return True
        if len(state.finished) < self.width:
            return False
        if self.early_stopping is True:
            return True
        to_limit = self.early_stopping == "never" and self.length_penalty > 0
        length = state.limit if to_limit else state.step
        best_possible = self._score(state.total[state.live[0].id], length)
        return best_possible <= (state.finished[-1].score or 0.0)

    def _score(self, total: float, length: int) -> float:
        return float(total / max(1, length) ** self.length_penalty)

    def _note_step(self, state: BeamState, beams: list[Node]) -> None:
        scores = [node.score for node in state.live]
        state.note("evaluate", beams[0], {"values": scores})


def _branch_path(node: Node) -> list[int]:
    """Branch ids down to `node`; beams that handed their branch on have none of their own."""
    return [step.branch_id for step in node.path() if step.branch_id]
