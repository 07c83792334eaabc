"""Random rollouts: a branch is worth what its sampled continuations are worth."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dendrite_engine.errors import BudgetExceeded, InvalidArgument, OutOfPages, StaleBranch
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search.checks import whole
from dendrite_engine.search.evaluation.base import (
    Answer,
    Evaluator,
    Tally,
    answers,
    bind,
    tokens_computed,
)

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

_BRANCH_ERRORS = (OutOfPages, BudgetExceeded, StaleBranch)


@dataclass(frozen=True)
class Rollout:
    """The mean value of sampled continuations; see `rollout`."""

    inner: Evaluator
    count: int
    sampling: SamplingParams
    seed: int
    start: int = 0
    tally: Tally = field(default_factory=Tally, repr=False, compare=False)

    def bind(self, root: Branch) -> Rollout:
        """Bind the evaluator of continuations."""
        inner = bind(self.inner, root)
        return replace(self, inner=inner, start=root.num_tokens, tally=Tally())

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """Continue every branch `count` times in one job, value the ends, prune them."""
        failed: dict[int, Exception] = {}
        made: list[tuple[int, Branch]] = []
        try:
            for index, branch in enumerate(branches):
                try:
                    self._fork(index, branch, made)
                except _BRANCH_ERRORS as error:  # noqa: PERF203 one failure is one branch's
                    failed[index] = error
            self._continue([fork for _, fork in made])
            alive = [(i, fork) for i, fork in made if fork.is_alive]
            values = answers(self.inner, [fork for _, fork in alive])
        finally:
            for _, fork in made:
                fork.prune()
        owned = [(i, value) for (i, _), value in zip(alive, values, strict=True)]
        return [_mean([v for j, v in owned if j == i], failed.get(i)) for i in range(len(branches))]

    def tokens_computed(self) -> int:
        """Tokens of the continuations, and those computed for the evaluator of their ends."""
        return math.ceil(self.tally.tokens) + tokens_computed(self.inner)

    def _fork(self, index: int, branch: Branch, made: list[tuple[int, Branch]]) -> None:
        """Forks whose draws depend on the seed, the text so far and their number only."""
        text = ",".join(map(str, branch.token_ids[self.start :]))
        for number in range(self.count):
            fork = branch.fork(1)[0]
            made.append((index, fork))
            digest = hashlib.blake2b(f"{self.seed}:{text}:{number}".encode(), digest_size=8)
            fork._key = int.from_bytes(digest.digest(), "little")

    def _continue(self, forks: Sequence[Branch]) -> None:
        """A text that has ended stays as it is, and so does one that fills the context."""
        going = [fork for fork in forks if not _has_ended(fork)]
        if going:
            done = going[0].engine.complete(going, self.sampling.replace(seed=self.seed))
            self.tally.tokens += sum(len(completion.token_ids) for completion in done)


def rollout(
    evaluator: Evaluator,
    *,
    tokens: int = 32,
    count: int = 1,
    sampling: SamplingParams | None = None,
    seed: int = 0,
) -> Rollout:
    """Value a branch by the mean value of `count` sampled continuations, which are pruned then.

    Monte Carlo evaluation as in Coulom, "Efficient Selectivity and Backup Operators in Monte-Carlo
    Tree Search", 2006. All continuations of a batch are decoded in one job. Draws depend on the
    seed and on the text, so the same branch is continued alike wherever it comes up.

    Args:
        evaluator: values the continuations.
        tokens: length of a continuation at most.
        count: continuations of a branch.
        sampling: how they are sampled, but for their length and seed; `None` for temperature 1.
        seed: of their draws.
    """
    if not callable(evaluator):
        raise InvalidArgument(f"evaluator must be callable, got {evaluator!r}")
    for name, value in (("tokens", tokens), ("count", count)):
        whole(name, value, 1)
    whole("seed", seed, 0)
    chosen = SamplingParams(temperature=1.0) if sampling is None else sampling
    if count > 1 and chosen.temperature == 0:
        raise InvalidArgument(
            f"sampling.temperature=0 would make all count={count} continuations the same"
        )
    return Rollout(evaluator, count, chosen.replace(max_tokens=tokens), seed)


def _has_ended(branch: Branch) -> bool:
    engine = branch.engine
    last: int = branch.token_ids[-1]
    full: bool = branch.num_tokens >= engine.max_context
    return full or last in engine.model_config.eos_token_ids


def _mean(values: Sequence[Answer], failure: Exception | None) -> Answer:
    """Mean of the values; where there are none, why not."""
    known = [value for value in values if not isinstance(value, Exception)]
    if known:
        return math.fsum(known) / len(known)
    errors = [value for value in values if isinstance(value, Exception)]
    return errors[0] if errors else failure or StaleBranch("every continuation was pruned")
