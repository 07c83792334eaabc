"""Twin of `_core.attention_work` in plain Python: the same list, cut the same way.

Layout and meaning: cuda_ext/include/dendrite/attention_work.h.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

UNIT = 16  # slots of an entry
TILE = 4  # entries that a kernel loads together
OLD = 1 << 15  # among the readers of an entry: it holds no token of this step
_MIN_TILES = 2
_SEGMENT_COST = 2  # tiles that starting and ending a segment is worth


class _Run(NamedTuple):
    """Units [first, last) of a node, read by rows [begin, end) of one block; the node's units
    before `old` hold no token of this step.
    """

    node: int
    first: int
    last: int
    begin: int
    end: int
    old: int


@dataclass
class _Piece:
    """Entries [begin, begin + count) for rows [row_begin, row_end) of one block; its result is the
    block's partial result number `part`.
    """

    block: int
    part: int
    row_begin: int
    row_end: int
    begin: int
    count: int


def _chunk_shift(position: int) -> int:
    return 8 if position < 4096 else position.bit_length() - 4


def chunk_of(position: int) -> int:
    """Number of the deterministic chunk of a position: 256 long up to 4096, then 8 for each
    doubling.
    """
    shift = _chunk_shift(position)
    return (0 if position < 4096 else 8 * (shift - 8)) + (position >> shift)


def _chunk_begin(position: int) -> int:
    shift = _chunk_shift(position)
    return position >> shift << shift


def _chunk_end(position: int) -> int:
    shift = _chunk_shift(position)
    return ((position >> shift) + 1) << shift


def attention_work(
    positions: np.ndarray, node_pos: np.ndarray, node_len: np.ndarray, node_row_begin: np.ndarray,
    node_row_end: np.ndarray, node_page_indptr: np.ndarray, page_indices: np.ndarray, rows: int,
    page_size: int, group: int, q_tile: int, workers: int, window: int, deterministic: bool,
    out: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip
    """See `_core.attention_work`; O(rows + entries) in Python."""
    rows_per_block = max(1, q_tile // group)
    unit = min(UNIT, page_size)
    cells: list[dict[int, list[_Run]]] = [{} for _ in range(-(-rows // rows_per_block))]
    for node in range(len(node_pos)):
        begin, end = int(node_row_begin[node]), int(node_row_end[node])
        span = (int(node_pos[node]), int(node_len[node]))
        old = _old_units(span, positions[begin:end], unit)
        for block in range(begin // rows_per_block, -(-end // rows_per_block)):
            low = max(begin, block * rows_per_block)
            high = min(end, (block + 1) * rows_per_block)
            if low < high:
                seen = positions[low:high]
                base = block * rows_per_block
                for chunk, first, last in _visible(span, seen, unit, window, deterministic):
                    run = _Run(node, first, last, low - base, high - base, old)
                    cells[block].setdefault(chunk, []).append(run)
    blocks = [
        [first, min(max(len(positions) - first, 0), rows_per_block), 0, 0]
        for first in range(0, len(cells) * rows_per_block, rows_per_block)
    ]
    parts = _parts(cells, blocks, node_pos, unit, deterministic)
    entries, pieces = _entries(parts, node_pos, node_len, node_page_indptr, page_indices, page_size)
    if not deterministic:
        pieces = _cut(pieces, workers)
    segments = _deal(pieces, blocks, group, workers)
    return _write(blocks, segments, entries, out)


def _old_units(span: tuple[int, int], readers: np.ndarray, unit: int) -> int:
    """A row's own token is in the node that covers its position, among those that it reads."""
    at = readers - span[0]
    own = at[(at >= 0) & (at < span[1])]
    return (int(own.min()) if len(own) else span[1] + unit) // unit


def _visible(
    span: tuple[int, int], seen: np.ndarray, unit: int, window: int, deterministic: bool
) -> list[tuple[int, int, int]]:
    """(chunk, first unit, last unit) of what rows at the positions `seen` can see of a node."""
    pos, length = span
    begin = max(pos, int(seen.min()) - window + 1) if window > 0 else pos
    stop = min(pos + length, int(seen.max()) + 1)
    begin -= (begin - pos) % unit
    parts = []
    while begin < stop:
        cut = min(stop, _chunk_end(begin)) if deterministic else stop
        chunk = chunk_of(begin) if deterministic else 0
        parts.append((chunk, (begin - pos) // unit, -(-(cut - pos) // unit)))
        begin = cut
    return parts


def _parts(
    cells: list[dict[int, list[_Run]]], blocks: list[list[int]], node_pos: np.ndarray, unit: int,
    deterministic: bool,
) -> list[tuple[_Piece, list[_Run]]]:  # fmt: skip
    """What each block reads of each chunk; where that is mostly of single rows, in several pieces
    with a part of the rows each.
    """
    parts = []
    for block, chunks in enumerate(cells):
        rows = blocks[block][1]
        for part, chunk in enumerate(sorted(chunks)):
            runs, shares = chunks[chunk], 1
            if deterministic:
                at = int(node_pos[runs[-1].node]) + runs[-1].first * unit
                longest = (_chunk_end(at) - _chunk_begin(at)) // unit
                shares = min(rows, -(-sum(run.last - run.first for run in runs) // longest))
            for i in range(shares):
                low, high = rows * i // shares, rows * (i + 1) // shares
                mine = [
                    run._replace(begin=max(run.begin, low) - low, end=min(run.end, high) - low)
                    for run in runs
                    if max(run.begin, low) < min(run.end, high)
                ]
                parts.append((_Piece(block, part, low, high, 0, 0), mine))
    return parts


def _entries(
    parts: list[tuple[_Piece, list[_Run]]], node_pos: np.ndarray, node_len: np.ndarray,
    indptr: np.ndarray, pages: np.ndarray, page_size: int,
) -> tuple[list[tuple[int, int, int, int]], list[_Piece]]:  # fmt: skip
    unit = min(UNIT, page_size)
    per_page = page_size // unit
    entries: list[tuple[int, int, int, int]] = []
    for piece, runs in parts:
        piece.begin = len(entries)
        for run in runs:
            first_page = int(indptr[run.node])
            for u in range(run.first, run.last):
                slot = int(pages[first_page + u // per_page]) * page_size + u % per_page * unit
                left = int(node_len[run.node]) - u * unit
                readers = run.begin | run.end << 16 | (OLD if u < run.old else 0)
                entries.append((slot, int(node_pos[run.node]) + u * unit, readers, min(unit, left)))
        if not runs:  # rows that read nothing of a chunk still have an empty partial result of it
            entries.append((0, 0, 0, 0))
        piece.count = len(entries) - piece.begin
        entries += [(0, 0, 0, 0)] * (-len(entries) % TILE)
    return entries, [piece for piece, _ in parts]


def _tiles(count: int) -> int:
    return -(-count // TILE)


def _cut(pieces: list[_Piece], workers: int) -> list[_Piece]:
    """Cut at multiples of the shortest length of which every worker gets at most one, but not so
    short that merging takes longer; with more blocks than workers, of half a share.
    """
    sizes = [_tiles(piece.count) for piece in pieces]
    least = max(_MIN_TILES, math.isqrt(max(sizes, default=0) // 8))
    if len(pieces) > workers:
        length = max(_MIN_TILES, (sum(sizes) // workers + 1) // 2)
    else:
        length = least
        while sum(-(-size // length) for size in sizes) > workers:
            length += 1
    step = length * TILE
    return [
        replace(piece, part=part, begin=piece.begin + at, count=min(step, piece.count - at))
        for piece in pieces
        for part, at in enumerate(range(0, piece.count, step))
    ]


def _deal(
    pieces: list[_Piece], blocks: list[list[int]], group: int, workers: int
) -> list[list[int]]:
    """Segments; the largest piece first, each to the worker with the least to do. Sets slots."""
    for piece in pieces:
        blocks[piece.block][2] = max(blocks[piece.block][2], piece.part + 1)
    slots = 0
    for block in blocks:
        block[2] = block[2] if block[2] > 1 else 0
        block[3] = slots
        slots += block[2]
    segments = [[0, 0, -1, 0, 0, -1, 0, 0] for _ in range(workers)]
    last = [-1] * workers
    least = [(0, worker) for worker in range(workers)]
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i].count):
        piece = pieces[i]
        load, worker = heapq.heappop(least)
        heapq.heappush(least, (load + _tiles(piece.count) + _SEGMENT_COST, worker))
        block = blocks[piece.block]
        segment = [
            piece.begin, piece.count, block[3] + piece.part if block[2] else -1,
            block[0] + piece.row_begin, piece.row_end - piece.row_begin, -1,
            piece.row_begin * group, 0,
        ]  # fmt: skip
        if last[worker] < 0:
            segments[worker], last[worker] = segment, worker
        else:
            segments[last[worker]][5] = last[worker] = len(segments)
            segments.append(segment)
    return segments


def _write(
    blocks: list[list[int]], segments: list[list[int]], entries: list[tuple[int, int, int, int]],
    out: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip
    slots = sum(block[2] for block in blocks)
    at = 4 + 4 * len(blocks) + 8 * len(segments)
    size = at + 4 * len(entries)
    if size <= len(out):
        for segment in segments:
            segment[0] = at + 4 * segment[0]
        parts = [[slots, len(segments), len(entries), 0], *blocks, *segments, *entries]
        flat = np.concatenate([np.asarray(part, np.int64) for part in parts])
        out[:size] = flat.astype(np.int32)
    return size, slots, len(blocks)
