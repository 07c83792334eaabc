"""Masks of the branches that generate: filled on a thread of their own while the model computes.

`MaskFiller.start` is called as soon as the tokens of a step are known, `take` when the logits of
the next are about to be sampled; between the two lies a forward pass. Used by the engine thread.
"""

from __future__ import annotations

import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dendrite_engine.errors import DeadEnd, GrammarError, StaleBranch
from dendrite_engine.grammar.base import I32, ConstraintEngine, Matcher
from dendrite_engine.grammar.guide import Guide, Snapshot, advance, allowed_ids, sync


class LaneGuide:
    """The grammar of one branch while it generates.

    The matcher is the branch's snapshot until the first token, and its own from then on: that is
    the one deep copy that a fork costs.

    Attributes:
        row: its row in the masks.
        failure: why its branch can't go on, or None.
        is_finished: the text satisfies the grammar and nothing can follow.
    """

    __slots__ = ("_guide", "_matcher", "_read", "failure", "is_finished", "row")

    def __init__(self, guide: Guide | None, row: int, failure: GrammarError | None = None) -> None:
        self._guide, self.row, self.failure = guide, row, failure
        self._matcher: Matcher | None = None
        self._read: list[int] = []
        self.is_finished = guide is not None and failure is None and guide.snapshot.is_finished

    @property
    def is_open(self) -> bool:
        """Whether a mask can be asked for."""
        return self.failure is None and not self.is_finished

    @property
    def guide(self) -> Guide:
        """The branch's guide when the lane was opened."""
        if self._guide is None:
            raise GrammarError("the branch's grammar could not be read")
        return self._guide

    @property
    def matcher(self) -> Matcher | None:
        """Its own matcher; None until the first token."""
        return self._matcher

    def accept(self, token_ids: Sequence[int]) -> None:
        """Read tokens that the branch was given."""
        if self.failure is not None:
            return
        position = self.guide.start + len(self.guide.snapshot.token_ids) + len(self._read)
        try:
            if self._matcher is None:
                self._matcher = self.guide.snapshot.fork()
            advance(self._matcher, np.asarray(token_ids, np.int32), position)
            self._read += token_ids
            self.is_finished = self._matcher.is_finished
        except GrammarError as error:
            self.failure = error
        except BaseException as error:  # a panic of Rust code is no Exception
            self.failure = _broken(error)

    def forced(self) -> list[int]:
        """Tokens that must come next; [] where there is a choice."""
        if not self.is_open or self._matcher is None:
            return []
        try:
            return self._matcher.forced()
        except BaseException as error:  # see accept
            self.failure = _broken(error)
            return []

    def take_back(self, count: int) -> None:
        """Unread the last `count` tokens."""
        del self._read[-count:]
        self.is_finished = False
        if self._matcher is not None and not self._matcher.rollback(count):
            self.rebuild()

    def rebuild(self) -> None:
        """Make the matcher afresh: the one that it had is in the hands of a thread that hangs."""
        if self._matcher is not None:
            matcher = self.guide.beginning.fork()
            advance(matcher, self._token_ids(), self.guide.start)
            self._matcher = matcher

    def keep(self, branch: Any) -> None:
        """Leave what the matcher knows with the branch, for what it does next and for its forks."""
        if self._matcher is None or self.failure is not None or branch._guide is not self._guide:
            return
        snapshot = Snapshot(self.guide.engine, self._matcher, self._token_ids())
        branch._guide = replace(self.guide, snapshot=snapshot)
        self._matcher = None

    def _token_ids(self) -> I32:
        return np.concatenate((self.guide.snapshot.token_ids, np.array(self._read, np.int32)))


@dataclass(slots=True, eq=False)
class _Fill:
    """Masks that are being filled.

    Attributes:
        lanes: whose.
        out: where to.
        done: set when nothing is written any more.
        error: what the constraint engine raised, a panic included.
    """

    lanes: Sequence[LaneGuide]
    out: I32
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None
    seconds: float = 0.0

    def run(self) -> None:
        """Fill them, on the filler's thread."""
        started = time.perf_counter()
        try:
            by_engine: dict[ConstraintEngine, tuple[list[Matcher], list[int]]] = {}
            for lane in self.lanes:
                if lane.matcher is None:
                    self.out[lane.row] = lane.guide.snapshot.mask()
                    continue
                matchers, rows = by_engine.setdefault(lane.guide.engine, ([], []))
                matchers.append(lane.matcher)
                rows.append(lane.row)
            for engine, (matchers, rows) in by_engine.items():
                engine.fill(matchers, rows, self.out)
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - started
        self.done.set()


class _Thread:
    """A thread that fills masks one batch after the other; left behind when one hangs."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[_Fill | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="dendrite-masks", daemon=True).start()

    def _run(self) -> None:
        while (fill := self.inbox.get()) is not None:
            fill.run()
            del fill  # its matchers are not kept alive by a thread that waits


class MaskFiller:
    """Keeps a mask for each lane with a grammar, and fills them in time.

    Args:
        vocab_size: tokens of a mask.
        mask_seconds: wall clock of one mask.

    Attributes:
        mask_us: times of the last fills, each divided by its masks, in microseconds.
        wait_us: how long `take` waited.
    """

    def __init__(self, vocab_size: int, mask_seconds: float) -> None:
        self._words, self._vocab = -(-vocab_size // 32), vocab_size
        self._limit = mask_seconds
        self._masks: I32 = np.zeros((0, self._words), np.int32)
        self._free: list[int] = []
        self._thread: _Thread | None = None
        self._fill: _Fill | None = None
        self.mask_us: deque[float] = deque(maxlen=256)
        self.wait_us: deque[float] = deque(maxlen=256)

    def open(self, branch: Any) -> LaneGuide | None:
        """The guide of a branch that starts to generate; None where it has no grammar."""
        if branch._guide is None:
            return None
        row = self._take_row()
        try:
            return LaneGuide(sync(branch), row)
        except GrammarError as error:
            return LaneGuide(None, row, error)
        except StaleBranch:  # the step that follows ends the lane
            return LaneGuide(None, row, GrammarError("the branch was pruned"))

    def close(self, lane: LaneGuide, branch: Any) -> None:
        """A lane has ended."""
        self._collect()
        lane.keep(branch)
        self._free.append(lane.row)

    def start(self, lanes: Sequence[LaneGuide]) -> None:
        """Begin to fill the masks of lanes that went on to their next token, or are new."""
        self._collect()
        waiting = []
        for lane in lanes:
            known = self._known(lane)
            if known is None:
                waiting.append(lane)
            else:
                self._masks[lane.row] = known
        if waiting:
            self._fill = self._hand_over(waiting)

    def take(self, lanes: Sequence[LaneGuide]) -> I32:
        """The masks of these lanes i32 [n, words], as soon as they are there.

        A lane without any allowed token gets a row of zeros; `LaneGuide.failure` says why.
        """
        started = time.perf_counter()
        self._collect()
        self.wait_us.append((time.perf_counter() - started) * 1e6)
        masks: I32 = self._masks[[lane.row for lane in lanes]]
        for mask, lane in zip(masks, lanes, strict=True):
            if not lane.is_open:
                mask[:] = 0
            elif not mask.any():
                lane.failure = DeadEnd("the branch's grammar allows no token here")
        return masks

    def allowed(self, lane: LaneGuide) -> I32:
        """Token ids that the lane's last mask allowed."""
        return allowed_ids(self._masks[lane.row], self._vocab)

    @property
    def words(self) -> int:
        """32-bit words of a mask."""
        return self._words

    @property
    def median_mask_us(self) -> float:
        """Median of `mask_us`; 0 before the first."""
        return _median(self.mask_us)

    @property
    def median_wait_us(self) -> float:
        """Median of `wait_us`; 0 before the first."""
        return _median(self.wait_us)

    # -- inside -------------------------------------------------------------------------------

    def _known(self, lane: LaneGuide) -> I32 | None:
        """A mask that needs no work: of a lane that is over, or of a snapshot that has one."""
        if not lane.is_open:
            return np.zeros(self._words, np.int32)
        return lane.guide.snapshot.known_mask if lane.matcher is None else None

    def _take_row(self) -> int:
        if not self._free:
            self._collect()  # nothing writes to masks that move
            size = len(self._masks)
            grown = np.zeros((max(8, 2 * size), self._words), np.int32)
            grown[:size] = self._masks
            self._masks = grown
            self._free = list(range(len(grown) - 1, size - 1, -1))
        return self._free.pop()

    def _hand_over(self, lanes: Sequence[LaneGuide]) -> _Fill:
        if self._thread is None:
            self._thread = _Thread()
        fill = _Fill(lanes, self._masks)
        self._thread.inbox.put(fill)
        return fill

    def _collect(self) -> None:
        """Wait for what is being filled."""
        fill, self._fill = self._fill, None
        if fill is None:
            return
        if self._is_done(fill):
            self.mask_us.append(fill.seconds * 1e6 / len(fill.lanes))
            _note_errors(fill.lanes)
            return
        for lane in fill.lanes:  # each on its own, so that one alone pays for what it does
            self._retry(lane)

    def _is_done(self, fill: _Fill) -> bool:
        if not fill.done.wait(self._limit * (1 + len(fill.lanes) / 16)):
            self._thread = None  # it ends by itself, when the fuel is used up
            self._masks = self._masks.copy()  # and may still write where it was told to
            return False
        return fill.error is None

    def _retry(self, lane: LaneGuide) -> None:
        try:
            lane.rebuild()
        except GrammarError as error:
            lane.failure = error
            return
        fill = self._hand_over([lane])
        if self._is_done(fill):
            _note_errors([lane])
        elif fill.error is not None:
            lane.failure = _broken(fill.error)
        else:
            lane.failure = GrammarError(
                f"the grammar's mask was not filled within {self._limit} s "
                "(GrammarLimits.mask_seconds)"
            )

    def shut(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.inbox.put(None)
            self._thread = None


def _broken(error: BaseException) -> GrammarError:
    return GrammarError(f"the grammar failed: {type(error).__name__}: {str(error)[:300]}")


def _note_errors(lanes: Sequence[LaneGuide]) -> None:
    for lane in lanes:
        if lane.matcher is not None and (error := lane.matcher.error):
            lane.failure = GrammarError(f"the grammar can't go on: {error}")


def _median(values: deque[float]) -> float:
    recent = list(values)
    return statistics.median(recent) if recent else 0.0
