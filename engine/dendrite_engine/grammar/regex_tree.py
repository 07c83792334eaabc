"""Regular expressions over bytes as trees, and their derivatives; for grammar.reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from dendrite_engine.errors import InvalidGrammar


@dataclass(frozen=True, slots=True)
class Node:
    """A set of texts; this base class is the one without any."""


@dataclass(frozen=True, slots=True)
class _Text(Node):
    """The empty text."""


@dataclass(frozen=True, slots=True)
class _Set(Node):
    """One byte of several."""

    bytes: frozenset[int]


@dataclass(frozen=True, slots=True)
class _Cat(Node):
    """One behind the other."""

    first: Node
    rest: Node


@dataclass(frozen=True, slots=True)
class _Or(Node):
    """One of several, none of which is an _Or."""

    parts: frozenset[Node]


@dataclass(frozen=True, slots=True)
class _Star(Node):
    """Any number of times."""

    part: Node


EMPTY = Node()
NOTHING = _Text()
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_ASCII = frozenset(range(128))
_REPEATS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def one_of(bytes_: frozenset[int]) -> Node:
    """One byte of a set."""
    return _Set(bytes_) if bytes_ else EMPTY


def literal(text: bytes) -> Node:
    """Exactly these bytes."""
    return in_turn([one_of(frozenset((byte,))) for byte in text])


def in_turn(parts: Sequence[Node]) -> Node:
    """One after the other."""
    whole: Node = NOTHING
    for part in reversed(parts):
        whole = _cat(part, whole)
    return whole


def _cat(a: Node, b: Node) -> Node:
    if EMPTY in (a, b):
        return EMPTY
    if a == NOTHING:
        return b
    if isinstance(a, _Cat):  # to the right, so that equal texts are equal trees
        return _Cat(a.first, _cat(a.rest, b))
    return a if b == NOTHING else _Cat(a, b)


def any_of(parts: Sequence[Node]) -> Node:
    """One of them."""
    found: set[Node] = set()
    for part in parts:
        if isinstance(part, _Or):
            found |= part.parts
        elif part != EMPTY:
            found.add(part)
    if not found:
        return EMPTY
    return next(iter(found)) if len(found) == 1 else _Or(frozenset(found))


def star(part: Node) -> Node:
    """Any number of times."""
    if part in (EMPTY, NOTHING):
        return NOTHING
    return part if isinstance(part, _Star) else _Star(part)


@lru_cache(maxsize=1 << 14)
def is_nullable(node: Node) -> bool:
    """Whether the empty text is among its texts."""
    if isinstance(node, _Cat):
        return is_nullable(node.first) and is_nullable(node.rest)
    if isinstance(node, _Or):
        return any(map(is_nullable, node.parts))
    return isinstance(node, (_Star, _Text))


@lru_cache(maxsize=1 << 16)
def derivative(node: Node, byte: int) -> Node:
    """What may follow its texts' first byte, where that is `byte`."""
    if isinstance(node, _Set):
        return NOTHING if byte in node.bytes else EMPTY
    if isinstance(node, _Or):
        return any_of([derivative(part, byte) for part in node.parts])
    if isinstance(node, _Star):
        return _cat(derivative(node.part, byte), node)
    if isinstance(node, _Cat):
        after = _cat(derivative(node.first, byte), node.rest)
        if is_nullable(node.first):
            return any_of([after, derivative(node.rest, byte)])
        return after
    return EMPTY


def first_bytes(node: Node) -> frozenset[int]:
    """Bytes that a text of it may begin with."""
    if isinstance(node, _Set):
        return node.bytes
    if isinstance(node, _Or):
        return frozenset().union(*map(first_bytes, node.parts))
    if isinstance(node, _Star):
        return first_bytes(node.part)
    if isinstance(node, _Cat):
        first = first_bytes(node.first)
        return first | first_bytes(node.rest) if is_nullable(node.first) else first
    return frozenset()


def parse_regex(pattern: str) -> Node:
    """The tree of a small regular expression: literals, `.`, classes of ASCII characters, groups,
    `|`, `* + ?`, `{m}`, `{m,}` and `{m,n}`; no `\\d` and the like, which mean all of Unicode.

    Raises:
        InvalidGrammar: anything else.
    """
    return _Parser(pattern).parse()


class _Parser:
    """Recursive descent over the pattern's characters."""

    def __init__(self, pattern: str) -> None:
        self._text, self._at = pattern, 0

    def parse(self) -> Node:
        tree = self._alternatives()
        if self._at != len(self._text):
            raise self._error("unexpected")
        return tree

    def _error(self, what: str) -> InvalidGrammar:
        return InvalidGrammar(f"regex {self._text[:60]!r}: {what} at {self._at}")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _next(self) -> str:
        char = self._peek()
        if not char:
            raise self._error("unexpected end")
        self._at += 1
        return char

    def _alternatives(self) -> Node:
        parts = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            parts.append(self._sequence())
        return any_of(parts)

    def _sequence(self) -> Node:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom()))
        return in_turn(parts)

    def _atom(self) -> Node:
        char = self._next()
        if char == "(":
            if self._text.startswith("?:", self._at):
                self._at += 2
            elif self._peek() == "?":
                raise self._error("unknown group")
            tree = self._alternatives()
            if self._next() != ")":
                raise self._error("a group is not closed")
            return tree
        if char == "[":
            return self._class()
        if char == ".":
            return _characters(_ASCII - {10}, beyond=True)
        if char == "\\":
            return self._escape()
        if char in "*+?{}])^$":
            raise self._error(f"unexpected {char!r}")
        return literal(char.encode())

    def _escape(self) -> Node:
        char = self._next()
        if char.isalnum() and char not in _ESCAPES:
            raise self._error(f"unknown escape {char!r}")
        return literal(_ESCAPES.get(char, char).encode())

    def _class(self) -> Node:
        negated = self._peek() == "^"
        self._at += negated
        found: set[int] = set()
        while self._peek() != "]" or not found:
            first = self._member()
            if (
                len(first) == 1
                and self._peek() == "-"
                and self._text[self._at + 1 : self._at + 2] != "]"
            ):
                self._at += 1
                (low,), (high,) = first, self._member()
                found |= set(range(low, high + 1))
            else:
                found |= first
        self._at += 1
        if negated:
            return _characters(_ASCII - found, beyond=True)
        return one_of(frozenset(found))

    def _member(self) -> frozenset[int]:
        char = self._next()
        if char == "\\":
            char = self._next()
            if char.isalnum() and char not in _ESCAPES:
                raise self._error(f"unknown escape {char!r}")
            char = _ESCAPES.get(char, char)
        if not char.isascii():
            raise self._error("only ASCII characters in classes")
        return frozenset((ord(char),))

    def _repeated(self, tree: Node) -> Node:
        char = self._peek()
        if char not in ("*", "+", "?", "{"):
            return tree
        self._at += 1
        if char == "{":
            low, high = self._bounds()
        else:
            low, high = _REPEATS[char]
        rest = [star(tree)] if high is None else [any_of([tree, NOTHING])] * (high - low)
        return self._repeated(in_turn([*[tree] * low, *rest]))

    def _bounds(self) -> tuple[int, int | None]:
        end = self._text.find("}", self._at)
        low, comma, high = self._text[self._at : end].partition(",")
        if end < 0 or not low.isdigit() or not (high.isdigit() or high == ""):
            raise self._error("unknown repetition")
        self._at = end + 1
        if not comma:
            return int(low), int(low)
        return int(low), int(high) if high else None


def _characters(ascii_: frozenset[int], *, beyond: bool) -> Node:
    """One character in UTF-8: some ASCII ones, and all `beyond` (table 3-7 of Unicode)."""
    tail = one_of(frozenset(range(0x80, 0xC0)))
    parts = [one_of(ascii_)]
    if beyond:
        for lead, second, more in (
            (range(0xC2, 0xE0), range(0x80, 0xC0), 0),
            (range(0xE0, 0xE1), range(0xA0, 0xC0), 1),
            (range(0xE1, 0xED), range(0x80, 0xC0), 1),
            (range(0xED, 0xEE), range(0x80, 0xA0), 1),
            (range(0xEE, 0xF0), range(0x80, 0xC0), 1),
            (range(0xF0, 0xF1), range(0x90, 0xC0), 2),
            (range(0xF1, 0xF4), range(0x80, 0xC0), 2),
            (range(0xF4, 0xF5), range(0x80, 0x90), 2),
        ):
            start = [one_of(frozenset(lead)), one_of(frozenset(second))]
            parts.append(in_turn([*start, *[tail] * more]))
    return any_of(parts)
