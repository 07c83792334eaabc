"""An evaluator that remembers what it said."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import whole
from dendrite_engine.search.evaluation.base import (
    Answer,
    Evaluator,
    answers,
    bind,
    tokens_computed,
)

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

Key = tuple[int, ...]


@dataclass(frozen=True)
class CachedEvaluator:
    """An evaluator that is asked once for each text; see `cached`."""

    inner: Evaluator
    size: int
    start: int = 0
    known: OrderedDict[Key, float] = field(default_factory=OrderedDict, repr=False, compare=False)

    def bind(self, root: Branch) -> CachedEvaluator:
        """Start with an empty cache for a search from `root`."""
        return replace(
            self, inner=bind(self.inner, root), start=root.num_tokens, known=OrderedDict()
        )

    def __call__(self, branches: Sequence[Branch]) -> list[Answer]:
        """Ask only about texts that are not known; failures and values not finite are not kept."""
        keys = [tuple(branch.token_ids[self.start :]) for branch in branches]
        asked = {k: b for k, b in zip(keys, branches, strict=True) if k not in self.known}
        for key in keys:
            if key in self.known:
                self.known.move_to_end(key)
        fresh: dict[Key, Answer] = {}
        if asked:
            fresh = dict(zip(asked, answers(self.inner, list(asked.values())), strict=True))
        found = [fresh[key] if key in fresh else self.known[key] for key in keys]
        self._keep(fresh)
        return found

    def tokens_computed(self) -> int:
        """Tokens computed for the evaluator behind the cache."""
        return tokens_computed(self.inner)

    def _keep(self, fresh: dict[Key, Answer]) -> None:
        for key, answer in fresh.items():
            if not isinstance(answer, Exception) and math.isfinite(answer):
                self.known[key] = answer
        while len(self.known) > self.size:
            self.known.popitem(last=False)


def cached(evaluator: Evaluator, *, size: int = 4096) -> CachedEvaluator:
    """Ask `evaluator` once for each text, by the exact tokens after the search's root.

    Branches with the same tokens share an entry, so a branch costs one evaluation however often the
    search returns to it. Not for evaluators whose answer is drawn at random.

    Args:
        evaluator: what to ask.
        size: values kept; the least recently used goes first.
    """
    if not callable(evaluator):
        raise InvalidArgument(f"evaluator must be callable, got {evaluator!r}")
    whole("size", size, 1)
    return CachedEvaluator(evaluator, size)
