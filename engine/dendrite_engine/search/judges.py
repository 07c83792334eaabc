"""Judges: the model itself values branches, by a question whose answer is read from its logits.

A question is asked on a fork of the branch, whose KV it shares, and the fork is pruned. No answer
is sampled: the value is the expectation over the answers that were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import number
from dendrite_engine.search.evaluators import written

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

_CERTAIN = 1e9  # a logit bias that leaves one token only
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def answer_probabilities(
    branches: Sequence[Branch], questions: Sequence[str], answers: Sequence[str]
) -> list[list[float]]:
    """Probability of each answer after each branch and its question, among these answers.

    An answer stands for the first token of its text. One forward pass for all branches; every fork
    is pruned, whatever happens.

    Raises:
        InvalidArgument: an answer has no tokens, or two begin with the same one.
    """
    if not branches:
        return []
    engine = branches[0].engine
    tokens = _first_tokens(engine, answers)
    made: list[Branch] = []
    try:
        for branch, question in zip(branches, questions, strict=True):
            asked = branch.fork(1)[0]
            made.append(asked)
            if ids := engine.tokenizer.encode(question):
                asked.extend(ids)
            made += asked.fork(len(tokens))
        rows = len(tokens) + 1
        answering = [fork for place, fork in enumerate(made) if place % rows]
        done = engine.complete(answering, _forced(tokens) * len(branches))
        logprobs = [c.logprobs[0] if c.logprobs else _raise(c.error) for c in done]
    finally:
        for fork in reversed(made):
            fork.prune()
    step = len(tokens)
    return [_normalised(logprobs[i : i + step]) for i in range(0, len(logprobs), step)]


def _first_tokens(engine: Any, answers: Sequence[str]) -> list[int]:
    encoded = [engine.tokenizer.encode(answer) for answer in answers]
    if not all(encoded) or len({ids[0] for ids in encoded}) < len(encoded):
        raise InvalidArgument(
            f"answers must each begin with a token of its own; {list(answers)} begin with "
            f"{[ids[:1] for ids in encoded]}"
        )
    return [ids[0] for ids in encoded]


def _forced(tokens: Sequence[int]) -> list[Any]:
    from dendrite_engine.sampling_params import SamplingParams

    return [
        SamplingParams(max_tokens=1, ignore_eos=True, logit_bias={token: _CERTAIN})
        for token in tokens
    ]


def _raise(error: Exception | None) -> float:
    raise error or InvalidArgument("the model gave no answer: the job was cancelled")


def _normalised(logprobs: Sequence[float]) -> list[float]:
    top = max(logprobs)
    weights = [math.exp(value - top) for value in logprobs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


@dataclass(frozen=True)
class PromptedValue:
    """The model's opinion of each branch alone; see `prompted_value`."""

    question: str
    answers: tuple[str, ...]
    values: tuple[float, ...]

    def __call__(self, branches: Sequence[Branch]) -> list[float]:
        """One value for each branch; one forward pass."""
        rows = answer_probabilities(branches, [self.question] * len(branches), self.answers)
        return [math.fsum(p * v for p, v in zip(row, self.values, strict=True)) for row in rows]


def prompted_value(question: str, answers: Mapping[str, float]) -> PromptedValue:
    """Value a branch by what the model answers to a question about it.

        value = sum of P(answer) * value(answer),   P normalised over the answers

    (the value prompt of Yao et al., "Tree of Thoughts", NeurIPS 2023, with the expectation in place
    of sampled answers).

    Args:
        question: appended to a fork of the branch.
        answers: value of each answer; only the first token of an answer counts.

    Raises:
        InvalidArgument: fewer than two answers, or a value that is no number.

    Example:
        >>> judge = prompted_value("\\nCan this reach 24?", {" yes": 1.0, " no": 0.0})
    """
    if not isinstance(question, str):
        raise InvalidArgument(f"question must be a text, got {question!r}")
    if not isinstance(answers, Mapping) or len(answers) < 2:
        raise InvalidArgument(f"answers must map at least two texts to values, got {answers!r}")
    for answer, value in answers.items():
        number(f"answers[{answer!r}]", value)
    return PromptedValue(question, tuple(answers), tuple(float(v) for v in answers.values()))


@dataclass(frozen=True)
class PromptedVote:
    """The model's choice among the branches of a batch; see `prompted_vote`."""

    question: str
    heading: str
    root: Branch | None = None

    def bind(self, root: Branch) -> PromptedVote:
        """Put the ballot below `root`, with what was written after it."""
        return replace(self, root=root)

    def __call__(self, branches: Sequence[Branch]) -> list[float]:
        """Share of the votes for each branch, in expectation; one forward pass."""
        if self.root is None:
            raise InvalidArgument("a vote needs the branch that the search starts from: bind(root)")
        if len(branches) > len(_LETTERS):
            raise InvalidArgument(
                f"{len(branches)} candidates are too many for one ballot of {len(_LETTERS)}: keep "
                "fewer, or value them one by one"
            )
        if len(branches) < 2:
            return [1.0] * len(branches)
        start = self.root.num_tokens
        letters = _LETTERS[: len(branches)]
        choices = "".join(
            f"{letter}. {written(branch, start).strip()}\n"
            for letter, branch in zip(letters, branches, strict=True)
        )
        ballot = f"{self.heading}{choices}{self.question}"
        return answer_probabilities([self.root], [ballot], [f" {letter}" for letter in letters])[0]


def prompted_vote(
    question: str = "The best choice is", heading: str = "\nChoices:\n"
) -> PromptedVote:
    """Value the branches of a batch against each other: the model votes on a ballot of them.

    A branch's value is the probability of its letter after the ballot, normalised over all of them:
    the expected share of votes (Yao et al., "Tree of Thoughts", NeurIPS 2023, section 3, where
    votes are sampled). For `TreeOfThought(judge="vote")`, which shows it a whole round at once.

    Args:
        question: what comes after the candidates; a letter follows.
        heading: what comes before them.
    """
    return PromptedVote(question, heading)
