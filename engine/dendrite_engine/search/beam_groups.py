"""What beam search and diverse beam search share: groups of beams, each with its own hypotheses."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from dendrite_engine.search.checks import number, one_of
from dendrite_engine.search.token_beam import Candidate, TokenSearch, TokenState
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class BeamState(TokenState):
    """State of a beam search. `finished` holds complete hypotheses; `score` of a node is its rank.

    Attributes:
        group: number of its group by node id; the root, which is not in there, is in all.
        done: groups that have ended.
    """

    group: dict[int, int] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class GroupedBeam(TokenSearch[BeamState]):
    """Base: groups of beams that are each searched as one beam search would be.

    Args:
        length_penalty: above 0 favours long hypotheses (scores are negative), below 0 short ones.
        early_stopping: when a group ends with all its hypotheses complete: `False` when the best
            live beam's score at its present length is below the worst hypothesis, `True` at once,
            `"never"` when no live beam can beat the worst hypothesis at any length.
    """

    live_options: ClassVar[frozenset[str]] = frozenset({"width", "length_penalty"})

    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("length_penalty", self.length_penalty)
        one_of("early_stopping", self.early_stopping, (False, True, "never"))

    @abstractmethod
    def _widths(self) -> list[int]:
        """Beams of each group."""

    def _penalty(self, times: int) -> float:  # noqa: ARG002
        """What a token loses that earlier groups chose so many times in this step."""
        return 0.0

    def init(self, root: Branch) -> BeamState:
        """One live beam, the root, with a sum of 0.

        Raises:
            ContextTooLong: the root fills the model's context.
        """
        return self._begin(BeamState(Tree(root)), root)

    def rank(self, state: BeamState, node: Node) -> float:  # noqa: ARG002
        """The length-normalised score; 0 for the root."""
        return node.score if node.score is not None else 0.0

    def found(self, state: BeamState) -> list[Node]:
        """Complete hypotheses of all groups, best first; without any the live beams."""
        return state.finished or sorted(state.live, key=lambda n: (-self.rank(state, n), n.id))

    # -- one step -------------------------------------------------------------------------------

    def _keep(self, state: BeamState, width: int) -> int:
        """Candidates ranked in a step: enough that `width` remain when all stop tokens lead."""
        return max(2, 1 + len(state.stop_ids)) * width

    def _alternatives(self, state: BeamState) -> int:
        widths = self._widths()
        # earlier groups can put as many tokens behind others as they chose in this step
        return self._keep(state, max(widths)) + sum(widths[:-1])

    def _advance(self, state: BeamState) -> None:
        beams, live = state.live, list[Node]()
        chosen: Counter[int] = Counter()
        for group, width in enumerate(self._widths()):
            own = [beam for beam in beams if state.group.get(beam.id, group) == group]
            if group in state.done or not own:
                state.done.add(group)
                continue
            made = self._advance_group(state, own, width, chosen)
            for node in made:
                state.group[node.id] = group
                chosen[node.token_ids[0]] += 1
            live += [node for node in made if node.status != "terminal"]
        state.live = live
        self._sort_finished(state)
        self._end_step(state, beams)
        self._end_groups(state)

    def _advance_group(
        self, state: BeamState, beams: list[Node], width: int, chosen: Counter[int]
    ) -> list[Node]:
        """Children of one group's beams: the live ones, then the complete."""
        candidates = self._candidates(state, beams, chosen)[: self._keep(state, width)]
        length = state.step + 1
        at_limit = length >= state.limit
        ending = [at_limit or c.token_id in state.stop_ids for c in candidates]
        going_on = [c for c, ends in zip(candidates, ending, strict=True) if not ends]
        complete = [c for c, ends in zip(candidates[:width], ending, strict=False) if ends]
        # live beams first: the first child of a beam takes its branch over
        live = [self._scored(state, beams, c, length) for c in going_on[:width]]
        done = [self._scored(state, beams, c, length) for c in complete]
        for node in done:
            self._end_text(state, node)
        state.finished += done
        return live + done

    def _candidates(
        self, state: BeamState, beams: list[Node], chosen: Counter[int]
    ) -> list[Candidate]:
        found: list[Candidate] = []
        for index, beam in enumerate(beams):
            total = state.total[beam.id]
            for token_id, _, logprob in state.looked[beam.id].alternatives:
                new_total = total + logprob
                key = -(new_total + beam.bonus)
                if chosen[token_id]:
                    key += self._penalty(chosen[token_id])
                found.append(Candidate(key, index, token_id, logprob, new_total))
        found.sort()
        return found

    def _scored(
        self, state: BeamState, beams: list[Node], candidate: Candidate, length: int
    ) -> Node:
        node = self._continue(state, beams[candidate.beam], candidate)
        node.score = self._score(candidate.total, length)
        node.visits, node.value_sum = 1, node.score
        return node

    def _sort_finished(self, state: BeamState) -> None:
        """Order the hypotheses; those that fall out of their group's best are released."""
        state.finished.sort(key=lambda n: (-(n.score or 0.0), n.id))
        places, kept = self._widths(), list[Node]()
        for node in state.finished:
            group = state.group[node.id]
            if group < len(places) and places[group] > 0:
                places[group] -= 1
                kept.append(node)
            else:
                state.tree.release(node)
        state.finished = kept

    def _end_groups(self, state: BeamState) -> None:
        """End groups that can't find better hypotheses, and the search with the last of them."""
        for group, width in enumerate(self._widths()):
            live = [node for node in state.live if state.group[node.id] == group]
            finished = [node for node in state.finished if state.group[node.id] == group]
            if group not in state.done and self._should_stop(state, live, finished, width):
                state.done.add(group)
                for node in live:
                    state.tree.release(node)
        state.live = [node for node in state.live if state.group[node.id] not in state.done]
        if not state.live:
            state.reason = "finished" if state.finished else "exhausted"

    def _should_stop(
        self, state: BeamState, live: list[Node], finished: list[Node], width: int
    ) -> bool:
        if not live:
            return True
        if len(finished) < width:
            return False
        if self.early_stopping is True:
            return True
        to_limit = self.early_stopping == "never" and self.length_penalty > 0
        length = state.limit if to_limit else state.step
        best_possible = self._score(state.total[live[0].id], length)
        return best_possible <= (finished[-1].score or 0.0)

    def _score(self, total: float, length: int) -> float:
        return float(total / max(1, length) ** self.length_penalty)
