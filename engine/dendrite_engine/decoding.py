"""From logits to tokens: samples a batch of branches, appends, and decides who has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dendrite_engine.errors import NumericError, OutOfPages, StaleBranch
from dendrite_engine.jobs import Job
from dendrite_engine.models.tokenizer import StreamDecoder, Tokenizer
from dendrite_engine.sampling import Sampler, SamplerState
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.scheduler import Lane
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import LogitsRow
from dendrite_engine.types import FinishReason, TokenAlternative, TokenEvent

_OUT_OF_PAGES, _STALE = 1, 2  # status codes of TreeCore.append_batch


@dataclass(slots=True, eq=False, kw_only=True)
class DecodingLane(Lane):
    """A lane that generates tokens.

    Attributes:
        sampler: sampling state.
        decoder: streaming detokeniser.
        generated: tokens generated so far in this job.
        tail: the last characters generated, for stop strings.
    """

    sampler: SamplerState
    decoder: StreamDecoder
    generated: int = 0
    tail: str = ""

    @property
    def params(self) -> SamplingParams:
        """How this lane samples."""
        return self.sampler.params


class Decoder:
    """Turns logits into tokens for all lanes of a step at once.

    Attributes:
        tokens_generated: tokens sampled so far.
    """

    def __init__(
        self,
        core: Any,
        sampler: Sampler,
        tokenizer: Tokenizer,
        trace: Trace,
        *,
        eos_ids: Sequence[int],
        max_context: int,
        seed: int,
    ) -> None:
        self._core, self._sampler = core, sampler
        self._tokenizer, self._trace = tokenizer, trace
        self._eos_ids = frozenset(eos_ids)
        self._max_context, self._seed = max_context, seed
        self.tokens_generated = 0

    def open_lane(self, job: Job, index: int, params: SamplingParams, arrival: int) -> DecodingLane:
        """The lane of one branch of a generating job."""
        branch = job.branches[index]
        seed = self._seed if params.seed is None else params.seed
        lane = DecodingLane(
            job,
            index,
            branch,
            branch._handle,
            arrival,
            sampler=SamplerState(params, seed, branch.path_key),
            decoder=self._tokenizer.stream(),
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
        lane.sampler.context_ids = set(ids.tolist())
        for token_id in ids[~np.isnan(logprobs)].tolist():
            lane.sampler.counts[token_id] = lane.sampler.counts.get(token_id, 0) + 1

    def top(self, logits: LogitsRow, k: int) -> list[TokenAlternative]:
        """The k most likely next tokens."""
        ids, values = self._sampler.top(logits.tensor[logits.row][None], k)
        return self._alternatives(ids[0], values[0])

    def sample(
        self,
        lanes: Sequence[DecodingLane],
        rows: Sequence[LogitsRow],
        close: Callable[[Lane], None],
    ) -> None:
        """Draw, append and report one token for each lane; `close` is called on those done."""
        logits = _gather(rows)
        states = [lane.sampler for lane in lanes]
        tokens, logprobs = self._sampler.sample(logits, states, [row.num_tokens for row in rows])
        wanted = max(lane.params.logprobs for lane in lanes)
        top = self._sampler.top(logits, wanted) if wanted else None
        handles = np.array([lane.handle for lane in lanes], np.int64)
        good = np.flatnonzero(tokens >= 0)
        status = np.full(len(lanes), -1, np.int64)
        status[good] = self._core.append_batch(
            handles[good], tokens[good].astype(np.int32), logprobs[good].astype(np.float32)
        )
        for i, lane in enumerate(lanes):
            if status[i] == 0:
                alternatives = () if top is None else self._alternatives(top[0][i], top[1][i])
                done = self._accept(lane, int(tokens[i]), float(logprobs[i]), tuple(alternatives))
            else:
                done = self._refuse(lane, int(status[i]))
            if done:
                close(lane)

    def _accept(
        self, lane: DecodingLane, token: int, logprob: float, top: tuple[TokenAlternative, ...]
    ) -> bool:
        """Report a token that was appended; True when the lane has ended."""
        self.tokens_generated += 1
        lane.generated += 1
        lane.sampler.accept(token)
        data = {"tokens": [token], "logprobs": [logprob], "forced": False}
        self._trace.append("extend", lane.branch.id, data)
        text = lane.decoder.push(token)
        reason = self._finish_reason(lane, token, text)
        if reason is not None:
            text += lane.decoder.finish()
        top = top[: lane.params.logprobs]
        event = TokenEvent(lane.branch, token, text, logprob, top, reason)
        lane.job.deliver(lane.index, event)
        if reason is not None:
            self._log_end(lane, reason)
        return reason is not None

    def _refuse(self, lane: DecodingLane, status: int) -> bool:
        """Report why no token could be appended; the lane has ended."""
        branch_id = lane.branch.id
        if status == _OUT_OF_PAGES:
            self.end(lane, "out_of_pages", self._out_of_pages(lane))
        elif status == _STALE:
            self.end(lane, "stale", StaleBranch(f"branch {branch_id} was pruned"))
        else:
            error = NumericError(f"branch {branch_id}: the model's logits are not finite")
            self.end(lane, "numeric_error", error)
        return True

    def end(self, lane: Lane, reason: FinishReason, error: Exception | None = None) -> None:
        """Report the end of a lane that got no further token."""
        if error is not None and reason not in ("stale", "cancelled"):
            self._trace.append("error", lane.branch.id, {"error": str(error)})
        if isinstance(lane, DecodingLane):
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

    def _finish_reason(self, lane: DecodingLane, token: int, text: str) -> FinishReason | None:
        params = lane.params
        if token in self._eos_ids and not params.ignore_eos:
            return "eos"
        if token in params.stop_token_ids:
            return "stop"
        if params.stop and text:
            lane.tail += text
            if any(stop in lane.tail for stop in params.stop):
                return "stop"
            lane.tail = lane.tail[-max(map(len, params.stop)) :]
        if lane.generated >= params.max_tokens:
            return "length"
        if self._held(lane) >= self._max_context:
            return "context_full"
        return None

    def _held(self, lane: Lane) -> int:
        try:
            held: int = self._core.num_tokens(lane.handle)
        except StaleBranch:
            return 0  # pruned this moment: the next step ends the lane
        return held

    def _alternatives(self, ids: np.ndarray, values: np.ndarray) -> list[TokenAlternative]:
        piece = self._tokenizer.piece
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [TokenAlternative(token, piece(token), value) for token, value in pairs]

    def _out_of_pages(self, lane: DecodingLane) -> OutOfPages:
        counts = self._core.stats()
        return OutOfPages(
            1,
            counts["pages_free"],
            counts["pages_cached"],
            counts["pages_live"],
            counts["pages_total"],
            f"branch {lane.branch.id} ended after {lane.generated} generated tokens",
        )


def _gather(rows: Sequence[LogitsRow]) -> torch.Tensor:
    """The rows as one fp32 [R, vocab]; no copy when they already are, in order."""
    first = rows[0].tensor
    indices = [row.row for row in rows]
    if all(row.tensor is first for row in rows):
        if indices == list(range(first.shape[0])):
            return first
        return first.index_select(0, torch.tensor(indices))
    return torch.stack([row.tensor[row.row] for row in rows])
