"""Append-only event log: the one record that live views, replay, exports and tests read.

An event is never changed or removed, so a reader keeps a sequence number and asks for what came
after it. Appending is O(1) and safe from any thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

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
    """Append-only list of events; the sequence number of an event is its index."""

    __slots__ = ("_append", "_events", "start_ns")

    def __init__(self) -> None:
        # Raw tuples, made into Events when read: fork() logs one and must stay near a microsecond.
        self._events: list[tuple[int, Kind, int, dict[str, Any]]] = []
        self._append = self._events.append  # atomic under the GIL
        self.start_ns = time.perf_counter_ns()

    def append(self, kind: Kind, branch_id: int, data: dict[str, Any]) -> None:
        """Log one event. O(1)."""
        self._append((time.perf_counter_ns(), kind, branch_id, data))

    def __len__(self) -> int:
        return len(self._events)

    def __iter__(self) -> Iterator[Event]:
        return iter(self.since(0))

    def since(self, seq: int) -> list[Event]:
        """Events numbered `seq` and up, oldest first; empty when there are none yet."""
        return [Event._make(event) for event in self._events[seq:]]

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
