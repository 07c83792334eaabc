"""Append-only event log: the one record that live views, replay, exports and tests read.

An event is never changed or removed, so a reader keeps a sequence number and asks for what came
after it. Appending is O(1) and safe from any thread.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1

Kind = Literal[
    "prompt",
    "fork",
    "extend",
    "rollback",
    "prune",
    "copy",
    "select",
    "expand",
    "evaluate",
    "backpropagate",
    "budget",
    "error",
    "search",
    "job",
]

_TOKENS = object()  # kind of a record that stands for one "extend" event per token


class Event(NamedTuple):
    """One thing that happened.

    Attributes:
        t_ns: `time.perf_counter_ns()` when it was logged.
        kind: what happened.
        branch_id: the branch it happened to (0 when it concerns none).
        data: details, JSON-serialisable; the keys depend on `kind`.
    """

    t_ns: int
    kind: Kind
    branch_id: int
    data: dict[str, Any]


class Trace:
    """Append-only list of events; the sequence number of an event is its index.

    Records are raw tuples, made into Events when they are read: fork() logs one and must stay near
    a microsecond, and a step logs one for all its tokens, which stands for as many events.
    """

    __slots__ = ("_append", "_lock", "_num_events", "_records", "_starts", "start_ns")

    def __init__(self) -> None:
        self._records: list[tuple[int, Any, Any, Any]] = []
        self._append = self._records.append  # atomic under the GIL
        self._starts = array("q")  # number of the first event of each record, for those counted
        self._num_events = 0  # in the records counted
        self._lock = threading.Lock()
        self.start_ns = time.perf_counter_ns()

    def append(self, kind: Kind, branch_id: int, data: dict[str, Any]) -> None:
        """Log one event. O(1)."""
        self._append((time.perf_counter_ns(), kind, branch_id, data))

    def append_tokens(
        self, branch_ids: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray
    ) -> None:
        """Log one token for each branch: as many "extend" events, in this order. O(1).

        Args:
            branch_ids: i64 [n].
            tokens: i32 [n].
            logprobs: f32 [n]; all three are kept, so they must not change any more.
        """
        self._append((time.perf_counter_ns(), _TOKENS, branch_ids, (tokens, logprobs)))

    def __len__(self) -> int:
        with self._lock:
            self._count()
            return self._num_events

    def __iter__(self) -> Iterator[Event]:
        return iter(self.since(0))

    def since(self, seq: int) -> list[Event]:
        """Events numbered `seq` and up, oldest first; empty when there are none yet."""
        with self._lock:
            self._count()
            if seq < 0:
                seq = max(0, self._num_events + seq)
            if seq >= self._num_events:
                return []
            first = bisect_right(self._starts, seq) - 1
            skip = seq - self._starts[first]
            records = self._records[first : len(self._starts)]
        events: list[Event] = []
        for record in records:
            if record[1] is _TOKENS:
                events += _token_events(*record)
            else:
                events.append(Event._make(record))
        return events[skip:]

    def _count(self) -> None:
        """Number the events of the records that came since the last call."""
        for index in range(len(self._starts), len(self._records)):
            _, kind, branch_ids, _ = self._records[index]
            self._starts.append(self._num_events)
            self._num_events += len(branch_ids) if kind is _TOKENS else 1

    def to_jsonl(self) -> str:
        """The log as JSON lines: a header with the schema version, then one event a line."""
        lines = [json.dumps({"schema": "dendrite-trace", "version": SCHEMA_VERSION})]
        lines += [
            json.dumps(
                {
                    "seq": seq,
                    "t_us": (event.t_ns - self.start_ns) // 1000,
                    "kind": event.kind,
                    "branch": event.branch_id,
                    **event.data,
                }
            )
            for seq, event in enumerate(self)
        ]
        return "\n".join(lines) + "\n"


def _token_events(
    t_ns: int, _: object, branch_ids: np.ndarray, values: tuple[np.ndarray, np.ndarray]
) -> list[Event]:
    tokens, logprobs = values
    rows = zip(branch_ids.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
    return [
        Event(t_ns, "extend", branch_id, {"tokens": [token], "logprobs": [value], "forced": False})
        for branch_id, token, value in rows
    ]
