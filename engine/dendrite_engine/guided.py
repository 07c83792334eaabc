"""Lanes with a grammar: masks in time, tokens read, and runs that the grammar leaves no choice for.

A **forced run** is appended at once and computed as one extend, instead of one forward pass for
each token. Its tokens are those that masked decoding gives, for the mask allows only them; their
log-probabilities come out of the same pass, which is asked for the logits of every row of the run.
A run stops before a token that may end its lane, so that ends are decided in one place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dendrite_engine.errors import DeadEnd, OutOfPages, StaleBranch
from dendrite_engine.forward import Extra, Wanted
from dendrite_engine.grammar.masks import LaneGuide, MaskFiller
from dendrite_engine.lanes import DecodingLane, LaneGroup
from dendrite_engine.sampling import SamplerState, SamplingRows
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.trace import Trace
from dendrite_engine.types import FinishReason

_CALM_STEPS = 8  # no pass is launched ahead until so many steps went by without a forced run
_PLAIN = SamplerState(SamplingParams(), 0, 0, masked=True)  # a mask of one token decides anyway


@dataclass(frozen=True, slots=True)
class ForcedRows:
    """Forced tokens whose logits a forward pass gave.

    Attributes:
        lanes: the lane of each token, in the order of their tokens.
        tokens: i32 [m].
        rows: row of the logits that speak about each, i64 [m].
    """

    lanes: Sequence[DecodingLane]
    tokens: np.ndarray
    rows: np.ndarray


class ForcedRun(NamedTuple):
    """Forced tokens of one lane to be reported, with their log-probabilities (NaN: unknown)."""

    lane: DecodingLane
    tokens: list[int]
    logprobs: list[float]


class Guided:
    """What the decoder does for lanes with a grammar; used by the engine thread only.

    Attributes:
        tokens_forced: tokens appended because there was no choice.
        filler: the masks.
    """

    def __init__(
        self, core: Any, trace: Trace, filler: MaskFiller, is_eos: np.ndarray, max_context: int
    ) -> None:
        self._core, self._trace, self.filler = core, trace, filler
        self._is_eos, self._max_context = is_eos, max_context
        self._new: list[LaneGuide] = []  # their masks were not asked for yet
        self._forcing: list[DecodingLane] = []  # lanes with forced tokens to be reported
        self._calm = _CALM_STEPS
        self.tokens_forced = 0

    def open(self, branch: Any) -> LaneGuide | None:
        """The guide of a branch that starts to generate; None where it has no grammar."""
        guide = self.filler.open(branch)
        if guide is not None:
            self._new.append(guide)
        return guide

    def reopen(self, lane: DecodingLane) -> None:
        """The branch changed while its token was being drawn."""
        if lane.guide is not None:
            self.filler.close(lane.guide, lane.branch)
            self._forget(lane)
            lane.guide = self.open(lane.branch)

    def release(self, lane: DecodingLane) -> None:
        """The lane has ended: the branch keeps what its matcher knows."""
        if lane.guide is not None:
            self.take_back(lane)
            self.filler.close(lane.guide, lane.branch)
            lane.guide = None

    def take_back(self, lane: DecodingLane) -> None:
        """Drop forced tokens that were never reported from a branch whose lane ends before."""
        if lane.forced and lane.branch.is_alive:
            try:
                self._core.rollback(lane.handle, len(lane.forced))
                held = self._core.num_tokens(lane.handle)
            except StaleBranch:
                return
            lane.branch._logits = None
            self._trace.append("rollback", lane.branch.id, {"to": held})
        self._forget(lane)

    def _forget(self, lane: DecodingLane) -> None:
        lane.forced = []
        if lane in self._forcing:
            self._forcing.remove(lane)

    # -- before and behind a forward pass -----------------------------------------------------

    def prepare(self) -> list[Wanted]:
        """Start what can be done while the next forward pass runs; returns rows that it is asked
        for on top of the last of each lane.
        """
        if self._new:
            new, self._new = self._new, []
            self.filler.start(new)
        wanted = []
        for lane in self._forcing:
            try:
                held = self._core.num_tokens(lane.handle)
            except StaleBranch:
                continue
            wanted.append(Wanted(lane.handle, held - len(lane.forced) - 1, len(lane.forced)))
        return wanted

    def masks(self, group: LaneGroup) -> np.ndarray | None:
        """Masks of the group's lanes that have one, i32 [m, words]; None where none has."""
        if not group.with_guides:
            return None
        if self._new:
            self.prepare()
        guides = [guide for row in group.with_guides if (guide := group.lanes[row].guide)]
        return self.filler.take(guides)

    def forced_rows(self, extra: Sequence[Extra]) -> ForcedRows | None:
        """Which forced tokens a pass gave logits for."""
        rows_of = dict(extra)
        lanes: list[DecodingLane] = []
        tokens: list[int] = []
        found: list[int] = []
        for lane in self._forcing:
            rows = rows_of.get(lane.handle)
            for token, row in zip(lane.forced, () if rows is None else rows.tolist(), strict=False):
                if row < 0:
                    break  # a later pass computes the rest
                lanes.append(lane)
                tokens.append(token)
                found.append(row)
        if not lanes:
            return None
        return ForcedRows(lanes, np.array(tokens, np.int32), np.array(found, np.int64))

    def with_forced(
        self, settings: SamplingRows, masks: np.ndarray | None, forced: ForcedRows
    ) -> tuple[SamplingRows, np.ndarray]:
        """Settings and masks of a step with rows for forced tokens behind those of its lanes."""
        count = len(forced.tokens)
        single = np.zeros((count, self.filler.words), np.int32)
        single.view(np.uint32)[np.arange(count), forced.tokens // 32] = np.uint32(1) << (
            forced.tokens % 32
        ).astype(np.uint32)
        joined = settings.joined(SamplingRows.of([_PLAIN] * count))
        return joined, single if masks is None else np.concatenate((masks, single))

    def settle(
        self, group: LaneGroup, forced: ForcedRows | None, logprobs: np.ndarray
    ) -> list[ForcedRun]:
        """Write the log-probabilities of forced tokens to their branches; returns what is to be
        reported.

        A lane that is about to be given its next token can't wait any longer: where another branch
        computed a token first, so that no row of this pass speaks about it, its log-probability
        stays unknown.

        Args:
            group: lanes that get their next token now.
            forced: forced tokens that the pass spoke about.
            logprobs: of these, f32 [m].
        """
        known: dict[DecodingLane, list[float]] = {}
        if forced is not None:
            for lane, value in zip(forced.lanes, logprobs.tolist(), strict=True):
                known.setdefault(lane, []).append(value)
        for row in group.with_guides:
            lane = group.lanes[row]
            if lane.forced:
                values = known.setdefault(lane, [])
                values += [math.nan] * (len(lane.forced) - len(values))
        return [self._settle(lane, values) for lane, values in known.items()]

    def _settle(self, lane: DecodingLane, values: list[float]) -> ForcedRun:
        count = len(values)
        try:
            first = self._core.num_tokens(lane.handle) - len(lane.forced)
            self._core.set_logprobs(lane.handle, first, np.array(values, np.float32))
        except StaleBranch:
            pass  # the step that follows ends the lane
        run = ForcedRun(lane, lane.forced[:count], values)
        lane.forced = lane.forced[count:]
        if not lane.forced:
            self._forget(lane)
        return run

    # -- tokens that were drawn ---------------------------------------------------------------

    def read(self, group: LaneGroup, tokens: np.ndarray) -> np.ndarray:
        """Tell the grammars which tokens their branches were given; returns which are complete,
        bool [n].
        """
        complete = np.zeros(len(group), bool)
        for row in group.with_guides:
            guide = group.lanes[row].guide
            if guide is not None:
                guide.accept([int(tokens[row])])
                complete[row] = guide.is_finished
        return complete

    def go_on(self, group: LaneGroup, ended: Collection[int], held: np.ndarray) -> int:
        """Append forced runs to lanes that have not ended, and start filling their next masks;
        returns how many tokens were appended.

        Args:
            group: the lanes; their `left` counts down with what is appended.
            ended: rows that got their last token.
            held: tokens of each branch before this step's, i32 [n].
        """
        count, waiting = 0, []
        for row in group.with_guides:
            lane = group.lanes[row]
            if row in ended or lane.guide is None:
                continue
            run = self._run(lane, int(group.left[row]), int(held[row]) + 1)
            if run and self._append(lane, run):
                group.left[row] -= len(run)
                count += len(run)
            waiting.append(lane.guide)
        self._calm = 0 if count else self._calm + 1
        self.tokens_forced += count
        if waiting:
            self.filler.start(waiting)
        return count

    @property
    def is_calm(self) -> bool:
        """Whether the next step can be foreseen: no run was forced lately."""
        return self._calm >= _CALM_STEPS

    def _run(self, lane: DecodingLane, left: int, held: int) -> list[int]:
        """What can be appended to the lane's branch of `held` tokens without a choice."""
        guide, params = lane.guide, lane.params
        if guide is None or params.stop:  # a stop text may end inside a run: see token by token
            return []
        room = min(left - 1, self._max_context - 1 - held)
        if room <= 0:
            return []
        bias = params.logit_bias or {}
        run = []
        for token in guide.forced()[:room]:
            forbidden = bias.get(token, 0.0) == -math.inf
            if self._is_eos[token] or token in params.stop_token_ids or forbidden:
                break
            run.append(token)
        return run

    def _append(self, lane: DecodingLane, run: list[int]) -> bool:
        guide = lane.guide
        if guide is None:
            return False
        guide.accept(run)
        if guide.is_finished:  # its last token ends the lane: leave it to the draw
            guide.take_back(1)
            run.pop()
        if not run or guide.failure is not None:
            return False
        try:
            self._core.append(lane.handle, run, None)
        except (OutOfPages, StaleBranch):  # token by token, as far as that goes
            guide.take_back(len(run))
            return False
        for token in run:
            lane.sampler.accept(token)
        lane.forced = run
        self._forcing.append(lane)
        data = {"tokens": list(run), "logprobs": None, "forced": True}
        self._trace.append("extend", lane.branch.id, data)
        return True

    def verdict(self, lane: DecodingLane) -> tuple[FinishReason, Exception | None] | None:
        """Why the lane's mask let nothing through; None where the mask is not to blame."""
        guide = lane.guide
        if guide is None:
            return None
        branch_id = lane.branch.id
        if guide.failure is not None:
            reason: FinishReason = (
                "dead_end" if isinstance(guide.failure, DeadEnd) else "grammar_error"
            )
            kind = type(guide.failure)
            return reason, kind(f"branch {branch_id}: {guide.failure}")
        if guide.is_finished:
            return "stop", None
        bias = lane.params.logit_bias or {}
        if bias and all(bias.get(int(t), 0.0) == -math.inf for t in self.filler.allowed(guide)):
            error = DeadEnd(f"branch {branch_id}: logit_bias forbids all that its grammar allows")
            return "dead_end", error
        return None

    def close(self) -> None:
        """End the thread that fills masks."""
        self.filler.shut()


def top_allowed(row: torch.Tensor, allowed: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The most likely of the allowed tokens: ids i32 [<= k] and log-probabilities under the
    unmodified model f32 [<= k], likely first, then by id.

    Args:
        row: logits fp32 [vocab].
        allowed: token ids, increasing, i32 [n].
        k: how many.
    """
    values = torch.log_softmax(row.double(), 0).cpu().numpy()[allowed]
    order = np.argsort(-values, kind="stable")[:k]
    return allowed[order], values[order].astype(np.float32)
