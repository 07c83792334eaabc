"""Tokens of a step on their way: while they are sampled, and until they are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from dendrite_engine.guided import ForcedRows, ForcedRun
from dendrite_engine.lanes import DecodingLane, LaneGroup
from dendrite_engine.sampling import PendingTokens
from dendrite_engine.scheduler import Lane
from dendrite_engine.types import FinishReason


@dataclass(frozen=True, slots=True)
class Launch:
    """Tokens of a group that are being sampled.

    Attributes:
        group: the lanes.
        held: tokens that each branch held when its logits were computed, i32 [n].
        tokens: what comes out of it.
        top: (ids, log-probabilities) of the alternatives of the lanes that report any, or None.
        forced: tokens without a choice that the pass spoke about; they come behind the lanes' own.
    """

    group: LaneGroup
    held: np.ndarray
    tokens: PendingTokens
    top: PendingTokens | None
    forced: ForcedRows | None = None


@dataclass(slots=True)
class Drawn:
    """Tokens that were appended and are not reported yet.

    Attributes:
        lanes: the lanes that got a token.
        tokens: i32 [n], logprobs f32 [n].
        logprobs: see tokens.
        reasons: row -> why it ended with this token.
        texts: row -> text of the token, where it had to be known to decide.
        top: row -> (ids, log-probabilities) of the most likely tokens.
        refused: lanes that got none and end.
        forced: tokens that came before these without a choice.
        forced_top: alternatives to them, by lane and place in its run.
    """

    lanes: Sequence[DecodingLane]
    tokens: np.ndarray
    logprobs: np.ndarray
    reasons: dict[int, FinishReason] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    top: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    refused: list[tuple[DecodingLane, FinishReason, Exception | None]] = field(default_factory=list)
    forced: list[ForcedRun] = field(default_factory=list)
    forced_top: dict[tuple[Lane, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def ended(self) -> set[Lane]:
        """Lanes that do not go on."""
        return {self.lanes[row] for row in self.reasons} | {lane for lane, _, _ in self.refused}


def rows_of_top(
    launch: Launch, ids: np.ndarray, values: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Alternatives by row: of the lanes first, of forced tokens behind them."""
    rows = list(launch.group.with_top)
    if launch.forced is not None:
        count = len(launch.group)
        rows += [count + i for i, lane in enumerate(launch.forced.lanes) if lane.params.logprobs]
    return {row: (ids[i], values[i]) for i, row in enumerate(rows)}


def forced_top(
    forced: ForcedRows, count: int, top: dict[int, tuple[np.ndarray, np.ndarray]]
) -> dict[tuple[Lane, int], tuple[np.ndarray, np.ndarray]]:
    """Alternatives to forced tokens by lane and place in its run; `count` rows come before."""
    found: dict[tuple[Lane, int], tuple[np.ndarray, np.ndarray]] = {}
    places: dict[Lane, int] = {}
    for i, lane in enumerate(forced.lanes):
        place = places.get(lane, 0)
        places[lane] = place + 1
        if count + i in top:
            found[lane, place] = top[count + i]
    return found
