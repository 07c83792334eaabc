"""Twin of cuda_ext/core/attention_cuts.cc: where the work of tree attention is cut.

At fixed positions, or by a model of what the cuts cost.
"""

from __future__ import annotations

import heapq
from itertools import accumulate
from typing import NamedTuple

TILE = 4  # entries that a kernel loads together

# In eighths of the time that a worker takes for a tile; fitted to runs on an H100.
_TILE_COST = 8
_SEGMENT_COST = 16  # starting and ending a segment
_PARTIAL_COST = 8  # writing a partial result instead of the output
_MERGE_COST = 40  # launching the merge, and
_SLOT_COST = 1  # reading each partial result in it

_MIN_TILES = 2  # a piece has at least this much, if there is so much
_MAX_SLOTS = 64  # partial results of a block that are thought of
_PIECES_A_WORKER = 4
_SHARE_TILES = (16, 8, 4, 2)  # of a piece of a cell, thought of


class Run(NamedTuple):
    """Units [first, last) of a node, read by rows [begin, end) of one block; the node's units
    before `old` hold no token of this step.
    """

    node: int
    first: int
    last: int
    begin: int
    end: int
    old: int


class Cuts(NamedTuple):
    """Every block's rows are shared out to `shares` pieces, each cut every `tiles` tiles."""

    shares: int
    tiles: int


def _chunk_shift(position: int) -> int:
    return 9 if position < 8192 else position.bit_length() - 4


def chunk_of(position: int) -> int:
    """Number of the deterministic chunk of a position: 512 long up to 8192, then 8 for each
    doubling.
    """
    shift = _chunk_shift(position)
    return 8 * (shift - 9) + (position >> shift)


def chunk_begin(position: int) -> int:
    """First position of its chunk."""
    shift = _chunk_shift(position)
    return position >> shift << shift


def chunk_end(position: int) -> int:
    """First position behind its chunk."""
    shift = _chunk_shift(position)
    return ((position >> shift) + 1) << shift


def tiles_of(entries: int) -> int:
    """Tiles that so many entries fill."""
    return -(-entries // TILE)


def deal(costs: list[int], workers: int) -> tuple[list[int], int]:
    """The worker of each piece, in turn the one with the least to do, and the most that one has."""
    least = [(0, worker) for worker in range(workers)]
    dealt = []
    for cost in costs:
        load, worker = least[0]
        heapq.heapreplace(least, (load + cost, worker))
        dealt.append(worker)
    return dealt, max(load for load, _ in least)


def choose_cuts(blocks: list[tuple[int, list[Run]]], workers: int) -> Cuts:
    """The cuts with the shortest time by a model of the kernel: what the busiest worker does, and
    the merge of partial results, if there are any. Blocks are (rows, runs).
    """
    used = [(rows, runs) for rows, runs in blocks if runs]
    if not used:
        return Cuts(1, 1)
    chooser = _Chooser(workers)
    chooser.try_lengths(_sizes(used, 1))
    shares = 2
    while shares <= max(rows for rows, _ in used):
        if sum(min(shares, rows) for rows, _ in used) > _PIECES_A_WORKER * workers:
            break
        sizes = _sizes(used, shares)
        chooser.consider(sizes, shares, max(sizes))
        shares *= 2
    return chooser.best


def _share_of(row: int, parts: int, rows: int) -> int:
    """Share i of n has the rows [rows * i / n, rows * (i + 1) / n)."""
    return ((row + 1) * parts - 1) // rows


def _sizes(blocks: list[tuple[int, list[Run]]], shares: int) -> list[int]:
    """Tiles of each piece, before cuts."""
    sizes = []
    for rows, runs in blocks:
        parts = min(shares, rows)
        entries = [0] * (parts + 1)
        for run in runs:
            entries[_share_of(run.begin, parts, rows)] += run.last - run.first
            entries[_share_of(run.end - 1, parts, rows) + 1] -= run.last - run.first
        sizes += [max(1, tiles_of(count)) for count in accumulate(entries[:-1])]
    return sizes


class _Chooser:
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._best_cost: int | None = None
        self.best = Cuts(1, 1)

    def try_lengths(self, sizes: list[int]) -> None:
        """Pieces of whole blocks, cut or not."""
        longest, total = max(sizes), sum(sizes)
        self.consider(sizes, 1, longest)
        before = longest
        for slots in range(2, _MAX_SLOTS + 1):
            length = -(-longest // slots)
            if length < _MIN_TILES:
                break
            if length == before:
                continue
            before = length
            if self.consider(sizes, 1, length) > _PIECES_A_WORKER * self._workers:
                break
        for pieces in (self._workers, 2 * self._workers):
            if total // pieces >= _MIN_TILES:
                self.consider(sizes, 1, min(longest, total // pieces))

    def consider(self, sizes: list[int], shares: int, length: int) -> int:
        """Take these cuts if nothing better is known; returns the number of pieces."""
        slots = -(-max(sizes) // length)
        extra = _MERGE_COST + _SLOT_COST * slots if slots > 1 else 0
        each = _SEGMENT_COST + (_PARTIAL_COST if slots > 1 else 0)
        cut = [min(length, size - at) for size in sizes for at in range(0, size, length)]
        costs = sorted((_TILE_COST * size + each for size in cut), reverse=True)
        cost = extra + (costs[0] if len(cut) <= self._workers else deal(costs, self._workers)[1])
        # What no deal can do better than is at most what this one does: the native core looks at
        # that first.
        if self._best_cost is None or cost < self._best_cost:
            self._best_cost, self.best = cost, Cuts(shares, length)
        return len(cut)


class Cell(NamedTuple):
    """What a block reads of one chunk.

    Attributes:
        rows: of the block.
        longest: units of the whole chunk.
        runs: what is read of it, at least one.
    """

    rows: int
    longest: int
    runs: list[Run]

    def pieces(self, entries: int) -> int:
        """Shares of the rows so that a piece has about so many entries."""
        mine = sum(run.last - run.first for run in self.runs)
        return min(self.rows, -(-mine // entries))

    def read(self, shares: int) -> int:
        """Entries that all shares of the rows read."""
        total = 0
        for run in self.runs:
            first = _share_of(run.begin, shares, self.rows)
            last = _share_of(run.end - 1, shares, self.rows)
            total += (run.last - run.first) * (last - first + 1)
        return total


def choose_shares(cells: list[Cell], workers: int) -> list[int]:
    """Pieces of every cell, of which each has a part of the rows. The cuts are fixed, but a row's
    result does not depend on the rows beside it: these are chosen, by the same model.
    """
    fewest = [cell.pieces(cell.longest) for cell in cells]
    best, best_cost, count = fewest, _cost_of_shares(cells, fewest, workers), sum(fewest)
    for tiles in _SHARE_TILES:
        shares = [
            more if more > few and 8 * cell.read(more) <= 9 * cell.read(few) else few
            for cell, few in zip(cells, fewest, strict=True)
            for more in (cell.pieces(tiles * TILE),)
        ]
        if sum(shares) > _PIECES_A_WORKER * workers:
            break
        if sum(shares) == count:
            continue
        count = sum(shares)
        cost = _cost_of_shares(cells, shares, workers)
        if cost < best_cost:
            best, best_cost = shares, cost
    return best


def _cost_of_shares(cells: list[Cell], shares: list[int], workers: int) -> int:
    """What the busiest worker does, if shares of a cell are alike."""
    costs = [
        _TILE_COST * -(-cell.read(parts) // (parts * TILE)) + _SEGMENT_COST + _PARTIAL_COST
        for cell, parts in zip(cells, shares, strict=True)
        for _ in range(parts)
    ]
    return deal(sorted(costs, reverse=True), workers)[1]
