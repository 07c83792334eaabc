"""DVTS, diverse verifier tree search: greedy search in independent subtrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dendrite_engine.search.checks import whole
from dendrite_engine.search.steps import StepSearch, StepState
from dendrite_engine.search.tree import Node


@dataclass(frozen=True, kw_only=True)
class DVTS(StepSearch):
    """Diverse verifier tree search: `subtrees` searches that never compete, each greedy.

    The root samples `subtrees * branching` steps, `branching` for each subtree. In every round each
    subtree keeps the step that is ranked highest among its own and samples `branching` below it, so
    a round costs `branching` times the subtrees that go on. A subtree ends with a complete text;
    the best of these is the result. (Beeching, Tunstall & Rush, "Scaling test-time compute with
    open models", Hugging Face 2024.)

    Args:
        subtrees: independent searches (there: N / M beams).
        branching: steps sampled in a subtree and round (there: M).

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "dvts"

    subtrees: int = 4
    branching: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("subtrees", self.subtrees, 1)
        whole("branching", self.branching, 1)
        self._refuse_greedy("branching", max(self.subtrees, self.branching))

    def _first(self) -> int:
        return self.subtrees * self.branching

    def _choose(self, state: StepState, children: list[Node]) -> list[tuple[Node, int]]:
        families: dict[int, list[Node]] = {}
        for node in children:
            state.subtree[node.id] = number = self._subtree_of(state, node)
            families.setdefault(number, []).append(node)
        chosen: list[tuple[Node, int]] = []
        for number in sorted(families):
            best = self._ranked(state, families[number])[0]
            if best.status == "terminal":
                self._complete(state, best)
            else:
                chosen.append((best, self.branching))
        return chosen

    def _subtree_of(self, state: StepState, node: Node) -> int:
        parent = node.parent
        if parent is None or parent.parent is None:
            return node.ordinal // self.branching
        return state.subtree[parent.id]
