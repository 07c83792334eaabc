"""Diverse beam search: groups of beams that avoid each other's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.beam_groups import GroupedBeam
from dendrite_engine.search.checks import number, whole


@dataclass(frozen=True, kw_only=True)
class DiverseBeam(GroupedBeam):
    """Diverse beam search: `groups` beam searches of `width / groups` beams that avoid each other.

    In each step the groups choose one after the other. A group ranks the continuations of its beams
    by their sum of log-probabilities, less `diversity` for every time that an earlier group chose
    the same token in this step:

        key(y, t) = log p(y t) - diversity * #{beams of earlier groups that chose t in this step}

    (Vijayakumar et al., "Diverse Beam Search", 2016, with Hamming diversity.) The penalty decides
    who goes on and nothing more: sums of log-probabilities, scores and stopping rules are those of
    beam search within the group. One group, or a diversity of 0 in the first, is plain beam search.
    All groups share each forward. `SearchResult.found` has the hypotheses of all groups.

    Args:
        width: beams of all groups together.
        groups: how many groups; it divides `width`.
        diversity: what a token loses for each beam of an earlier group that chose it, in nats.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "diverse-beam"
    live_options: ClassVar[frozenset[str]] = GroupedBeam.live_options | {"diversity"}

    groups: int = 2
    diversity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("groups", self.groups, 1)
        number("diversity", self.diversity, 0)
        if self.width % self.groups:
            raise InvalidArgument(
                f"groups={self.groups} must divide width={self.width}; all groups are of one size"
            )

    def _widths(self) -> list[int]:
        return [self.width // self.groups] * self.groups

    def _penalty(self, times: int) -> float:
        return self.diversity * times
