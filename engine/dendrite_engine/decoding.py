"""From logits to tokens: samples a batch of branches, appends, and decides who has ended.

A step has two halves. `begin` and `draw` are what the next forward pass waits for: sample, append,
and find the lanes that end, with arrays over all lanes. `report` is what users wait for: text,
events and results; with a device it runs while the device computes the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dendrite_engine.drawn import Drawn, Launch, forced_top, rows_of_top
from dendrite_engine.errors import NumericError, OutOfPages, StaleBranch
from dendrite_engine.forward import Extra
from dendrite_engine.grammar.guide import allowed_ids
from dendrite_engine.grammar.masks import MaskFiller
from dendrite_engine.guided import ForcedRun, Guided, top_allowed
from dendrite_engine.jobs import Job
from dendrite_engine.lanes import DecodingLane, LaneGroup
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_engine.sampling import SamplerState, TokenSampler
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.scheduler import Lane
from dendrite_engine.trace import Trace
from dendrite_engine.types import FinishReason, TokenAlternative, TokenEvent

# Status codes of TreeCore.append_batch, and one more: there was no token to append.
_OUT_OF_PAGES, _STALE, _CHANGED, NOT_FINITE = 1, 2, 3, 4


class Decoder:
    """Turns logits into tokens for all lanes of a step at once.

    Attributes:
        tokens_generated: tokens sampled so far, and those that a grammar forced.
        max_context: tokens that a branch may hold.
        vocab_size: ids below it are tokens.
        guided: what concerns lanes with a grammar.
    """

    def __init__(
        self,
        core: Any,
        sampler: TokenSampler,
        tokenizer: Tokenizer,
        trace: Trace,
        *,
        eos_ids: Sequence[int],
        max_context: int,
        seed: int,
        mask_seconds: float = 1.0,
    ) -> None:
        self._core, self._sampler = core, sampler
        self._tokenizer, self._trace = tokenizer, trace
        self._is_eos = np.zeros(sampler.vocab_size, bool)
        self._is_eos[[token for token in eos_ids if token < sampler.vocab_size]] = True
        self.max_context, self._seed = max_context, seed
        self.vocab_size = sampler.vocab_size
        filler = MaskFiller(sampler.vocab_size, mask_seconds)
        self.guided = Guided(core, trace, filler, self._is_eos, max_context)
        self.tokens_generated = 0

    def open_lane(self, job: Job, index: int, params: SamplingParams, arrival: int) -> DecodingLane:
        """The lane of one branch of a generating job."""
        branch = job.branches[index]
        seed = self._seed if params.seed is None else params.seed
        guide = self.guided.open(branch)
        lane = DecodingLane(
            job,
            index,
            branch,
            branch._handle,
            arrival,
            sampler=SamplerState(params, seed, branch.path_key, masked=guide is not None),
            decoder=self._tokenizer.stream(),
            guide=guide,
        )
        if params.has_penalties:
            self._load_context(lane)
        return lane

    def _load_context(self, lane: DecodingLane) -> None:
        """Penalties look at what the branch holds: all ids, and counts of generated ones."""
        try:
            ids = self._core.tokens(lane.handle)
            logprobs = self._core.logprobs(lane.handle)
        except StaleBranch:
            return  # the step that follows ends the lane as stale
        size = min(len(ids), len(logprobs))  # it may grow in between
        lane.sampler.load(ids[:size], ~np.isnan(logprobs[:size]))

    def release(self, lane: Lane) -> None:
        """A lane has ended: its branch is free again."""
        if isinstance(lane, DecodingLane):
            self.guided.release(lane)
        lane.branch._busy = False

    def top(
        self, logits: torch.Tensor, rows: np.ndarray, wanted: Sequence[tuple[Lane, Any]]
    ) -> list[list[TokenAlternative]]:
        """The most likely next tokens of the rows i64 [n] of logits fp32 [R, vocab], as many as
        the job of each lane of `wanted` asks for; of a branch with a grammar those that it allows.
        """
        lanes = [lane for lane, _ in wanted]
        k = max(lane.job.top_k for lane in lanes)
        ids, values = self._sampler.begin_top(logits, rows, k).wait()
        found = []
        for row, lane in enumerate(lanes):
            mask, best = lane.job.masks[lane.index], (ids[row], values[row])
            if mask is not None:
                allowed = allowed_ids(mask, logits.shape[1])
                best = top_allowed(logits[int(rows[row])], allowed, k)
            found.append(self._alternatives(*best)[: lane.job.top_k])
        return found

    # -- what the next forward pass waits for -------------------------------------------------

    def begin(
        self,
        group: LaneGroup,
        logits: torch.Tensor,
        rows: np.ndarray,
        held: np.ndarray,
        extra: Sequence[Extra] = (),
    ) -> Launch:
        """Start sampling one token for each lane.

        Args:
            group: the lanes.
            logits: fp32 [R, vocab].
            rows: row of each lane in logits, i64 [n].
            held: tokens that each branch held when they were computed, i32 [n].
            extra: rows of the logits that speak about tokens without a choice.
        """
        forced = self.guided.forced_rows(extra) if extra else None
        top, with_top, num_top = None, list(group.with_top), group.num_top
        settings, masks, every = group.settings, self.guided.masks(group), rows
        if forced is not None:
            wanting = [i for i, lane in enumerate(forced.lanes) if lane.params.logprobs]
            with_top += [len(rows) + i for i in wanting]
            num_top = max([num_top, *(forced.lanes[i].params.logprobs for i in wanting)])
            settings, masks = self.guided.with_forced(settings, masks, forced)
            every = np.concatenate((rows, forced.rows))
            held = np.concatenate((held, np.zeros(len(forced.rows), np.int32)))
        if with_top:
            top = self._sampler.begin_top(logits, every[with_top], num_top)
        if masks is None:
            tokens = self._sampler.begin(logits, every, settings, held)
        else:
            tokens = self._sampler.begin(logits, every, settings, held, masks)
        return Launch(group, held[: len(rows)], tokens, top, forced)

    def going_on(self, launch: Launch) -> np.ndarray:
        """Which lanes need another token after this one, unless the token itself ends them; none
        where a grammar is likely to append several at once.
        """
        if launch.group.with_guides and not self.guided.is_calm:
            return np.zeros(len(launch.group), bool)
        goes_on: np.ndarray = (launch.group.left > 1) & (launch.held < self.max_context - 1)
        return goes_on

    def draw(self, launch: Launch) -> Drawn:
        """Wait for the tokens, append them and decide which lanes have ended.

        A branch that changed since its logits were computed gets no token and goes on.
        """
        group, held, count = launch.group, launch.held, len(launch.group)
        tokens, logprobs = launch.tokens.wait()
        top = {} if launch.top is None else rows_of_top(launch, *launch.top.wait())
        runs: list[ForcedRun] = []
        if launch.forced is not None or group.with_guides:
            runs = self.guided.settle(group, launch.forced, logprobs[count:])
        drawn = self._append(group, tokens[:count], logprobs[:count], held, top)
        drawn.forced = runs
        if launch.forced is not None:
            drawn.forced_top = forced_top(launch.forced, count, top)
        return drawn

    def _append(
        self,
        group: LaneGroup,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        held: np.ndarray,
        top: dict[int, tuple[np.ndarray, np.ndarray]],
    ) -> Drawn:
        if not np.count_nonzero(tokens < 0):
            status = self._core.append_batch(group.handles, tokens, logprobs, held)
        else:
            status = np.full(len(tokens), NOT_FINITE, np.uint8)
            good = np.flatnonzero(tokens >= 0)
            status[good] = self._core.append_batch(
                group.handles[good], tokens[good], logprobs[good], held[good]
            )
        if not np.count_nonzero(status):
            return self.accept(group, tokens, logprobs, held, top)
        good = np.flatnonzero(status == 0)
        some = group.take(good)
        top = {row: top[old] for row, old in enumerate(good.tolist()) if old in top}
        drawn = self.accept(some, tokens[good], logprobs[good], held[good], top)
        group.left[good] = some.left
        for row in np.flatnonzero(status).tolist():
            self.refuse(drawn, group, row, int(status[row]))
        return drawn

    def count_taken(self, lane: DecodingLane, tokens: Sequence[int], held: int, left: int) -> int:
        """How many of these tokens the lane takes, one after the other: up to the one that ends it,
        which is the same one as in `_find_ended`. Nothing changes.

        Args:
            lane: the lane.
            tokens: what it would get.
            held: tokens that its branch holds before.
            left: tokens that it may still generate, at least 1.
        """
        params = lane.params
        decoder = lane.decoder.copy() if params.stop else None
        tail = lane.tail
        most = min(left, self.max_context - held, len(tokens))
        for count, token in enumerate(tokens[:most], start=1):
            ends = token in params.stop_token_ids
            ends |= bool(self._is_eos[token]) and not params.ignore_eos
            if decoder is not None:
                text = decoder.push(token)
                tail += text
                ends |= bool(text) and any(stop in tail for stop in params.stop)
                tail = tail[-max(map(len, params.stop)) :]
            if ends:
                return count
        return most

    def accept(
        self,
        group: LaneGroup,
        tokens: np.ndarray,
        logprobs: np.ndarray,
        held: np.ndarray,
        top: dict[int, tuple[np.ndarray, np.ndarray]],
    ) -> Drawn:
        """Account for appended tokens."""
        if len(tokens):
            self._trace.append_tokens(group.ids, tokens, logprobs)
        self.tokens_generated += len(tokens)
        group.left -= 1
        for row in group.with_penalties:
            group.lanes[row].sampler.accept(int(tokens[row]))
        drawn = Drawn(group.lanes, tokens, logprobs, top=top)
        if not group.with_guides:
            self._find_ended(drawn, group, held, None)
            return drawn
        self._find_ended(drawn, group, held, self.guided.read(group, tokens))
        self.tokens_generated += self.guided.go_on(group, drawn.reasons, held)
        return drawn

    def _find_ended(
        self, drawn: Drawn, group: LaneGroup, held: np.ndarray, complete: np.ndarray | None
    ) -> None:
        """Fill `reasons`; of several the first counts: eos, stop, length, context_full.

        Args:
            drawn: whose reasons.
            group: its lanes.
            held: tokens of their branches before these, i32 [n].
            complete: which grammars allow nothing more, bool [n].
        """
        eos = self._is_eos.take(drawn.tokens) & group.ends_on_eos
        stopped = self._stopped(drawn, group)
        if complete is not None:
            stopped = complete if stopped is None else stopped | complete
        length, full = group.left <= 0, held >= self.max_context - 1
        ended = eos | length | full
        if stopped is not None:
            ended |= stopped
        if not np.count_nonzero(ended):  # as in most steps
            return
        causes: tuple[tuple[np.ndarray | None, FinishReason], ...] = (
            (eos, "eos"), (stopped, "stop"), (length, "length"), (full, "context_full"),
        )  # fmt: skip
        for cause, reason in causes:
            for row in () if cause is None else np.flatnonzero(cause).tolist():
                drawn.reasons.setdefault(row, reason)

    def _stopped(self, drawn: Drawn, group: LaneGroup) -> np.ndarray | None:
        """Which rows end by a stop id or a stop string, bool [n]."""
        if group.stop_ids is None and not group.with_stop_texts:
            return None
        stopped = np.zeros(len(group), bool)
        if group.stop_ids is not None:
            rows, ids = group.stop_ids
            stopped[rows[drawn.tokens[rows] == ids]] = True
        for row in group.with_stop_texts:
            lane = group.lanes[row]
            text = drawn.texts[row] = lane.decoder.push(int(drawn.tokens[row]))
            lane.tail += text
            if text and any(stop in lane.tail for stop in lane.params.stop):
                stopped[row] = True
            lane.tail = lane.tail[-max(map(len, lane.params.stop)) :]
        return stopped

    def refuse(self, drawn: Drawn, group: LaneGroup, row: int, status: int) -> None:
        """A lane that got no token: it ends, unless its branch only changed."""
        lane = group.lanes[row]
        branch_id = lane.branch.id
        if status == _CHANGED:
            self.guided.reopen(lane)
            if lane.params.has_penalties:
                self._load_context(lane)
            return
        if status == _OUT_OF_PAGES:
            generated = lane.params.max_tokens - int(group.left[row])
            drawn.refused.append((lane, "out_of_pages", self._out_of_pages(lane, generated)))
        elif status == _STALE:
            error = StaleBranch(f"branch {branch_id} was pruned")
            drawn.refused.append((lane, "stale", error))
        elif verdict := self.guided.verdict(lane):
            drawn.refused.append((lane, *verdict))
        else:
            no_token = NumericError(f"branch {branch_id}: the model's logits are not finite")
            drawn.refused.append((lane, "numeric_error", no_token))

    def _out_of_pages(self, lane: Lane, generated: int) -> OutOfPages:
        counts = self._core.stats()
        return OutOfPages(
            1,
            counts["pages_free"],
            counts["pages_cached"],
            counts["pages_live"],
            counts["pages_total"],
            f"branch {lane.branch.id} ended after {generated} generated tokens",
        )

    # -- what users wait for ------------------------------------------------------------------

    def report(self, drawn: Drawn, close: Callable[[Lane], None]) -> None:
        """Tell the jobs about their tokens; `close` is called on lanes that have ended."""
        for run in drawn.forced:
            self._report_run(run, drawn)
        reasons, texts, top = drawn.reasons, drawn.texts, drawn.top
        rows = zip(drawn.lanes, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)
        for row, (lane, token, logprob) in enumerate(rows):
            text = texts[row] if row in texts else lane.decoder.push(token)
            if row not in reasons and not lane.job.listens:
                lane.job.record(lane.index, token, text, logprob)
                continue
            reason = reasons.get(row)
            if reason is not None:
                text += lane.decoder.finish()
            likely = self._alternatives(*top[row]) if row in top else []
            likely = likely[: lane.params.logprobs]
            event = TokenEvent(lane.branch, token, text, logprob, tuple(likely), reason)
            lane.job.deliver(lane.index, event)
            if reason is not None:
                self._log_end(lane, reason)
                close(lane)
        for lane, reason, error in drawn.refused:
            self.end(lane, reason, error)
            close(lane)

    def _report_run(self, run: ForcedRun, drawn: Drawn) -> None:
        lane = run.lane
        for place, (token, value) in enumerate(zip(run.tokens, run.logprobs, strict=True)):
            best = drawn.forced_top.get((lane, place))
            likely = [] if best is None else self._alternatives(*best)[: lane.params.logprobs]
            text = lane.decoder.push(token)
            logprob = None if np.isnan(value) else value
            event = TokenEvent(lane.branch, token, text, logprob, tuple(likely))
            lane.job.deliver(lane.index, event)

    def end(self, lane: Lane, reason: FinishReason, error: Exception | None = None) -> None:
        """Report the end of a lane that got no further token."""
        if error is not None and reason not in ("stale", "cancelled"):
            self._trace.append("error", lane.branch.id, {"error": str(error)})
        if isinstance(lane, DecodingLane):
            self.guided.take_back(lane)
            text = lane.decoder.finish()
        elif error is None:
            return
        else:
            text = ""
        event = TokenEvent(lane.branch, None, text, finish_reason=reason, error=error)
        lane.job.deliver(lane.index, event)
        self._log_end(lane, reason)

    def _log_end(self, lane: Lane, reason: FinishReason) -> None:
        self._trace.append("job", lane.branch.id, {"state": "finish", "reason": reason})

    def _alternatives(self, ids: np.ndarray, values: np.ndarray) -> list[TokenAlternative]:
        piece = self._tokenizer.piece
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [TokenAlternative(token, piece(token), value) for token, value in pairs]
