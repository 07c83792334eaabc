"""A trial on its way through the runner, and how it ends alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import (
    ContextTooLong,
    GrammarError,
    NumericError,
    SearchError,
    StaleBranch,
)
from dendrite_engine.search.base import Outcome, Trial
from dendrite_engine.search.tree import Candidate

if TYPE_CHECKING:
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.types import FinishReason


@dataclass(slots=True)
class Work:
    """A trial on its way through the runner."""

    trial: Trial
    outcome: Outcome
    rollout: Branch | None = None
    key: Any = None  # of the child's draws, once it was forked before and fell short of pages
    short_rollout: bool = False

    @property
    def branch(self) -> Branch:
        """The child's branch, once it was forked."""
        if self.outcome.branch is None:
            raise SearchError(f"trial {self.trial.id} has no branch yet")
        return self.outcome.branch

    @property
    def params(self) -> SamplingParams:
        """How to decode what is left of the child after the tokens that it was begun with."""
        params = self.trial.params
        if params is None:
            raise SearchError(f"trial {self.trial.id} expands a node without sampling params")
        begun = len(self.outcome.token_ids) - len(self.trial.forced)
        return params.replace(max_tokens=params.max_tokens - begun) if begun else params

    def begin(self, begun: Candidate, eos: frozenset[int]) -> None:
        """Note the tokens that the child was begun with, and whether it ends with them."""
        outcome, params = self.outcome, self.trial.params
        outcome.token_ids, outcome.logprobs = begun
        outcome.tokens_used += len(begun.token_ids)
        if begun.token_ids[-1] in eos:
            outcome.finish_reason = "eos"
        elif params is None or len(begun.token_ids) - len(self.trial.forced) >= params.max_tokens:
            outcome.finish_reason = "length"

    @property
    def unfinished(self) -> bool:
        """Nothing has ended this trial yet."""
        return self.outcome.finish_reason is None

    @property
    def short(self) -> bool:
        """It ended for want of pages."""
        return self.short_rollout or self.outcome.finish_reason == "out_of_pages"

    @property
    def tokens(self) -> int:
        """Tokens that it may append, at most."""
        wanted = (self.trial.params, self.trial.rollout)
        return sum(params.max_tokens for params in wanted if params is not None)

    def fail(self, error: Exception) -> None:
        """End this trial alone."""
        self.outcome.finish_reason = reason_of(error)
        self.outcome.error = f"{type(error).__name__}: {error}"


def reason_of(error: Exception) -> FinishReason:
    """The finish reason that an engine error stands for."""
    if isinstance(error, StaleBranch):
        return "stale"
    if isinstance(error, ContextTooLong):
        return "context_full"
    if isinstance(error, GrammarError):
        return "grammar_error"
    return "numeric_error" if isinstance(error, NumericError) else "out_of_pages"
