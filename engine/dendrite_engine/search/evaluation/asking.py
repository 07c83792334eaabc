"""Values out of a model's answer to a question: self-evaluation, and a reward model or PRM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import (
    BudgetExceeded,
    ContextTooLong,
    InvalidArgument,
    NumericError,
    OutOfPages,
    SearchError,
    StaleBranch,
)
from dendrite_engine.search.checks import number, strings, whole
from dendrite_engine.search.evaluation.base import Answer, Tally, written
from dendrite_engine.search.evaluation.cached import CachedEvaluator, cached

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.types import TokenAlternative

_BRANCH_ERRORS = (OutOfPages, BudgetExceeded, StaleBranch, ContextTooLong, NumericError)


@dataclass(frozen=True)
class Verdict:
    """How a next token is read as a value: `P(good) / (P(good) + P(bad))`.

    Attributes:
        good: texts of good next tokens.
        bad: texts of bad next tokens.
        candidates: next tokens looked at, the likeliest first; others count as impossible.
    """

    good: tuple[str, ...]
    bad: tuple[str, ...]
    candidates: int

    def __post_init__(self) -> None:
        for name in ("good", "bad"):
            strings(name, getattr(self, name))
            if not getattr(self, name):
                raise InvalidArgument(f"{name} is empty; give at least one text")
        both = sorted(set(self.good) & set(self.bad))
        if both:
            raise InvalidArgument(f"good and bad share {both}; a token can't be both")
        whole("candidates", self.candidates, 1)

    def read(self, alternatives: Sequence[TokenAlternative]) -> Answer:
        """The value, or an error where neither kind of token is among the candidates."""
        good = math.fsum(math.exp(a.logprob) for a in alternatives if a.text in self.good)
        bad = math.fsum(math.exp(a.logprob) for a in alternatives if a.text in self.bad)
        if good + bad == 0.0:
            return SearchError(
                f"none of {self.good + self.bad} is among the {len(alternatives)} likeliest next "
                "tokens; ask otherwise, or raise candidates"
            )
        return good / (good + bad)

    def ask(self, engine: Any, branches: Sequence[Branch]) -> list[Answer]:
        """Values by the tokens that `engine` would write next; one forward for all branches."""
        if not branches:
            return []
        k = min(self.candidates, engine.model_config.vocab_size)
        try:
            return [self.read(row) for row in engine.top_tokens(list(branches), k)]
        except _BRANCH_ERRORS as error:
            if len(branches) == 1:
                return [error]
            return [answer for branch in branches for answer in self.ask(engine, [branch])]


@dataclass(frozen=True)
class SelfEvaluation:
    """The model's own opinion of a branch; see `self_evaluation`."""

    prompt: str | tuple[int, ...]
    verdict: Verdict
    tally: Tally = field(default_factory=Tally, repr=False, compare=False)

    def bind(self, root: Branch) -> SelfEvaluation:
        """Encode the prompt once."""
        ids = self.prompt
        if isinstance(ids, str):
            ids = tuple(root.engine.tokenizer.encode(ids))
        return replace(self, prompt=ids, tally=Tally())

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """Fork every branch, append the prompt, read the next token, prune the fork."""
        made, failed = self._fork(branches)
        try:
            engine = branches[0].engine if branches else None
            found = dict(zip(made, self.verdict.ask(engine, list(made.values())), strict=True))
        finally:
            for fork in made.values():
                fork.prune()
        self.tally.tokens += len(self.prompt) * len(made)
        return [failed[i] if i in failed else found[i] for i in range(len(branches))]

    def tokens_computed(self) -> int:
        """Tokens of the prompt, once for every branch: what stands before it is in pages."""
        return math.ceil(self.tally.tokens)

    def _fork(self, branches: Sequence[Branch]) -> tuple[dict[int, Branch], dict[int, Exception]]:
        made: dict[int, Branch] = {}
        failed: dict[int, Exception] = {}
        for index, branch in enumerate(branches):
            try:
                made[index] = branch.fork(1)[0]
                made[index].extend(self.prompt)
            except _BRANCH_ERRORS as error:  # noqa: PERF203 one failure is one branch's
                failed[index] = error
                if index in made:
                    made.pop(index).prune()
        return made, failed


def self_evaluation(
    prompt: str | Sequence[int],
    *,
    good: Sequence[str] = (" Yes", "Yes", " yes", "yes"),
    bad: Sequence[str] = (" No", "No", " no", "no"),
    candidates: int = 256,
) -> CachedEvaluator:
    """Value a branch by asking the model that wrote it: `P(good) / (P(good) + P(bad))`.

    Each branch is forked, the prompt is appended to the fork, the next token's probabilities are
    read and the fork is pruned. So nothing is prefilled but the prompt, and all branches of a batch
    share one forward. Answers are cached. The source is Kadavath et al., "Language Models (Mostly)
    Know What They Know", 2022 (`P(True)`).

    Args:
        prompt: text or token ids that ask about what stands before. For a chat model it ends the
            turn and opens the next, in the tokens of its template.
        good: texts of next tokens that mean a good answer.
        bad: texts of next tokens that mean a bad one.
        candidates: next tokens looked at, the likeliest first; others count as impossible.

    Raises:
        InvalidArgument: the prompt is empty, or the texts are; the message names the argument.

    Example:
        >>> evaluate = self_evaluation("\\nIs this sentence correct English? Answer:")
    """
    if not len(prompt):
        raise InvalidArgument("prompt is empty; ask something")
    asked = prompt if isinstance(prompt, str) else tuple(int(token) for token in prompt)
    return cached(SelfEvaluation(asked, Verdict(_texts(good), _texts(bad), candidates)))


def _texts(given: Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


Template = Callable[[str, str], str]


@dataclass(frozen=True)
class RewardModel:
    """Another engine's opinion of a branch; see `reward_model`."""

    engine: Engine
    template: Template
    verdict: Verdict
    cost: float
    prompt: str = ""
    start: int = 0
    tally: Tally = field(default_factory=Tally, repr=False, compare=False)

    def bind(self, root: Branch) -> RewardModel:
        """Tell the prompt from what the search wrote."""
        return replace(self, prompt=written(root, 0), start=root.num_tokens, tally=Tally())

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """Prefill every text in the other engine, read its next token, prune it there."""
        made: dict[int, Branch] = {}
        failed: dict[int, Exception] = {}
        try:
            for index, branch in enumerate(branches):
                text = self.template(self.prompt, written(branch, self.start))
                try:
                    made[index] = self._prefill(text)
                except _BRANCH_ERRORS as error:
                    failed[index] = error
            answers = self.verdict.ask(self.engine, list(made.values()))
            found = dict(zip(made, answers, strict=True))
        finally:
            for other in made.values():
                other.prune()
        return [failed[i] if i in failed else found[i] for i in range(len(branches))]

    def tokens_computed(self) -> int:
        """Tokens that the other engine prefilled, times `cost`."""
        return math.ceil(self.tally.tokens)

    def _prefill(self, text: str) -> Branch:
        before = self.engine.stats()
        branch = self.engine.prompt(text)
        reused = self.engine.stats().prefix_hit_tokens - before.prefix_hit_tokens
        self.tally.tokens += self.cost * max(1, branch.num_tokens - reused)
        return branch


def _append(prompt: str, text: str) -> str:
    return prompt + text


def reward_model(
    engine: Engine,
    *,
    good: Sequence[str],
    bad: Sequence[str],
    template: Template = _append,
    candidates: int = 1024,
    cost: float = 1.0,
) -> CachedEvaluator:
    """Value a branch by a model in another engine: `P(good) / (P(good) + P(bad))`.

    For process reward models that mark each step with one of two tokens, such as Wang et al.,
    "Math-Shepherd", 2024: the template ends with the tag after which the model judges the last
    step. The prefix index of that engine keeps the steps before, so a step costs its own tokens.
    Answers are cached.

    Args:
        engine: of the reward model.
        good: texts of next tokens that mean a good step.
        bad: texts of next tokens that mean a bad one.
        template: makes the reward model's prompt out of the search's prompt and what it wrote.
        candidates: next tokens looked at, the likeliest first; others count as impossible.
        cost: token-forwards of the searched model that one of this model's stands for (the ratio of
            their parameters), for `Budget.compute`.

    Raises:
        InvalidArgument: an argument is bad; the message names it.
    """
    if not callable(template):
        raise InvalidArgument(f"template must be callable, got {template!r}")
    number("cost", cost, 0)
    verdict = Verdict(_texts(good), _texts(bad), candidates)
    return cached(RewardModel(engine, template, verdict, cost))
