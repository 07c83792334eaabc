"""What searches over single tokens share: they look at next tokens and choose among all of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

from dendrite_engine.errors import ContextTooLong
from dendrite_engine.search.base import Outcome, Search, State, Trial
from dendrite_engine.search.budget import BatchPlan
from dendrite_engine.search.checks import whole
from dendrite_engine.search.tree import Node

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class TokenState(State):
    """State of a search over single tokens.

    Attributes:
        live: beams that go on, best first; at the start the root.
        looked: alternatives of live beams by node id, until all of them are known.
        finished: complete texts, best first.
        total: sum of log-probabilities from the root, by node id.
        step: tokens in every live beam.
        stop_ids: tokens that complete a text.
        limit: longest text that the context can hold.
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


S = TypeVar("S", bound=TokenState)


@dataclass(frozen=True, kw_only=True)
class TokenSearch(Search[S]):
    """Base: each step looks up the next tokens of all live beams in one forward, then chooses.

    A beam continues on its parent's branch where it is the first child and forks where it is not;
    beams that fall out are pruned at once.

    Args:
        width: beams.
        max_tokens: longest text.
        stop_token_ids: tokens that complete a text, besides the model's end-of-text tokens.
    """

    needs_values: ClassVar[bool] = False

    width: int = 4
    max_tokens: int = 64
    stop_token_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("width", self.width, 1)
        whole("max_tokens", self.max_tokens, 1)
        for token_id in self.stop_token_ids:
            whole("stop_token_ids", token_id, 0)

    @abstractmethod
    def _alternatives(self, state: S) -> int:
        """Next tokens to look up for a beam."""

    @abstractmethod
    def _advance(self, state: S) -> None:
        """Make the next beams and complete texts out of the looked-up alternatives."""

    # -- the ask/tell contract ------------------------------------------------------------------

    def _begin(self, state: S, root: Branch) -> S:
        """Put one live beam into a fresh state: the root, with a sum of 0.

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
        state.live, state.total = [state.tree.root], {0: 0.0}
        state.stop_ids = frozenset(engine.model_config.eos_token_ids) | {*self.stop_token_ids}
        state.limit = min(self.max_tokens, engine.max_context - held)
        return state

    def plan(self, state: S) -> BatchPlan:
        """A look at every live beam; a part of a step would lead nowhere."""
        wanted = max(1, len(state.live) - len(state.looked))
        return BatchPlan(wanted, wanted, 1, 1)

    def ask(self, state: S, n: int) -> list[Trial]:
        """Looks at live beams whose alternatives are not known yet."""
        self._advance_if_ready(state)
        asked = {trial.node.id for trial in state.pending.values()}
        k = self._alternatives(state)
        trials: list[Trial] = []
        for node in state.live if state.reason is None else ():
            if len(trials) < n and node.id not in state.looked and node.id not in asked:
                state.note("select", node, {"path": _branch_path(node)})
                trials.append(self.open_trial(state, "look", node, k=k))
        return trials

    def tell(self, state: S, results: Sequence[Outcome]) -> None:
        """Keep the alternatives; with those of the last beam, go a token on."""
        for trial, outcome in self.take_trials(state, results):
            if trial.node not in state.live:
                continue
            if outcome.lost:
                self.lose(state, trial.node, outcome.finish_reason or "error")
            else:
                state.looked[trial.node.id] = outcome
        self._advance_if_ready(state)

    def best(self, state: S) -> Node:
        """The best complete hypothesis, else the best live beam by the same score."""
        if state.finished:
            return state.finished[0]
        if state.live:
            return max(state.live, key=lambda beam: (self.rank(state, beam), -beam.id))
        return state.fallen or state.tree.root

    def drop(self, state: S, node: Node) -> None:
        """Take a beam or a complete text out."""
        state.tree.drop(node)
        state.live = [beam for beam in state.live if beam.status != "pruned"]
        state.finished = [done for done in state.finished if done.status != "pruned"]
        if not state.live and state.reason is None:
            state.reason = "finished" if state.finished else "exhausted"

    def lose(self, state: S, node: Node, reason: str) -> None:
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

    def _advance_if_ready(self, state: S) -> None:
        ready = state.live and all(node.id in state.looked for node in state.live)
        if ready and state.reason is None:
            self._advance(state)

    def _end_step(self, state: S, beams: list[Node]) -> None:
        """Let go of the beams that the step began with, once their children are made."""
        state.step += 1
        state.looked.clear()
        state.note("evaluate", beams[0], {"values": [node.score for node in state.live]})
        for beam in beams:
            beam.exhausted = True
            state.tree.release(beam)

    def _continue(self, state: S, beam: Node, candidate: Candidate, ordinal: int = 0) -> Node:
        """A node one token below its beam; its branch is made at the next settle."""
        node = state.tree.add(beam, (candidate.token_id,), (candidate.logprob,), ordinal=ordinal)
        node.bonus = beam.bonus
        node.prior = math.exp(candidate.logprob)
        state.total[node.id] = candidate.total
        return node

    def _end_text(self, state: S, node: Node) -> None:
        """Mark a node as the end of a complete text."""
        node.status, node.exhausted = "terminal", True
        node.finish_reason = "eos" if node.token_ids[-1] in state.stop_ids else "length"


def _branch_path(node: Node) -> list[int]:
    """Branch ids down to `node`; beams that handed their branch on have none of their own."""
    return [step.branch_id for step in node.path() if step.branch_id]
