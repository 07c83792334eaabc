"""Sends the tree to the front end: at most 20 frames a second, at most two of them unanswered.

Changes are marked in the session, so a slow or absent front end costs nothing: what it missed is
folded into the next frame, newest value wins, and memory never grows with the number of tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from dendrite_lab import protocol
from dendrite_lab.protocol import Frame, NodeRow

FRAME_SECONDS = 0.05
IDLE_SECONDS = 0.2
FRAMES_IN_FLIGHT = 2
_IDLE_TICKS = 40  # this many frames without a change, then look less often


class Source(Protocol):
    """Where frames come from; `Session` is one."""

    totals: dict[str, Any]

    def collect(self, *, snapshot: bool) -> tuple[list[NodeRow], list[str], list[int]]:
        """Rows, texts and removed nodes since the last call, or of everything."""
        ...


class Publisher:
    """A thread that turns marked changes into numbered frames.

    Args:
        source: what to publish.
        send: hands one frame to the front end; must not block.
        failed: called once when publishing stopped because of an error.
        idle: called on the publisher's thread whenever there was nothing to send.
    """

    def __init__(
        self,
        source: Source,
        send: Callable[[Frame], None],
        failed: Callable[[BaseException], None],
        idle: Callable[[], None] | None = None,
    ) -> None:
        self._source, self._send, self._failed, self._idle = source, send, failed, idle
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._connected = False
        self._snapshot = False
        self._sent = 0
        self._acked = 0
        self._last_totals: dict[str, Any] = {}
        self.frames = 0
        self.error: BaseException | None = None

    # ---- called by the front end's messages, any thread -----------------------------------------

    def hello(self) -> None:
        """A front end (re)connected: forget what is in flight and send it everything."""
        with self._lock:
            self._acked = self._sent
            self._connected = self._snapshot = True
            self._start()
        self._wake.set()

    def ack(self, seq: int) -> None:
        """The front end has drawn frame `seq`; others after it may follow."""
        with self._lock:
            self._acked = max(self._acked, min(seq, self._sent))
        self._wake.set()

    def want_snapshot(self) -> None:
        """The front end saw a gap: the next frame holds the whole tree."""
        with self._lock:
            self._snapshot = True
            self._acked = self._sent
        self._wake.set()

    def kick(self) -> None:
        """Something changed just now: don't wait for the idle interval."""
        self._wake.set()

    def close(self) -> None:
        """Stop publishing; waits for a frame under way."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._wake.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)

    # ---- publishing -----------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Frames sent and not acknowledged."""
        with self._lock:
            return self._sent - self._acked

    def tick(self) -> bool:
        """Send one frame if something changed and the front end can take it; tells whether."""
        with self._lock:
            ready = self._connected and self._sent - self._acked < FRAMES_IN_FLIGHT
            snapshot = self._snapshot
            if ready:
                self._snapshot = False
        if not ready:
            return False
        rows, texts, removed = self._source.collect(snapshot=snapshot)
        totals = dict(self._source.totals)
        if not (rows or removed or snapshot or totals != self._last_totals):
            return False
        self._last_totals = totals
        with self._lock:
            self._sent += 1
            seq = self._sent
        extra = {"totals": totals}
        self._send(
            protocol.frame(seq, rows, texts, removed=removed, snapshot=snapshot, extra=extra)
        )
        self.frames += 1
        return True

    def _start(self) -> None:
        if self._thread is None and not self._closed:
            self._thread = threading.Thread(
                target=self._work, name="dendrite-lab publisher", daemon=True
            )
            self._thread.start()

    def _work(self) -> None:
        quiet = 0
        pause = threading.Event()  # never set: an interruptible, precise frame clock
        while not self._closed:
            self._wake.wait(IDLE_SECONDS if quiet > _IDLE_TICKS else FRAME_SECONDS)
            self._wake.clear()
            try:
                quiet = 0 if self.tick() else quiet + 1
                if quiet and self._idle is not None:
                    self._idle()
            except Exception as error:
                if not self._closed:
                    self.error = error
                    self._failed(error)
                return
            pause.wait(FRAME_SECONDS)  # the rate limit: kicks don't make more frames


__all__ = ["FRAMES_IN_FLIGHT", "FRAME_SECONDS", "Publisher", "Source"]
