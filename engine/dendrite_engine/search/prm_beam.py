"""PRM-guided beam search: the best steps of all beams go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.search.checks import whole
from dendrite_engine.search.steps import StepSearch, StepState
from dendrite_engine.search.tree import Node


@dataclass(frozen=True, kw_only=True)
class PRMBeam(StepSearch):
    """Beam search over steps: of all children of a round, the `width` ranked highest go on.

    Every beam samples `branching` steps (the root samples `width * branching`). A complete text
    among the best keeps one of the `width` places, and the search ends when all places are taken or
    nothing is left to expand. Of children that are token for token the same only the first can be
    chosen. (Snell et al., "Scaling LLM Test-Time Compute Optimally can be More Effective than
    Scaling Model Parameters", 2024.)

    Args:
        width: beams.
        branching: steps sampled below each.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "prm-beam"

    width: int = 4
    branching: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("width", self.width, 1)
        whole("branching", self.branching, 1)
        self._refuse_greedy("branching", max(self.width, self.branching))

    def _first(self) -> int:
        return self.width * self.branching

    def _choose(self, state: StepState, children: list[Node]) -> list[tuple[Node, int]]:
        places = self.width - len(state.finished)
        chosen: list[tuple[Node, int]] = []
        seen: set[tuple[int, ...]] = set()
        for node in self._ranked(state, children):
            text = tuple(state.tree.tokens(node))
            if text in seen or places == 0:
                continue
            seen.add(text)
            places -= 1
            if node.status == "terminal":
                self._complete(state, node)
            else:
                chosen.append((node, self.branching))
        return chosen
