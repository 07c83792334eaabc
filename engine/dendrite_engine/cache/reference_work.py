"""Twin of `_core.attention_work` and `attention_reads` in plain Python: the same list, cut the same
way.

Layout and meaning: cuda_ext/include/dendrite/attention_work.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dendrite_engine.cache.reference_cuts import (
    TILE,
    Cell,
    Run,
    choose_cuts,
    choose_shares,
    chunk_begin,
    chunk_end,
    chunk_of,
    deal,
    tiles_of,
)

UNIT = 16  # slots of an entry
OLD = 1 << 15  # among the readers of an entry: it holds no token of this step
_SEGMENT_TILES = 2  # that starting and ending a segment is worth


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


def attention_reads(
    node_row_begin: np.ndarray, node_row_end: np.ndarray, node_page_indptr: np.ndarray,
    rows_per_block: int,
) -> int:  # fmt: skip
    """See `_core.attention_reads`."""
    pages = np.diff(node_page_indptr).astype(np.int64)
    blocks = (node_row_end - 1) // rows_per_block - node_row_begin // rows_per_block + 1
    return int(pages.dot(np.where(node_row_end > node_row_begin, blocks, 0)))


def attention_work(
    positions: np.ndarray, node_pos: np.ndarray, node_len: np.ndarray, node_row_begin: np.ndarray,
    node_row_end: np.ndarray, node_page_indptr: np.ndarray, page_indices: np.ndarray, rows: int,
    page_size: int, group: int, q_tile: int, workers: int, window: int, deterministic: bool,
    out: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip
    """See `_core.attention_work`; O(rows + entries) in Python."""
    rows_per_block = max(1, q_tile // group)
    unit = min(UNIT, page_size)
    cells: list[dict[int, list[Run]]] = [{} for _ in range(-(-rows // rows_per_block))]
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
                    run = Run(node, first, last, low - base, high - base, old)
                    cells[block].setdefault(chunk, []).append(run)
    blocks = [
        [first, min(max(len(positions) - first, 0), rows_per_block), 0, 0]
        for first in range(0, len(cells) * rows_per_block, rows_per_block)
    ]
    length = 1
    if deterministic:
        parts = _fixed_parts(cells, blocks, node_pos, unit, workers)
    else:
        runs = [chunks.get(0, []) for chunks in cells]
        rows_of = [block[1] for block in blocks]
        shares, length = choose_cuts(list(zip(rows_of, runs, strict=True)), workers)
        parts = [
            part
            for block, mine in enumerate(runs)
            if mine
            for part in _shared_out(block, 0, rows_of[block], mine, shares)
        ]
    half_rows = 64 // group if q_tile == 128 else 0
    for piece_and_runs in parts:
        piece_and_runs[1][:] = _in_turn(piece_and_runs[1], half_rows)
    entries, pieces = _entries(parts, node_pos, node_len, node_page_indptr, page_indices, page_size)
    if not deterministic:
        pieces = _cut(pieces, length * TILE)
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
        cut = min(stop, chunk_end(begin)) if deterministic else stop
        chunk = chunk_of(begin) if deterministic else 0
        parts.append((chunk, (begin - pos) // unit, -(-(cut - pos) // unit)))
        begin = cut
    return parts


def _fixed_parts(
    cells: list[dict[int, list[Run]]],
    blocks: list[list[int]],
    node_pos: np.ndarray,
    unit: int,
    workers: int,
) -> list[tuple[_Piece, list[Run]]]:
    """What each block reads of each chunk, in one piece or several with a part of the rows each."""
    places, found = [], []
    for block, chunks in enumerate(cells):
        for part, chunk in enumerate(sorted(chunks)):
            runs = chunks[chunk]
            at = int(node_pos[runs[-1].node]) + runs[-1].first * unit
            places.append((block, part))
            found.append(Cell(blocks[block][1], (chunk_end(at) - chunk_begin(at)) // unit, runs))
    parts = []
    for (block, part), cell, shares in zip(
        places, found, choose_shares(found, workers), strict=True
    ):
        parts += _shared_out(block, part, cell.rows, cell.runs, shares)
    return parts


def _shared_out(
    block: int, part: int, rows: int, runs: list[Run], shares: int
) -> list[tuple[_Piece, list[Run]]]:
    """Pieces with a part of the rows each, at most one for each row, and their runs."""
    shares = min(shares, rows)
    pieces = []
    for i in range(shares):
        low, high = rows * i // shares, rows * (i + 1) // shares
        mine = [
            run._replace(begin=max(run.begin, low) - low, end=min(run.end, high) - low)
            for run in runs
            if max(run.begin, low) < min(run.end, high)
        ]
        pieces.append((_Piece(block, part, low, high, 0, 0), mine))
    return pieces


def _in_turn(runs: list[Run], half_rows: int) -> list[Run]:
    """Half of a tile of 128 queries is one warpgroup's, which skips tiles that only the other's
    rows read: first what rows of both halves read, then whole tiles of either half in turn.
    """
    both: list[Run] = []
    halves: tuple[list[Run], list[Run]] = ([], [])
    first_end, second_begin = 0, 1 << 16
    for run in runs:
        if run.end <= half_rows:
            halves[0].append(run)
            first_end = max(first_end, run.end)
        elif run.begin >= half_rows:
            halves[1].append(run)
            second_begin = min(second_begin, run.begin)
        elif run.begin < first_end or run.end > second_begin:
            # A node of a tree has no ancestor with fewer rows. This plan is of another kind, and a
            # row could meet the entries of this run too early.
            return runs
        else:
            both.append(run)
    if half_rows == 0 or not halves[0] or not halves[1]:
        return runs
    listed, first, second = map(_units, (both, *halves))
    fill = -len(listed) % TILE
    listed, first = listed + first[:fill], first[fill:]
    turns = min(len(first), len(second)) // TILE * TILE
    for at in range(0, turns, TILE):
        listed += second[at : at + TILE] + first[at : at + TILE]
    shorter, longer = (second, first) if len(first) > len(second) else (first, second)
    whole = turns + (len(longer) - turns) // TILE * TILE
    return listed + longer[turns:whole] + shorter[turns:] + longer[whole:]


def _units(runs: list[Run]) -> list[Run]:
    return [run._replace(first=u, last=u + 1) for run in runs for u in range(run.first, run.last)]


def _entries(
    parts: list[tuple[_Piece, list[Run]]], node_pos: np.ndarray, node_len: np.ndarray,
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


def _cut(pieces: list[_Piece], step: int) -> list[_Piece]:
    """Cut at multiples of so many entries."""
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
    order = sorted(pieces, key=lambda piece: -piece.count)
    dealt, _ = deal([tiles_of(piece.count) + _SEGMENT_TILES for piece in order], workers)
    for piece, worker in zip(order, dealt, strict=True):
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
