"""What self-consistency and the weighted vote share: texts that vote for the answer they end in."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument, SearchError
from dendrite_engine.search.checks import flag
from dendrite_engine.search.samples import SampleSearch, SamplesState
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

Extract = Callable[[str], Hashable | None]
LAST_NUMBER = r"-?\d+(?:\.\d+)?"


@dataclass(slots=True)
class Ballot:
    """What was cast for one answer.

    Attributes:
        answer: what the texts have in common.
        votes: texts that gave it.
        weight: sum of their weights.
        speaker: the text that stands for the answer.
        first: id of the oldest text that gave it; breaks ties.
    """

    answer: Hashable
    votes: int
    weight: float
    speaker: Node
    first: int


@dataclass(slots=True)
class VoteState(SamplesState):
    """State of a vote.

    Attributes:
        ballots: what was cast, by answer.
        answers: answer by id of the text that gave it.
    """

    ballots: dict[Hashable, Ballot] = field(default_factory=dict)
    answers: dict[int, Hashable] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Vote(SampleSearch[VoteState]):
    """Base: texts vote for their answers, each with a weight in [0, 1].

    The answer with the greatest sum of weights wins, ties go to the answer given first. The vote is
    decided as soon as the texts still to come can't change that, each with weight 1. One text of an
    answer stays alive; that of an answer which can't win any more is pruned.

    Args:
        extract: finds the answer in a text: a regular expression, of which the last match counts
            (its first group where it has one), or a function that returns the answer, `None` where
            there is none. A text without an answer does not vote.
        stop_when_decided: end as soon as the vote is decided.
    """

    extract: str | Extract = LAST_NUMBER
    stop_when_decided: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("stop_when_decided", self.stop_when_decided)
        if isinstance(self.extract, str):
            try:
                re.compile(self.extract)
            except re.error as error:
                raise InvalidArgument(
                    f"extract is not a regular expression: {self.extract!r} ({error})"
                ) from error
        elif not callable(self.extract):
            raise InvalidArgument(
                f"extract must be a regular expression or a function, got {self.extract!r}"
            )

    def init(self, root: Branch) -> VoteState:
        """A state without votes."""
        return VoteState(Tree(root))

    def best(self, state: VoteState) -> Node:
        """The text that stands for the leading answer; any text where none has an answer."""
        leading = self.leading(state)
        if leading:
            return leading[0].speaker
        return state.texts[0] if state.texts else state.tree.root

    def found(self, state: VoteState) -> list[Node]:
        """A text for each answer, the leading one first."""
        return [ballot.speaker for ballot in self.leading(state)]

    def rank(self, state: VoteState, node: Node) -> float:
        """The share of its answer in all weights cast."""
        ballot = state.ballots.get(state.answers.get(node.id, _NOBODY))
        total = sum(b.weight for b in state.ballots.values())
        return ballot.weight / total if ballot is not None and total > 0 else 0.0

    def leading(self, state: VoteState) -> list[Ballot]:
        """The ballots, that of the leading answer first. O(answers log answers)."""
        return sorted(state.ballots.values(), key=lambda b: (-b.weight, b.first))

    def drop(self, state: VoteState, node: Node) -> None:
        """Take a text and its vote out."""
        super().drop(state, node)
        state.ballots, state.answers = {}, {**state.answers}
        for text in state.texts:
            if text.id in state.answers:
                self._cast(state, text, state.answers[text.id])

    # -- the vote -------------------------------------------------------------------------------

    def _weight(self, node: Node) -> float:  # noqa: ARG002
        """What a text's vote counts."""
        return 1.0

    def _speaks_better(self, node: Node, speaker: Node) -> bool:  # noqa: ARG002
        """Whether a text stands better for their common answer than the present speaker."""
        return False

    def _judge(self, state: VoteState, node: Node) -> None:
        answer = self._answer_of(node)
        if answer is None:
            if state.ballots or node is not state.texts[0]:
                self._release(state, node)
        else:
            state.answers[node.id] = answer
            self._cast(state, node, answer)
            if state.texts[0].id not in state.answers:  # no longer the best that there is
                self._release(state, state.texts[0])
        self._score(state)
        self._release_losers(state)

    def _answer_of(self, node: Node) -> Hashable | None:
        if node.branch is None:
            raise SearchError(f"node {node.id} has no branch to read an answer from")
        text = node.branch.engine.tokenizer.decode(node.token_ids, skip_special=True)
        if not isinstance(self.extract, str):
            return self.extract(text)
        matches = list(re.finditer(self.extract, text))
        if not matches:
            return None
        return matches[-1][1] if matches[-1].re.groups else matches[-1][0]

    def _cast(self, state: VoteState, node: Node, answer: Hashable) -> None:
        ballot = state.ballots.get(answer)
        if ballot is None:
            weight = self._weight(node)
            state.ballots[answer] = Ballot(answer, 1, weight, node, node.id)
            return
        ballot.votes += 1
        ballot.weight += self._weight(node)
        loser = node
        if self._speaks_better(node, ballot.speaker):
            loser, ballot.speaker = ballot.speaker, node
        self._release(state, loser)

    def _score(self, state: VoteState) -> None:
        """The score of a text is the share of its answer: what `SearchResult.value` shows."""
        for ballot in state.ballots.values():
            ballot.speaker.score = self.rank(state, ballot.speaker)
            state.tree.touch(ballot.speaker)

    def _to_come(self, state: VoteState) -> int:
        """Votes that may still be cast."""
        held = len(state.pending) + len(state.held)
        return max(0, self.n - state.tree.root.attempts) + held

    def _release_losers(self, state: VoteState) -> None:
        ballots, to_come = self.leading(state), self._to_come(state)
        for ballot in ballots[1:]:
            if not _can_catch_up(ballot, ballots[0], to_come):
                self._release(state, ballot.speaker)

    def _is_decided(self, state: VoteState) -> str | None:
        ballots, to_come = self.leading(state), self._to_come(state)
        if not self.stop_when_decided or not ballots or not to_come:
            return None
        leader = ballots[0]
        newcomer = to_come > leader.weight  # an answer nobody gave yet loses ties
        if newcomer or any(_can_catch_up(b, leader, to_come) for b in ballots[1:]):
            return None
        return "decided"


_NOBODY: Any = object()  # an answer that no text gives


def _can_catch_up(ballot: Ballot, leader: Ballot, to_come: int) -> bool:
    """Whether `to_come` votes of weight 1 for a ballot could make it the leader."""
    most = ballot.weight + to_come
    return most > leader.weight or (most == leader.weight and ballot.first < leader.first)
