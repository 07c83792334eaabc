"""Wire format between the Explorer's Python side and its front end. Pure: no engine, no widget.

Python sends `frame` messages (a JSON header and one buffer of packed columns) and one `reply` a
command. The front end sends `hello`, `snapshot`, `ack` and `cmd`. Frames are numbered: a front end
that sees a gap asks for a snapshot and ignores deltas until it comes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dendrite_engine.errors import InvalidArgument

PROTOCOL_VERSION = 1

ALIVE, STREAMING, TIP, ROOT, ERROR, BEST = 1, 2, 4, 8, 16, 32

FINISH_REASONS = (
    "",
    "stop",
    "eos",
    "length",
    "cancelled",
    "out_of_pages",
    "context_full",
    "numeric_error",
    "stale",
    "error",
    "dead_end",
    "grammar_error",
)

COLUMNS: tuple[tuple[str, str], ...] = (
    ("node", "<u4"),
    ("parent", "<u4"),
    ("branch", "<i4"),
    ("start", "<u4"),
    ("end", "<u4"),
    ("flags", "<u4"),
    ("finish", "<u4"),
    ("pages", "<u4"),
    ("owned", "<u4"),
    ("tail_refs", "<u4"),
    ("visits", "<u4"),
    ("lp_mean", "<f4"),
    ("lp_last", "<f4"),
    ("value", "<f4"),
    ("uct", "<f4"),
)

MAX_ID = 64
MAX_TEXT = 1_000_000
OPS = frozenset(
    {
        "fork",
        "generate",
        "stop",
        "extend",
        "edit",
        "prune",
        "cost",
        "top",
        "force",
        "tokens",
        "select",
        "prompt",
        "search",
    }
)


class NodeRow(NamedTuple):
    """One node as sent to the front end; the order of the fields is the order of `COLUMNS`."""

    node: int
    parent: int
    branch: int
    start: int
    end: int
    flags: int
    finish: int
    pages: int
    owned: int
    tail_refs: int
    visits: int
    lp_mean: float
    lp_last: float
    value: float
    uct: float


@dataclass(frozen=True, slots=True)
class Frame:
    """One message to the front end: `header` is JSON, `columns` one packed buffer."""

    header: dict[str, Any]
    columns: bytes


@dataclass(frozen=True, slots=True)
class Command:
    """A checked request of the front end (or of `Explorer.simulate`)."""

    id: str
    op: str
    node: int = 0
    args: Mapping[str, Any] = field(default_factory=dict)


def pack(rows: Sequence[NodeRow]) -> bytes:
    """Columns of `rows`, one after the other, little endian, 4 bytes a value. O(rows)."""
    columns = zip(*rows, strict=True) if rows else ((),) * len(COLUMNS)
    parts = [
        np.asarray(values, dtype=dtype).tobytes()
        for (_, dtype), values in zip(COLUMNS, columns, strict=True)
    ]
    return b"".join(parts)


def unpack(count: int, columns: bytes) -> list[NodeRow]:
    """Inverse of `pack`; what the front end does, for tests and recordings."""
    arrays = []
    for index, (_, dtype) in enumerate(COLUMNS):
        arrays.append(np.frombuffer(columns, dtype, count, index * 4 * count).tolist())
    return [NodeRow(*values) for values in zip(*arrays, strict=True)]


def frame(
    seq: int,
    rows: Sequence[NodeRow],
    texts: Sequence[str],
    *,
    removed: Sequence[int] = (),
    snapshot: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Frame:
    """One numbered frame: node rows with one text snippet each, removed nodes, and `extra`."""
    header: dict[str, Any] = {
        "t": "frame",
        "v": PROTOCOL_VERSION,
        "seq": seq,
        "snapshot": snapshot,
        "count": len(rows),
        "cols": [name for name, _ in COLUMNS],
        "texts": list(texts),
        "removed": list(removed),
    }
    header.update(extra or {})
    return Frame(header, pack(rows))


def parse_command(content: Mapping[str, Any]) -> Command:
    """Check a `cmd` message.

    Raises:
        InvalidArgument: a field is missing or of the wrong type, or the operation is unknown.
    """
    ident, op = content.get("id"), content.get("op")
    node, args = content.get("node", 0), content.get("args", {})
    if not isinstance(ident, str) or not 0 < len(ident) <= MAX_ID:
        raise InvalidArgument(f"id must be a string of 1..{MAX_ID} characters, got {ident!r:.80}")
    if not isinstance(op, str) or op not in OPS:
        raise InvalidArgument(f"op must be one of {', '.join(sorted(OPS))}; got {op!r:.80}")
    if node is None:
        node = 0
    if not isinstance(node, int) or isinstance(node, bool) or node < 0:
        raise InvalidArgument(f"node must be a node id, got {node!r:.80}")
    if not isinstance(args, Mapping):
        raise InvalidArgument(f"args must be an object, got {type(args).__name__}")
    return Command(ident, op, node, args)


def integer(args: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int:
    """An integer argument in [low, high]; `default` None makes it required."""
    value = args.get(name, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidArgument(f"{name} must be an integer in {low}..{high}, got {value!r:.80}")
    return value


def number(args: Mapping[str, Any], name: str, default: float | None, low: float) -> float:
    """A finite number argument, at least `low`; `default` None makes it required."""
    value = args.get(name, default)
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < low:
        raise InvalidArgument(f"{name} must be a finite number >= {low:g}, got {value!r:.80}")
    return float(value)


def text(args: Mapping[str, Any], name: str = "text") -> str:
    """A string argument of at most `MAX_TEXT` characters."""
    value = args.get(name)
    if not isinstance(value, str):
        raise InvalidArgument(f"{name} must be a string, got {type(value).__name__}")
    if len(value) > MAX_TEXT:
        raise InvalidArgument(f"{name} has {len(value)} characters, at most {MAX_TEXT} are taken")
    return value


def node_list(command: Command) -> list[int]:
    """Nodes a command is about: `args["nodes"]`, else the command's own node."""
    nodes = command.args.get("nodes")
    if nodes is None:
        nodes = [command.node] if command.node else []
    good = isinstance(nodes, (list, tuple)) and all(
        isinstance(n, int) and not isinstance(n, bool) for n in nodes
    )
    if not good:
        raise InvalidArgument(f"nodes must be a list of node ids, got {nodes!r:.80}")
    return list(dict.fromkeys(nodes))


def error_reply(ident: str, op: str, error: BaseException, elapsed_us: float) -> dict[str, Any]:
    """The answer to a command that failed: the error's type name and message."""
    return {
        "t": "reply",
        "id": ident,
        "op": op,
        "ok": False,
        "error": {"type": type(error).__name__, "message": str(error)},
        "elapsed_us": round(elapsed_us, 1),
    }


def ok_reply(ident: str, op: str, result: Mapping[str, Any], elapsed_us: float) -> dict[str, Any]:
    """The answer to a command that worked."""
    return {
        "t": "reply",
        "id": ident,
        "op": op,
        "ok": True,
        "result": dict(result),
        "elapsed_us": round(elapsed_us, 1),
    }
