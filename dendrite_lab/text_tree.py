"""A tree of branches as plain text, for logs, tests and places without a front end."""

from __future__ import annotations

import unicodedata
from typing import Any

from dendrite_lab.session import Session
from dendrite_lab.tree_model import Piece

_WIDTH = 60
_MAX_LINES = 200


def text_tree(target: Any, *, max_lines: int = _MAX_LINES, width: int = _WIDTH) -> str:
    """The tree below a branch, or all trees of an engine, as ASCII art. O(nodes).

    One line a node: branch id, tokens, the beginning of its text (control characters escaped), and
    how many pages it shares and owns.

    Args:
        target: an `Engine`, a `Branch`, or the `Session` behind an explorer.
        max_lines: nodes shown at most.
        width: characters of text shown at most.

    Example:
        >>> print(text_tree(engine))  # doctest: +SKIP
        #1  [0:6] "Once upon a time"  1 page, 0 own
        |-- #2  [6:14] " there was a small dragon"  1 page, 1 own
    """
    session = target if isinstance(target, Session) else _session(target)
    with session.lock:
        session.sync()
        session.refresh(force=True)
        lines = _lines(session, max_lines, width)
    return "\n".join(lines) if lines else "(no branches)"


def _session(target: Any) -> Session:
    if hasattr(target, "prompt"):
        return Session(target)
    return Session(target.engine, [target])


def _lines(session: Session, max_lines: int, width: int) -> list[str]:
    model = session.model
    lines: list[str] = []
    total = len(model.all_pieces())
    roots = [model.pieces(key)[0] for key in model.roots()]
    stack: list[tuple[Piece, str, str]] = [(root, "", "") for root in reversed(roots)]
    while stack:
        piece, lead, below = stack.pop()
        if len(lines) == max_lines:
            lines.append(f"... {total - max_lines} more nodes")
            break
        lines.append(lead + _label(session, piece, width))
        children = model.children_of(piece)
        for index in range(len(children) - 1, -1, -1):
            last = index == len(children) - 1
            stack.append(
                (children[index], below + ("`-- " if last else "|-- "),
                 below + ("    " if last else "|   "))
            )  # fmt: skip
    return lines


def _label(session: Session, piece: Piece, width: int) -> str:
    row = session.row(piece)
    name = f"#{piece.key}" if piece.key > 0 else "(pruned)"
    run = session.model.runs[piece.key]
    state = "" if run.alive or piece.key < 0 else " (pruned)"
    pages = f"{row.pages} page{'' if row.pages == 1 else 's'}"
    own = f", {row.owned} own" if piece.tip and run.alive else ""
    values = f"  N={row.visits} Q={row.value:.3f}" if row.visits else ""
    text = _short(session.snippet(piece), width)
    return f'{name}{state}  [{piece.start}:{piece.end}] "{text}"  {pages}{own}{values}'


def _short(text: str, width: int) -> str:
    escaped = escape(text)
    if len(escaped) <= width:
        return escaped
    return escaped[: width - 3] + "..."


def escape(text: str) -> str:
    """`text` on one line: control, format and unpaired characters become backslash escapes."""
    return "".join(_escape_char(char) for char in text)


def _escape_char(char: str) -> str:
    if char == "\n":
        return "\\n"
    if char == "\t":
        return "\\t"
    if char == '"':
        return '\\"'
    # C = control, format (also the bidirectional overrides), surrogate, private use, unassigned;
    # Zl and Zp would break the line.
    if unicodedata.category(char)[0] == "C" or unicodedata.category(char) in ("Zl", "Zp"):
        code = ord(char)
        return f"\\x{code:02x}" if code < 256 else f"\\u{{{code:x}}}"
    return char
