"""The tree that a person sees: runs cut into pieces, one piece a node on the screen.

A child forked inside a run cuts it there, so `[0, 10)` with a child forked at 6 shows as `[0, 6)`
with two nodes below it: `[6, 10)` of the same branch, and the child. A piece keeps its node id
while it starts where it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from dendrite_lab.runs import MAX_SPLIT_CHAR, UNKNOWN_TOKEN, Run, RunTree

Decode = Callable[[Sequence[int]], list[str]]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_UNKNOWN_TEXT = "\N{MIDDLE DOT}"


class Piece(NamedTuple):
    """One node on the screen: tokens [start, end) of the run `key`.

    `node` is its id, `parent` the node above (0 at a root), `tip` tells whether the run ends here.
    """

    node: int
    parent: int
    key: int
    start: int
    end: int
    tip: bool


class Changes(NamedTuple):
    """What a reader has to redraw: nodes to update or add, and nodes that are gone."""

    pieces: list[Piece]
    removed: list[int]


class TreeModel(RunTree):
    """Runs and their pieces, kept up to date by `apply`, read by `take_changes`.

    Args:
        decode: token ids -> one text a token (the engine tokenizer's `pieces`).
    """

    def __init__(self, decode: Decode) -> None:
        super().__init__()
        self._decode = decode
        self._ids: dict[tuple[int, int], int] = {}
        self._where: dict[int, tuple[int, int]] = {}
        self._pieces: dict[int, list[Piece]] = {}
        self._next_node = 1
        self._removed: set[int] = set()

    def roots(self) -> list[int]:
        """Keys of the runs without a parent, oldest first."""
        return sorted((key for key, run in self.runs.items() if run.parent == 0), key=abs)

    def pieces(self, key: int) -> list[Piece]:
        """The pieces of a run from its start to its end. O(1) unless the run changed."""
        if key in self.stale or key not in self._pieces:
            chain = [
                key
            ]  # refreshed from the top down: a first piece names a node of the run above
            while (above := self.runs[chain[-1]].parent) in self.stale:
                chain.append(above)
            for stale in reversed(chain):
                self._refresh(stale)
        return self._pieces[key]

    def all_pieces(self) -> list[Piece]:
        """Every piece, each run's after those of the run above it."""
        order: list[Piece] = []
        stack = self.roots()[::-1]
        while stack:
            key = stack.pop()
            order.extend(self.pieces(key))
            stack.extend(sorted(self.runs[key].children, key=abs, reverse=True))
        return order

    def piece(self, node: int) -> Piece | None:
        """The piece with this node id, or None when it is gone."""
        where = self._where.get(node)
        if where is None or where[0] not in self.runs:
            return None
        return next((piece for piece in self.pieces(where[0]) if piece.node == node), None)

    def tip(self, key: int) -> Piece | None:
        """The piece in which branch `key` ends, or None for an unknown branch."""
        return self.pieces(key)[-1] if key in self.runs else None

    def piece_at(self, key: int, position: int) -> Piece | None:
        """The piece on the path of branch `key` that holds the token before `position`."""
        if key not in self.runs:
            return None
        run = self.runs[key]
        if position <= run.start:
            run = self.holder(run, position)
        return next((piece for piece in self.pieces(run.key) if position <= piece.end), None)

    def children_of(self, piece: Piece) -> list[Piece]:
        """Pieces directly below `piece`, the run's own continuation first."""
        below = [other for other in self.pieces(piece.key) if other.parent == piece.node]
        for child in sorted(self.runs[piece.key].children, key=abs):
            first = self.pieces(child)[0]
            if first.parent == piece.node:
                below.append(first)
        return below

    def subtree(self, piece: Piece) -> list[Piece]:
        """`piece` and everything below it, parents first."""
        order, stack = [], [piece]
        while stack:
            top = stack.pop()
            order.append(top)
            stack.extend(reversed(self.children_of(top)))
        return order

    def path(self, piece: Piece) -> list[Piece]:
        """Pieces from the root down to `piece`."""
        chain = [piece]
        while chain[-1].parent:
            above = self.piece(chain[-1].parent)
            if above is None:
                break
            chain.append(above)
        return chain[::-1]

    def tokens(self, piece: Piece) -> list[int]:
        """Token ids of the piece."""
        run = self.runs[piece.key]
        return run.tokens[piece.start - run.start : piece.end - run.start]

    def logprobs(self, piece: Piece) -> list[float]:
        """Log-probabilities of the piece's tokens, NaN where a token was not generated."""
        run = self.runs[piece.key]
        return run.logprobs[piece.start - run.start : piece.end - run.start]

    def texts(self, piece: Piece) -> list[str]:
        """One text a token of the piece."""
        run = self.runs[piece.key]
        self._decode_to(run, piece.end - run.start)
        return run.texts[piece.start - run.start : piece.end - run.start]

    def take_changes(self) -> Changes:
        """Pieces that changed since the last call, and nodes that are gone; clears the marks."""
        changed: list[Piece] = []
        for key, cuts in list(self.dirty.items()):
            pieces = self.pieces(key)
            # New tokens move the last piece, or start a new one: then the one before lost its tip.
            changed.extend(pieces if cuts else pieces[-2:])
        self.dirty.clear()
        removed = sorted(self._removed)
        self._removed.clear()
        return Changes(changed, removed)

    @property
    def has_changes(self) -> bool:
        """Whether `take_changes` would return anything."""
        return bool(self.dirty or self._removed)

    def forgotten(self, key: int) -> None:
        """Drop the nodes of a run that no longer exists."""
        for piece in self._pieces.pop(key, []):
            self._drop_node(piece.node)

    def _refresh(self, key: int) -> None:
        """Recompute the pieces of a run, and drop the nodes that no longer exist."""
        run = self.runs[key]
        above = 0
        if run.parent:
            over = self._pieces_of(run.parent)
            above = next((p.node for p in over if run.start <= p.end), over[-1].node)
        pieces: list[Piece] = []
        bounds = self._bounds(run)
        for a, b in pairwise(bounds):
            node = self._node_id(key, a)
            pieces.append(Piece(node, above, key, a, b, b == run.end))
            above = node
        kept = {piece.node for piece in pieces}
        for old in self._pieces.get(key, []):
            if old.node not in kept:
                self._drop_node(old.node)
        self._pieces[key] = pieces
        self.stale.discard(key)

    def _pieces_of(self, key: int) -> list[Piece]:
        return self._pieces[key] if key in self._pieces else self.pieces(key)

    def _bounds(self, run: Run) -> list[int]:
        starts = {self.runs[child].start for child in run.children}
        bounds = [run.start, *sorted(s for s in starts if s > run.start)]
        if run.end > bounds[-1] or len(bounds) == 1:
            bounds.append(run.end)
        return bounds

    def _node_id(self, key: int, start: int) -> int:
        node = self._ids.get((key, start))
        if node is None:
            node = self._next_node
            self._next_node += 1
            self._ids[(key, start)] = node
            self._where[node] = (key, start)
        return node

    def _drop_node(self, node: int) -> None:
        self._removed.add(node)
        where = self._where.pop(node, None)
        if where is not None:
            self._ids.pop(where, None)

    def _decode_to(self, run: Run, count: int) -> None:
        """Make `run.texts` cover `count` tokens; a character split over tokens is decoded whole."""
        done = len(run.texts)
        if done >= count:
            return
        first = done
        while first and done - first < MAX_SPLIT_CHAR and _incomplete(run.texts[first - 1]):
            first -= 1
        ids = run.tokens[first:]
        if UNKNOWN_TOKEN in ids:  # a prompt whose ids are not known yet
            run.texts[first:] = [_UNKNOWN_TEXT] * len(ids)
        else:
            run.texts[first:] = self._decode(ids)


def _incomplete(text: str) -> bool:
    return text == "" or _REPLACEMENT in text
