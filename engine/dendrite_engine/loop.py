"""The engine thread: the only place where the model runs."""

from __future__ import annotations

import queue
import statistics
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from dendrite_engine.cache.pages import PageGuard
from dendrite_engine.decoding import Decoder, DecodingLane
from dendrite_engine.errors import EngineClosed, StaleBranch
from dendrite_engine.jobs import Job
from dendrite_engine.runner import ModelRunner
from dendrite_engine.scheduler import Lane, Scheduler
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import Branch, LogitsRow
from dendrite_engine.types import FinishReason

_KEPT_LOGITS = 256  # branches that keep logits between jobs; older ones recompute one row


class StepLoop:
    """Owns model and pages on one thread, and turns jobs into steps.

    Everything reaches it through one queue that is read between steps, so a request waits for at
    most the step in flight.
    """

    def __init__(
        self,
        core: Any,
        runner: ModelRunner,
        scheduler: Scheduler,
        decoder: Decoder,
        trace: Trace,
        guard: PageGuard | None = None,
    ) -> None:
        self._core, self._runner, self._scheduler = core, runner, scheduler
        self._decoder, self._trace, self._guard = decoder, trace, guard
        self._inbox: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._lanes: list[Lane] = []
        self._open_lanes: dict[Job, int] = {}
        self._kept: deque[Branch] = deque()
        self._arrivals = 0
        self._closed = threading.Event()
        self.step_ms: deque[float] = deque(maxlen=256)
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
    def is_closed(self) -> bool:
        """Whether `stop` was called."""
        return self._closed.is_set()

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
            except Exception as error:  # whatever a step raises belongs to its jobs
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
            self._arrivals += 1
            if job.params is None:
                self._lanes.append(Lane(job, index, branch, branch._handle, self._arrivals))
            else:
                params = job.params[index]
                self._lanes.append(self._decoder.open_lane(job, index, params, self._arrivals))

    def _step(self) -> None:
        """Sample what can be sampled, compute what is missing, sample again."""
        for lane in [lane for lane in self._lanes if lane.job.cancelled]:
            self._end(lane, "cancelled")
        self._advance(self._lanes)
        waiting = [lane for lane in self._lanes if self._logits(lane) is None]
        if waiting:
            self._forward(waiting)
            self._advance([lane for lane in waiting if not lane.job.done])

    def _logits(self, lane: Lane) -> LogitsRow | None:
        """The lane's next-token logits, when they belong to what the branch holds now."""
        logits = lane.branch._logits
        if logits is None:
            return None
        try:
            held = self._core.num_tokens(lane.handle)
        except StaleBranch:
            return None
        return logits if logits.num_tokens == held else None

    def _forward(self, waiting: list[Lane]) -> None:
        selection = self._scheduler.next_batch(waiting, self._core)
        for lane in selection.stale:
            self._end(lane, "stale", StaleBranch(f"branch {lane.branch.id} was pruned"))
        if not selection.lanes:
            return
        try:
            plan = self._core.plan(selection.handles, selection.quotas)
        except StaleBranch:
            return  # pruned since it was chosen: the next step ends its lane
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
            self._trace.append("copy", 0, {"pages": plan.copies.tolist()})
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
        ready = [(lane, row) for lane in lanes if (row := self._logits(lane)) is not None]
        for lane, row in ready:
            if not isinstance(lane, DecodingLane):
                self._finish_logits(lane, row)
        decoding = [(lane, row) for lane, row in ready if isinstance(lane, DecodingLane)]
        if decoding:
            decoding_lanes, rows = zip(*decoding, strict=True)
            self._decoder.sample(decoding_lanes, rows, self._close)

    def _finish_logits(self, lane: Lane, logits: LogitsRow) -> None:
        if lane.job.top_k:
            lane.job.alternatives[lane.index] = self._decoder.top(logits, lane.job.top_k)
        if logits.tensor.shape[0] > 1:  # do not keep the other rows of the step alive
            row = logits.tensor[logits.row].clone()[None]
            lane.branch._logits = LogitsRow(logits.num_tokens, row, 0)
        self._keep(lane.branch)
        self._end(lane, "length")

    def _keep(self, branch: Branch) -> None:
        self._kept.append(branch)
        if len(self._kept) > _KEPT_LOGITS:
            old = self._kept.popleft()
            if old not in self._kept and not old._busy:
                old._logits = None

    def _end(self, lane: Lane, reason: FinishReason, error: Exception | None = None) -> None:
        """End a lane without a new token."""
        self._decoder.end(lane, reason, error)
        self._close(lane)

    def _close(self, lane: Lane) -> None:
        self._lanes.remove(lane)
        lane.branch._busy = False
        left = self._open_lanes[lane.job] - 1
        if left:
            self._open_lanes[lane.job] = left
            return
        del self._open_lanes[lane.job]
        ids = [branch.id for branch in lane.job.branches]
        self._trace.append("job", 0, {"state": "finish", "branches": ids})
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
            self._guard.before_step(taken, freed, self._core.debug_unsealed())

    def _guard_after(self) -> None:
        if self._guard is not None:
            taken, freed, sealed = self._core.debug_events()
            # Pages that changed hands while the step ran were not written by it for their new
            # holder.
            self._guard.before_step(taken, freed, [])
            self._guard.after_step([page for page in sealed if page not in {*taken, *freed}])
