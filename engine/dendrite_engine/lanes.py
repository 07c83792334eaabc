"""Lanes that generate tokens: one by one, and as a group whose arrays serve every step."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dendrite_engine.errors import StaleBranch
from dendrite_engine.grammar.masks import LaneGuide
from dendrite_engine.models.tokenizer import StreamDecoder
from dendrite_engine.sampling import SamplerState, SamplingRows
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.scheduler import Lane, Waiting
from dendrite_engine.tree.branch import Branch, LogitsRow

_ENDS_ON_EOS, _STOP_IDS, _STOP_TEXTS, _PENALTIES, _TOP, _GUIDED = 1, 2, 4, 8, 16, 32


@dataclass(slots=True, eq=False, kw_only=True)
class DecodingLane(Lane):
    """A lane that generates tokens.

    Attributes:
        sampler: sampling state.
        decoder: streaming detokeniser.
        tail: the last characters generated, for stop strings.
        guide: its grammar, or None.
        forced: tokens at the end of the branch that its grammar left no choice for; they are
            reported once the model has said how likely they were.
    """

    sampler: SamplerState
    decoder: StreamDecoder
    tail: str = ""
    guide: LaneGuide | None = None
    forced: list[int] = field(default_factory=list)

    @property
    def params(self) -> SamplingParams:
        """How this lane samples."""
        return self.sampler.params

    @property
    def flags(self) -> int:
        """Which parts of a step concern this lane, as bits."""
        params = self.sampler.params
        return (
            (not params.ignore_eos) * _ENDS_ON_EOS
            + bool(params.stop_token_ids) * _STOP_IDS
            + bool(params.stop) * _STOP_TEXTS
            + params.has_penalties * _PENALTIES
            + bool(params.logprobs) * _TOP
            + (self.guide is not None) * _GUIDED
        )


class LaneGroup:
    """Decoding lanes that advance together; nothing but `left` changes while their set is the same.

    Attributes:
        lanes: the lanes.
        handles: their branch handles, i64 [n].
        ids: ids of their branches, i64 [n].
        left: tokens that each may still generate, i64 [n].
        flags: see `DecodingLane.flags`, u8 [n].
        settings: how they sample; made when it is first asked for, which for new lanes is after
            their first forward pass was launched.
        ends_on_eos: which lanes end with an end-of-turn token, bool [n].
        stop_ids: pairs of (row, id that ends it), i64 [m] and i32 [m]; None where there are none.
        with_stop_texts: rows that a string may end.
        with_penalties: rows whose next token depends on which came before.
        with_top: rows that report alternatives.
        with_guides: rows whose branch has a grammar.
        num_top: most alternatives that a row reports.
    """

    def __init__(
        self,
        lanes: tuple[DecodingLane, ...],
        handles: np.ndarray,
        ids: np.ndarray,
        left: np.ndarray,
        flags: np.ndarray,
        settings: SamplingRows | None = None,
    ) -> None:
        self.lanes = lanes
        self.handles, self.ids, self.left, self.flags = handles, ids, left, flags
        self._settings = settings
        self._present = int(np.bitwise_or.reduce(flags)) if lanes else 0
        self.ends_on_eos = (flags & _ENDS_ON_EOS).view(bool)
        self.stop_ids = self._pair_stop_ids()
        self.with_stop_texts = self._rows_with(_STOP_TEXTS)
        self.with_penalties = self._rows_with(_PENALTIES)
        self.with_top = self._rows_with(_TOP)
        self.with_guides = self._rows_with(_GUIDED)
        self.num_top = max((lanes[row].params.logprobs for row in self.with_top), default=0)

    @classmethod
    def of(cls, lanes: Sequence[DecodingLane]) -> LaneGroup:
        """New lanes as a group. O(n)."""
        return cls(
            tuple(lanes),
            np.array([lane.handle for lane in lanes], np.int64),
            np.array([lane.branch.id for lane in lanes], np.int64),
            np.array([lane.sampler.params.max_tokens for lane in lanes], np.int64),
            np.array([lane.flags for lane in lanes], np.uint8),
        )

    @property
    def settings(self) -> SamplingRows:
        """See above."""
        if self._settings is None:
            self._settings = SamplingRows.of([lane.sampler for lane in self.lanes])
        return self._settings

    def __len__(self) -> int:
        return len(self.lanes)

    def take(self, rows: np.ndarray) -> LaneGroup:
        """A group of the lanes at `rows` i64 [m], in this order; O(m)."""
        return LaneGroup(
            tuple(map(self.lanes.__getitem__, rows.tolist())),
            self.handles.take(rows),
            self.ids.take(rows),
            self.left.take(rows),
            self.flags.take(rows),
            None if self._settings is None else self._settings.take(rows),
        )

    def without(self, gone: Collection[Lane]) -> LaneGroup:
        """A group of the lanes that are not in `gone`; O(n)."""
        kept = [row for row, lane in enumerate(self.lanes) if lane not in gone]
        if len(kept) == len(self.lanes):
            return self
        return self.take(np.array(kept, np.int64)) if kept else _NOBODY

    def joined(self, other: LaneGroup) -> LaneGroup:
        """These lanes and then those of `other`."""
        if not self.lanes or not other.lanes:
            return self if self.lanes else other
        return LaneGroup(
            self.lanes + other.lanes,
            np.concatenate((self.handles, other.handles)),
            np.concatenate((self.ids, other.ids)),
            np.concatenate((self.left, other.left)),
            np.concatenate((self.flags, other.flags)),
            self.settings.joined(other.settings),
        )

    def _pair_stop_ids(self) -> tuple[np.ndarray, np.ndarray] | None:
        pairs = [
            (row, token_id)
            for row in self._rows_with(_STOP_IDS)
            for token_id in self.lanes[row].params.stop_token_ids
        ]
        if not pairs:
            return None
        rows, ids = zip(*pairs, strict=True)
        return np.array(rows, np.int64), np.array(ids, np.int32)

    def _rows_with(self, flag: int) -> list[int]:
        if not self._present & flag:
            return []
        rows: list[int] = (self.flags & flag).nonzero()[0].tolist()
        return rows


_NOBODY = LaneGroup.of(())  # groups without lanes are all alike


class KeptLogits:
    """Branches that keep logits between jobs: the last so many; older ones recompute one row.

    By weak reference: a branch knows its engine, whose thread must not keep it alive.
    """

    def __init__(self, limit: int = 256) -> None:
        self._limit = limit
        self._branches: deque[weakref.ref[Branch]] = deque()

    def add(self, branch: Branch) -> None:
        """`branch` has logits to keep."""
        self._branches.append(weakref.ref(branch))
        if len(self._branches) > self._limit:
            oldest = self._branches.popleft()
            old = oldest()
            if old is not None and oldest not in self._branches and not old._busy:
                old._logits = None


def kept_logits(lane: Lane, core: Any) -> LogitsRow | None:
    """The lane's next-token logits, when they belong to what the branch holds now."""
    logits = lane.branch._logits
    if logits is None or not logits.is_current:
        return None
    try:
        held = core.num_tokens(lane.handle)
    except StaleBranch:
        return None
    return logits if logits.num_tokens == held else None


class Roster:
    """The lanes that need a forward pass; `waiting` lists the group and then the probes.

    Attributes:
        group: decoding lanes.
        probes: lanes that only want logits.
    """

    def __init__(self) -> None:
        self.group = _NOBODY
        self.probes: tuple[Lane, ...] = ()
        self._waiting: Waiting | None = None

    def __len__(self) -> int:
        return len(self.group.lanes) + len(self.probes)

    @property
    def waiting(self) -> Waiting:
        """All of them: the same object as long as they are the same."""
        if self._waiting is None:
            lanes, handles = self.group.lanes, self.group.handles
            if self.probes:
                probes = np.array([lane.handle for lane in self.probes], np.int64)
                handles = np.concatenate((handles, probes))
            self._waiting = Waiting((*lanes, *self.probes), handles)
        return self._waiting

    def add(self, group: LaneGroup, probes: Sequence[Lane]) -> None:
        """Put lanes behind those that are there."""
        if not (group.lanes or probes):
            return
        self.group = self.group.joined(group)
        self.probes += tuple(probes)
        self._waiting = None

    def remove(self, gone: Collection[Lane]) -> None:
        """Take out those of `gone` that are in it."""
        self.group = self.group.without(gone)
        self.probes = tuple(lane for lane in self.probes if lane not in gone)
        self._waiting = None

    def places_in(self, group: LaneGroup) -> np.ndarray:
        """Places of the group's lanes in an earlier group that had all of them, i64 [n]."""
        if self.group.lanes is group.lanes:
            return np.arange(len(group))
        places = {lane: place for place, lane in enumerate(group.lanes)}
        return np.array([places[lane] for lane in self.group.lanes], np.int64)

    def order_by(self, rows: np.ndarray) -> np.ndarray | None:
        """Sort the group by its rows of logits, so that logits can be read as they are from then
        on; returns the order i64 [n], or None where it is sorted or some lanes share a row.
        """
        in_order = np.arange(len(rows))
        if np.array_equal(rows, in_order):
            return None
        order = rows.argsort(kind="stable")
        if not np.array_equal(rows[order], in_order):
            return None
        self.group = self.group.take(order)
        self._waiting = None
        return order
