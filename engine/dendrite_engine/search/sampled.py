"""What searches that grow by sampled texts share: how they sample, and outcomes in order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.base import Outcome, Search, State, Trial
from dendrite_engine.search.checks import strings
from dendrite_engine.search.tree import Node

if TYPE_CHECKING:
    from dendrite_engine.sampling_params import SamplingParams


@dataclass(slots=True)
class SampledState(State):
    """State of a search by sampled texts.

    Attributes:
        held: outcomes told before those of trials asked earlier, by trial id.
        failed: trials that left no child.
    """

    held: dict[int, tuple[Trial, Outcome]] = field(default_factory=dict)
    failed: int = 0


S = TypeVar("S", bound=SampledState)


@dataclass(frozen=True, kw_only=True)
class SampledSearch(Search[S]):
    """Base of searches whose every trial samples one child.

    Nodes are made in the order of asking, whatever the order of telling, so equal searches make
    equal trees. That holds an outcome back until those asked before it are told.

    Args:
        stop: strings that end a child; `None` keeps those of `sampling`.
        sampling: how tokens are drawn; `None` for temperature 1. Its `max_tokens` and, where the
            search has one, its `seed` are replaced.
    """

    stop: Sequence[str] | str | None = None
    sampling: SamplingParams | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stop, str):  # as SamplingParams takes it
            object.__setattr__(self, "stop", (self.stop,))
        if self.stop is not None:
            strings("stop", self.stop)

    def _refuse_greedy(self, option: str, count: int) -> None:
        """Sampling that always gives the same text is of no use for several of them.

        Raises:
            InvalidArgument: `count` > 1 texts are wanted at temperature 0.
        """
        if count > 1 and self.sampling is not None and self.sampling.temperature == 0:
            raise InvalidArgument(
                f"sampling.temperature=0 would make all {option}={count} texts the same; use a "
                f"temperature above 0, or {option}=1"
            )

    def _params(self, max_tokens: int) -> SamplingParams:
        sampling = self.sampling
        if sampling is None:
            from dendrite_engine.sampling_params import SamplingParams

            sampling = SamplingParams(temperature=1.0)
        changes: dict[str, Any] = {"max_tokens": max_tokens}
        if self.seed is not None:
            changes["seed"] = self.seed
        if self.stop is not None:
            changes["stop"] = tuple(self.stop)
        return sampling.replace(**changes)

    def _ask_child(self, state: S, node: Node, ordinal: int, params: SamplingParams) -> Trial:
        """A trial for one sampled child."""
        node.attempts += 1
        state.note("select", node, {"path": [n.branch_id for n in node.path()]})
        key = self.node_key(node, ordinal)
        return self.open_trial(state, "expand", node, ordinal=ordinal, params=params, key=key)

    def _in_order(self, state: S, results: Sequence[Outcome]) -> list[tuple[Trial, Outcome]]:
        """Outcomes whose turn has come, in trial order; those told again lose their branch."""
        held = {id(outcome.branch) for _, outcome in state.held.values()}
        fresh = [r for r in results if r.branch is None or id(r.branch) not in held]
        for trial, outcome in self.take_trials(state, fresh):
            state.held[trial.id] = trial, outcome
        first_open = min(state.pending, default=state.next_trial)
        return [state.held.pop(i) for i in sorted(state.held) if i < first_open]

    @staticmethod
    def _grow(state: S, trial: Trial, outcome: Outcome) -> Node | None:
        """The node of an outcome; `None` where nothing came of the trial."""
        if outcome.lost or trial.node.status == "pruned":
            state.failed += 1
            state.tree.orphan(outcome.branch)
            return None
        child = state.tree.add(
            trial.node,
            outcome.token_ids,
            outcome.logprobs,
            branch=outcome.branch,
            ordinal=trial.ordinal,
        )
        child.bonus = trial.node.bonus  # what a person thinks of a node holds for all below it
        child.prior = math.exp(math.fsum(outcome.logprobs))
        child.score = outcome.value
        child.visits, child.value_sum = 1, outcome.value or 0.0
        state.note("expand", trial.node, {"children": [child.branch_id]})
        if outcome.value is not None:
            state.note("evaluate", child, {"values": [outcome.value]})
        return child
