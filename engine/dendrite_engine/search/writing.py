"""Base of the searches whose children are sampled runs of tokens: thoughts, steps, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dendrite_engine.search.base import ENDED, Outcome, S, Search
from dendrite_engine.search.checks import strings, whole

if TYPE_CHECKING:
    from dendrite_engine.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class WritingSearch(Search[S]):
    """Options that say how a child's tokens are sampled.

    Args:
        tokens_per_node: tokens of a child, at most; fewer where its text or thought ends.
        stop: strings that end the text, so that the node is terminal; `None` keeps those of
            `sampling`. A string that spans two nodes is not seen.
        thought_stop: strings that end the child and not the text, such as a line break: a child is
            then one thought, however long, up to `tokens_per_node`.
        sampling: how tokens are drawn; `None` for temperature 1.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    tokens_per_node: int = 16
    stop: Sequence[str] | str | None = None
    thought_stop: Sequence[str] | str = ()
    sampling: SamplingParams | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("tokens_per_node", self.tokens_per_node, 1)
        for name in ("stop", "thought_stop"):
            value = getattr(self, name)
            if isinstance(value, str):  # as SamplingParams takes it
                object.__setattr__(self, name, (value,))
            if value is not None:
                strings(name, getattr(self, name))

    @property
    def is_greedy(self) -> bool:
        """Whether every sampled child of a node would be the same."""
        return self.sampling is not None and self.sampling.temperature == 0

    def sampling_for(self, max_tokens: int, *, thought: bool = True) -> SamplingParams:
        """How to sample a run of at most `max_tokens`; with `thought` it ends with a thought."""
        sampling = self.sampling
        if sampling is None:
            from dendrite_engine.sampling_params import SamplingParams

            sampling = SamplingParams(temperature=1.0)
        changes: dict[str, Any] = {"max_tokens": max_tokens}
        if self.seed is not None:
            changes["seed"] = self.seed
        stops = tuple(sampling.stop) if self.stop is None else tuple(self.stop)
        if thought:
            stops += tuple(text for text in self.thought_stop if text not in stops)
        return sampling.replace(**changes, stop=stops)

    def ends_text(self, outcome: Outcome) -> bool:
        """Whether the text is complete, not just the thought. O(length of the text)."""
        if outcome.finish_reason != "stop":
            return outcome.finish_reason in ENDED
        stops = self.stop if self.stop is not None else self.sampling and self.sampling.stop
        ended = any(text in outcome.text for text in stops or ())
        return ended or not any(text in outcome.text for text in self.thought_stop)
