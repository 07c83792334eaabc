"""The engine thread: the only place where the model runs."""

from __future__ import annotations

import queue
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dendrite_engine.cache.pages import PageGuard
from dendrite_engine.errors import EngineClosed, NumericError, OutOfPages, StaleBranch
from dendrite_engine.jobs import Job
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_engine.runner import ModelRunner
from dendrite_engine.sampling import Sampler, SamplerState
from dendrite_engine.scheduler import Lane, Scheduler
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import Branch, LogitsRow
from dendrite_engine.types import FinishReason, TokenAlternative, TokenEvent

_KEPT_LOGITS = 256  # branches that keep their logits between jobs; older ones recompute one row


class StepLoop:
    """Owns model and pages on one thread, and turns jobs into steps.

    Everything reaches it through one queue that is read between steps, so a request waits for at most
    the step in flight.
    """

    def __init__(
        self,
        core: Any,
        runner: ModelRunner,
        scheduler: Scheduler,
        sampler: Sampler,
        tokenizer: Tokenizer,
        trace: Trace,
        *,
        eos_ids: Sequence[int],
        max_context: int,
        seed: int,
        guard: PageGuard | None = None,
    ) -> None:
        self._core, self._runner, self._scheduler = core, runner, scheduler
        self._sampler, self._tokenizer, self._trace = sampler, tokenizer, trace
        self._eos_ids = frozenset(eos_ids)
        self._max_context, self._seed = max_context, seed
        self._guard = guard
        self._inbox: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._lanes: list[Lane] = []
        self._open_lanes: dict[Job, int] = {}
        self._kept: deque[Branch] = deque()
        self._arrivals = 0
        self._closed = threading.Event()
        self.step_ms: deque[float] = deque(maxlen=256)
        self.tokens_generated = 0
        self._thread = threading.Thread(target=self._run, name="dendrite-engine", daemon=True)
        self._thread.start()

    # -- called from any thread ---------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            EngineClosed: the engine was closed.
        """
        if self._closed.is_set():
            raise EngineClosed("the engine is closed; make a new one with Engine.from_pretrained")
        self._inbox.put(job)

    def call(self, action: Callable[[], None]) -> None:
        """Run `action` on the engine thread between two steps and wait for it."""
        done = threading.Event()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                action()
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        if self._closed.is_set():
            raise EngineClosed("the engine is closed")
        if threading.current_thread() is self._thread:
            run()
        else:
            self._inbox.put(run)
            done.wait()
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """End the thread after the step in flight; running jobs fail with EngineClosed."""
        if not self._closed.is_set():
            self._closed.set()
            self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def jobs_running(self) -> int:
        """Jobs that have branches still running."""
        return len(self._open_lanes)

    @property
    def median_step_ms(self) -> float:
        """Median time of the last forward passes, in ms; 0 before the first."""
        recent = list(self.step_ms)
        return statistics.median(recent) if recent else 0.0

    # -- engine thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.is_set():
            self._receive(block=not self._lanes)
            if self._closed.is_set():
                break
            try:
                self._step()
            except Exception as error:
                self._fail_all(error)
        self._receive(block=False)
        self._fail_all(EngineClosed("the engine was closed while the job ran"))

    def _receive(self, *, block: bool) -> None:
        """Take everything from the inbox; wait for the first item when there is nothing to do."""
        while True:
            try:
                item = self._inbox.get(block=block)
            except queue.Empty:
                return
            block = False
            if isinstance(item, Job):
                self._admit(item)
            elif item is not None:
                item()

    def _admit(self, job: Job) -> None:
        if not job.branches:
            job.finish()
            return
        self._open_lanes[job] = len(job.branches)
        self._trace.append("job", 0, {"state": "start", "branches": [b.id for b in job.branches]})
        for index, branch in enumerate(job.branches):
            lane = Lane(job, index, branch, branch._handle, self._arrivals)
            self._arrivals += 1
            if job.params is not None:
                params = job.params[index]
                seed = self._seed if params.seed is None else params.seed
                lane.sampler = SamplerState(params, seed, branch.path_key)
                lane.decoder = self._tokenizer.stream()
                if params.has_penalties:
                    self._load_context(lane)
            self._lanes.append(lane)

    def _load_context(self, lane: Lane) -> None:
        """Penalties look at what the branch already holds: all ids, and counts of generated ones."""
        assert lane.sampler is not None
        try:
            ids = self._core.tokens(lane.handle)
            logprobs = self._core.logprobs(lane.handle)
        except StaleBranch:
            return  # the step that follows ends the lane as stale
        lane.sampler.context_ids = set(ids.tolist())
        for token_id in ids[~np.isnan(logprobs)].tolist():
            lane.sampler.counts[token_id] = lane.sampler.counts.get(token_id, 0) + 1

    def _step(self) -> None:
        """Sample what can be sampled, compute what is missing, sample again."""
        self._drop_cancelled()
        self._advance([lane for lane in self._lanes if self._has_logits(lane)])
        waiting = [lane for lane in self._lanes if not self._has_logits(lane)]
        if waiting:
            self._forward(waiting)
            self._advance([lane for lane in waiting if self._has_logits(lane)])

    def _has_logits(self, lane: Lane) -> bool:
        logits = lane.branch._logits
        if logits is None:
            return False
        try:
            return bool(logits.num_tokens == self._core.num_tokens(lane.handle))
        except StaleBranch:
            return False

    def _drop_cancelled(self) -> None:
        for lane in [lane for lane in self._lanes if lane.job.cancelled]:
            self._end(lane, "cancelled")

    def _forward(self, waiting: list[Lane]) -> None:
        selection = self._scheduler.next_batch(waiting, self._core)
        for lane in selection.stale:
            self._end(lane, "stale", StaleBranch(f"branch {lane.branch.id} was pruned"))
        if not selection.lanes:
            return
        plan = self._core.plan(selection.handles, selection.quotas)
        if plan.num_tokens == 0:
            plan.cancel()
            return
        self._guard_before()
        try:
            logits, rows = self._runner.run(plan)
        except BaseException:
            plan.cancel()
            raise
        if len(plan.copies):
            copies = plan.copies.tolist()
            self._trace.append("copy", 0, {"pages": [[src, dst, used] for src, dst, used in copies]})
        plan.commit()
        self._guard_after()
        self.step_ms.append(self._runner.last_ms)
        for lane, row in zip(selection.lanes, rows.tolist(), strict=True):
            if row >= 0:
                self._store_logits(lane, logits, row)

    def _store_logits(self, lane: Lane, logits: torch.Tensor, row: int) -> None:
        try:
            held = self._core.num_tokens(lane.handle)
        except StaleBranch:
            return
        lane.branch._logits = LogitsRow(held, logits, row)

    def _advance(self, lanes: list[Lane]) -> None:
        """Lanes with logits: sample the next token, or finish those that only wanted logits."""
        waiting = [lane for lane in lanes if lane.sampler is None]
        for lane in waiting:
            self._finish_logits(lane)
        sampling = [lane for lane in lanes if lane.sampler is not None]
        if sampling:
            self._sample(sampling)

    def _finish_logits(self, lane: Lane) -> None:
        logits = lane.branch._logits
        assert logits is not None
        row = logits.tensor[logits.row]
        if lane.job.top_k:
            ids, values = self._sampler.top(row[None], lane.job.top_k)
            lane.job.alternatives[lane.index] = self._alternatives(ids[0], values[0])
        if logits.tensor.shape[0] > 1:  # do not keep the other rows of the step alive
            lane.branch._logits = LogitsRow(logits.num_tokens, row.clone()[None], 0)
        self._keep(lane.branch)
        self._end(lane, "length")

    def _keep(self, branch: Branch) -> None:
        self._kept.append(branch)
        if len(self._kept) > _KEPT_LOGITS:
            old = self._kept.popleft()
            if old not in self._kept and not old._busy:
                old._logits = None

    def _sample(self, lanes: list[Lane]) -> None:
        states = [lane.sampler for lane in lanes if lane.sampler is not None]
        rows = [lane.branch._logits for lane in lanes]
        logits = _gather([row for row in rows if row is not None])
        positions = [row.num_tokens for row in rows if row is not None]
        tokens, logprobs = self._sampler.sample(logits, states, positions)
        wanted = max(state.params.logprobs for state in states)
        top = self._sampler.top(logits, wanted) if wanted else None
        good = [i for i, token in enumerate(tokens.tolist()) if token >= 0]
        for i in sorted(set(range(len(lanes))) - set(good)):
            error = NumericError(f"branch {lanes[i].branch.id}: logits are not finite")
            self._trace.append("error", lanes[i].branch.id, {"error": str(error)})
            self._end(lanes[i], "numeric_error", error)
        if good:
            self._append([lanes[i] for i in good], tokens[good], logprobs[good],
                         None if top is None else (top[0][good], top[1][good]))  # fmt: skip

    def _append(
        self,
        lanes: list[Lane],
        tokens: np.ndarray,
        logprobs: np.ndarray,
        top: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        handles = np.array([lane.handle for lane in lanes], np.int64)
        ids = np.ascontiguousarray(tokens, np.int32)
        values = np.ascontiguousarray(logprobs, np.float32)
        status = self._core.append_batch(handles, ids, values)
        for i, lane in enumerate(lanes):
            if status[i] == 1:
                self._end(lane, "out_of_pages", self._out_of_pages(lane))
            elif status[i] == 2:
                self._end(lane, "stale", StaleBranch(f"branch {lane.branch.id} was pruned"))
            else:
                alternatives = () if top is None else self._alternatives(top[0][i], top[1][i])
                self._accept(lane, int(ids[i]), float(values[i]), tuple(alternatives))

    def _accept(
        self, lane: Lane, token: int, logprob: float, top: tuple[TokenAlternative, ...]
    ) -> None:
        assert lane.sampler is not None
        assert lane.decoder is not None
        self.tokens_generated += 1
        lane.generated += 1
        lane.sampler.accept(token)
        data = {"tokens": [token], "logprobs": [logprob], "forced": False}
        self._trace.append("extend", lane.branch.id, data)
        text = lane.decoder.push(token)
        reason = self._finish_reason(lane, token, text)
        if reason is not None:
            text += lane.decoder.finish()
        event = TokenEvent(
            lane.branch, token, text, logprob, top[: lane.sampler.params.logprobs], reason
        )
        lane.job.deliver(lane.index, event)
        if reason is not None:
            self._close(lane)

    def _finish_reason(self, lane: Lane, token: int, text: str) -> FinishReason | None:
        assert lane.sampler is not None
        params = lane.sampler.params
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
        if self._core.num_tokens(lane.handle) >= self._max_context:
            return "context_full"
        return None

    def _alternatives(self, ids: np.ndarray, values: np.ndarray) -> list[TokenAlternative]:
        piece = self._tokenizer.piece
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [TokenAlternative(token, piece(token), value) for token, value in pairs]

    def _out_of_pages(self, lane: Lane) -> OutOfPages:
        s = self._core.stats()
        error = OutOfPages(
            1, s["pages_free"], s["pages_cached"], s["pages_live"], s["pages_total"],
            f"branch {lane.branch.id} ended at {lane.generated} generated tokens",
        )  # fmt: skip
        self._trace.append("error", lane.branch.id, {"error": str(error)})
        return error

    def _end(self, lane: Lane, reason: FinishReason, error: Exception | None = None) -> None:
        """End a lane without a new token."""
        text = lane.decoder.finish() if lane.decoder is not None else ""
        if lane.sampler is not None or error is not None:
            event = TokenEvent(lane.branch, None, text, finish_reason=reason, error=error)
            lane.job.deliver(lane.index, event)
        self._close(lane)

    def _close(self, lane: Lane) -> None:
        self._lanes.remove(lane)
        lane.branch._busy = False
        left = self._open_lanes[lane.job] - 1
        if left:
            self._open_lanes[lane.job] = left
            return
        del self._open_lanes[lane.job]
        self._trace.append("job", 0, {"state": "finish", "branches": [lane.branch.id]})
        lane.job.finish()

    def _fail_all(self, error: BaseException) -> None:
        """A step failed as a whole: end every running job with the error; the tree is unchanged."""
        if not isinstance(error, EngineClosed):
            self._trace.append("error", 0, {"error": f"{type(error).__name__}: {error}"})
        for lane in self._lanes:
            lane.branch._busy = False
        jobs = list(self._open_lanes)
        self._lanes.clear()
        self._open_lanes.clear()
        for job in jobs:
            job.finish(error)

    def _guard_before(self) -> None:
        if self._guard is not None:
            taken, freed, _ = self._core.debug_events()
            self._guard.before_step(taken, freed)

    def _guard_after(self) -> None:
        if self._guard is not None:
            taken, freed, sealed = self._core.debug_events()
            # Pages that changed hands while the step ran were not written by it for their new holder.
            self._guard.before_step(taken, freed)
            self._guard.after_step([page for page in sealed if page not in {*taken, *freed}])


def _gather(rows: list[LogitsRow]) -> torch.Tensor:
    """The rows as one fp32 [R, vocab]; no copy when they already are, in order."""
    first = rows[0].tensor
    indices = [row.row for row in rows]
    if all(row.tensor is first for row in rows):
        if indices == list(range(first.shape[0])):
            return first
        return first.index_select(0, torch.tensor(indices))
    return torch.stack([row.tensor[row.row] for row in rows])
