"""The engine thread: the only place where the model runs."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from dendrite_engine.cache.pages import PageGuard
from dendrite_engine.decoding import Decoder
from dendrite_engine.drawn import Drawn, Launch
from dendrite_engine.errors import EngineClosed, StaleBranch
from dendrite_engine.forward import Ahead, Flight, ForwardPass, gather_rows
from dendrite_engine.jobs import Job
from dendrite_engine.lanes import DecodingLane, KeptLogits, LaneGroup, Roster, kept_logits
from dendrite_engine.runner import Runner
from dendrite_engine.scheduler import Lane, Scheduler, Selection
from dendrite_engine.speculation.speculator import Speculator
from dendrite_engine.step import Step
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import LogitsRow
from dendrite_engine.types import FinishReason


class StepLoop:
    """Owns model and pages on one thread, and turns jobs into steps.

    Everything reaches it through one queue, read between steps: a request waits for one at most.

    With a runner that returns before the device is done (`is_async`) a step is: launch the forward
    pass and the sampling behind it, report the tokens of the step before, wait for the new ones,
    append them. Where every waiting lane computes one token, the next pass is launched before they
    are known (see ahead.py), and what arrives meanwhile waits for it too.
    """

    def __init__(
        self,
        core: Any,
        runner: Runner,
        scheduler: Scheduler,
        decoder: Decoder,
        trace: Trace,
        guard: PageGuard | None = None,
    ) -> None:
        self._core, self._scheduler = core, scheduler
        self._decoder, self._trace = decoder, trace
        self._forward = ForwardPass(core, runner, trace, guard)
        self.speculator = Speculator(
            core, decoder, trace, scheduler.max_batch_tokens, is_async=runner.is_async
        )
        self._inbox: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._open: dict[Job, set[Lane]] = {}
        self._fresh: list[Lane] = []  # just came; their logits may be there already
        self._roster = Roster()
        self._next: Step | None = None  # launched ahead
        self._reports: deque[Callable[[], None]] = deque()
        self._kept = KeptLogits()
        self._arrivals = 0
        self._closed = threading.Event()
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
        return len(self._open)

    @property
    def step_ms(self) -> deque[float]:
        """Times of the last forward passes, in ms."""
        return self._forward.step_ms

    @property
    def median_step_ms(self) -> float:
        """Their median; 0 before the first."""
        return self._forward.median_ms

    # -- engine thread ------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.is_set():
            if self._next is None:
                if not self._open:
                    self._scheduler.rest()
                self._receive(block=not self._open)
            if self._closed.is_set():
                break
            try:
                self._step()
            except Exception as error:  # whatever a step raises belongs to its jobs
                self._fail_all(self._forward.diagnose(error))
        self._receive(block=False)
        self._fail_all(EngineClosed("the engine was closed while the job ran"))
        self._decoder.guided.close()

    def _receive(self, *, block: bool) -> None:
        """Take everything from the inbox; wait for the first item when there is nothing to do."""
        while block or not self._inbox.empty():
            item = self._inbox.get()
            block = False
            if isinstance(item, Job):
                self._admit(item)
            elif item is not None:
                item()

    def _admit(self, job: Job) -> None:
        if not job.branches:
            self._finish(job)
            return
        self._trace.append("job", 0, {"state": "start", "branches": [b.id for b in job.branches]})
        lanes = self._open[job] = set()
        for index, branch in enumerate(job.branches):
            self._arrivals += 1
            if job.params is None:
                lane = Lane(job, index, branch, branch._handle, self._arrivals)
            else:
                lane = self._decoder.open_lane(job, index, job.params[index], self._arrivals)
                self.speculator.open(lane)
            lanes.add(lane)
            self._fresh.append(lane)

    def _step(self) -> None:
        """Sample what can be sampled, compute what is missing, sample again."""
        step, self._next = self._next, None
        if step is None:
            self._end_cancelled()
            if self._fresh:
                self._begin_fresh()
            if not self._forward.is_async:
                self._report()
            step = self._launch()
        ahead = None if step is None else self._run_ahead(step)
        self._report()
        if step is not None:
            self._land(step)
            if ahead is not None and step.launch is not None:
                self._next = self._settle(ahead, step.launch.group)
        if not self._forward.is_async or not len(self._roster):
            self._report()

    def _end_cancelled(self) -> None:
        if any(job.cancelled for job in self._open):
            lanes = (*self._roster.waiting.lanes, *self._fresh)
            self._end({lane: None for lane in lanes if lane.job.cancelled}, "cancelled")

    # -- lanes whose logits are there already -------------------------------------------------

    def _begin_fresh(self) -> None:
        """Advance lanes that came with logits; all that go on wait for a forward pass."""
        fresh, self._fresh = self._fresh, []
        ready = {lane: row for lane in fresh if (row := kept_logits(lane, self._core)) is not None}
        decoding = [lane for lane in fresh if isinstance(lane, DecodingLane)]
        probes = [lane for lane in fresh if not isinstance(lane, DecodingLane)]
        self._finish_probes([(lane, ready[lane]) for lane in probes if lane in ready])
        group = self._begin_group(LaneGroup.of(decoding), ready)
        self._roster.add(group, [lane for lane in probes if lane not in ready])

    def _begin_group(self, group: LaneGroup, ready: dict[Lane, LogitsRow]) -> LaneGroup:
        """Sample for the lanes whose logits are there; returns those that go on."""
        if not ready:
            return group
        places = np.array([i for i, lane in enumerate(group.lanes) if lane in ready], np.int64)
        if not len(places):
            return group
        some = group if len(places) == len(group) else group.take(places)
        rows = [ready[lane] for lane in some.lanes]
        held = np.array([row.num_tokens for row in rows], np.int32)
        ended = self._draw(self._decoder.begin(some, *gather_rows(rows), held))
        for lane in some.lanes:  # they belong to the text without the token
            lane.branch._logits = None
        if some is not group:
            group.left[places] = some.left
        return group.without(ended) if ended else group

    # -- one forward pass ---------------------------------------------------------------------

    def _launch(self) -> Step | None:
        """Start a forward pass over the lanes that wait, and the sampling that follows it."""
        while len(self._roster):
            selection = self._scheduler.next_batch(self._roster.waiting, self._core)
            if not selection.stale:
                if self.speculator and (step := self._launch_drafts(selection)) is not None:
                    return step
                # None: pruned since they were chosen; the next step ends such lanes.
                flight = self._forward.launch(selection, self._decoder.guided.prepare())
                return None if flight is None else self._begin(flight)
            for lane in selection.stale:
                error = StaleBranch(f"branch {lane.branch.id} was pruned")
                self._end({lane: error}, "stale")
        return None

    def _launch_drafts(self, selection: Selection) -> Step | None:
        """Start a pass that verifies guesses; None where there are none, or more is to be done."""
        roster = self._roster  # a grammar may append several tokens by itself: no guesses beside it
        if selection.chosen is not None or roster.probes or roster.group.with_guides:
            return None
        if (drafts := self.speculator.draft(roster.group)) is None:
            return None
        flight = self._forward.launch(drafts.selection, every_row=True)
        if flight is not None:
            return Step(None, guesses=self.speculator.begin(drafts, flight))
        self.speculator.discard_all()
        return None

    def _begin(self, flight: Flight) -> Step:
        """Start sampling for the decoding lanes whose logits the forward pass gives."""
        roster, rows, held = self._roster, flight.rows, flight.held
        if flight.chosen is not None or roster.probes or rows.min() < 0:
            return self._begin_some(flight)
        order = roster.order_by(rows)
        if order is not None:
            rows, held = rows[order], held[order]
        launch = self._decoder.begin(roster.group, flight.logits, rows, held)
        # Guesses need the tokens, so nothing can be launched ahead of those that want some.
        ahead = not self.speculator or self.speculator.rests()
        return Step(launch, flight=flight if ahead else None, order=order)

    def _begin_some(self, flight: Flight) -> Step:
        """`_begin` where not just the whole group gets logits."""
        roster, rows, held = self._roster, flight.rows, flight.held
        size = len(roster.group)
        places = np.arange(len(rows)) if flight.chosen is None else flight.chosen
        mine = np.flatnonzero((rows >= 0) & (places < size))
        launch: Launch | None = None
        if len(mine) or flight.extra:
            some = roster.group.take(places[mine])
            launch = self._decoder.begin(some, flight.logits, rows[mine], held[mine], flight.extra)
        probes = [
            (roster.probes[places[i] - size], LogitsRow(int(held[i]), flight.logits, int(rows[i])))
            for i in np.flatnonzero((rows >= 0) & (places >= size)).tolist()
        ]
        return Step(launch, places[mine], probes)

    def _land(self, step: Step) -> None:
        """Wait for what a forward pass gives, and hand it to the lanes."""
        if step.guesses is not None:
            for drawn in self.speculator.land(step.guesses):
                self._roster.remove(self._note(drawn))
        if step.launch is not None:
            ended = self._draw(step.launch)
            if step.places is not None:
                self._roster.group.left[step.places] = step.launch.group.left
            if ended:
                self._roster.remove(ended)
        self._finish_probes(step.probes, keep=False)

    def _run_ahead(self, step: Step) -> Ahead | None:
        """Start the pass behind a step's, where nothing else is to be done first."""
        if step.flight is None or step.launch is None or not self._forward.is_async:
            return None
        drawn = step.launch.tokens.drawn
        calls = self._fresh or not self._inbox.empty() or any(job.cancelled for job in self._open)
        if drawn is None or calls:
            return None
        goes_on = self._decoder.going_on(step.launch)
        if not goes_on.any():
            return None
        return self._forward.launch_ahead(step.flight, goes_on, step.order, drawn)

    def _settle(self, ahead: Ahead, before: LaneGroup) -> Step | None:
        """The step of a pass that was launched ahead; None where it is not what is wanted now."""
        roster, flight = self._roster, None
        if len(roster):
            selection = self._scheduler.next_batch(roster.waiting, self._core)
            if selection.chosen is None:
                flight = self._forward.settle(ahead, selection, roster.places_in(before))
        if flight is None:
            self._forward.num_in_vain += 1
            return None
        return self._begin(flight)

    def _draw(self, launch: Launch) -> set[Lane]:
        """Give lanes their tokens, to be reported later; returns those that end with them."""
        return self._note(self._decoder.draw(launch))

    def _note(self, drawn: Drawn) -> set[Lane]:
        """Report tokens later; returns the lanes that end with them."""
        self._reports.append(partial(self._decoder.report, drawn, self._close))
        return drawn.ended if drawn.reasons or drawn.refused else set()

    def _finish_probes(self, ready: Sequence[tuple[Lane, LogitsRow]], *, keep: bool = True) -> None:
        """End lanes that only wanted logits; `keep`: the logits may stay where they are."""
        wanted = [(lane, row) for lane, row in ready if lane.job.top_k]
        if wanted:
            top = self._decoder.top(*gather_rows([row for _, row in wanted]), wanted)
            for (lane, _), likely in zip(wanted, top, strict=True):
                lane.job.alternatives[lane.index] = likely
        for lane, row in ready:
            if not keep or row.tensor.shape[0] > 1:  # do not keep the other rows of the step alive
                copy = row.tensor[row.row].clone()[None]
                lane.branch._logits = LogitsRow(row.num_tokens, copy, 0)
            self._kept.add(lane.branch)
        self._end({lane: None for lane, _ in ready}, "length")

    # -- the end of lanes and jobs ------------------------------------------------------------

    def _end(self, lanes: dict[Lane, Exception | None], reason: FinishReason) -> None:
        """End lanes without a new token; that is reported after what they were given before."""
        if not lanes:
            return
        self._roster.remove(lanes)
        self._fresh = [lane for lane in self._fresh if lane not in lanes]
        for lane, error in lanes.items():
            self._reports.append(partial(self._tell_end, lane, reason, error))

    def _tell_end(self, lane: Lane, reason: FinishReason, error: Exception | None) -> None:
        self._decoder.end(lane, reason, error)
        self._close(lane)

    def _report(self) -> None:
        """Tell jobs what happened since the last call."""
        while self._reports:
            self._reports.popleft()()

    def _close(self, lane: Lane) -> None:
        self.speculator.close(lane)
        self._decoder.release(lane)
        self._open[lane.job].discard(lane)
        if self._open[lane.job]:
            return
        del self._open[lane.job]
        branches = lane.job.branches
        self._trace.append("job", 0, {"state": "finish", "branches": [b.id for b in branches]})
        self._finish(lane.job)

    def _finish(self, job: Job, error: BaseException | None = None) -> None:
        self._guarded(partial(job.finish, error))  # a user's callback must not stop the engine

    def _guarded(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._trace.append("error", 0, {"error": f"{type(error).__name__}: {error}"})

    def _fail_all(self, error: BaseException) -> None:
        """A step failed as a whole: end every running job with the error; the tree is unchanged."""
        while self._reports:  # tokens that branches hold already are not taken back
            self._guarded(self._reports.popleft())
        if not isinstance(error, EngineClosed):
            self._trace.append("error", 0, {"error": f"{type(error).__name__}: {error}"})
        self.speculator.abandon()
        jobs, self._open = self._open, {}
        self._roster, self._fresh, self._next = Roster(), [], None
        for lanes in jobs.values():
            for lane in lanes:
                self._decoder.release(lane)
        for job in jobs:
            self._finish(job, error)
