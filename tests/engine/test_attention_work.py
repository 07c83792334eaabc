"""The GPU work list: native and twin cut alike, and every row sees its own path."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dendrite_engine import _core
from dendrite_engine.cache.reference_cuts import chunk_of
from dendrite_engine.cache.reference_work import attention_reads
from dendrite_engine.cache.reference_work import attention_work as twin
from dendrite_engine.errors import InvalidArgument

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from tree_cases import FakePlan, Segment, TreeCase, random_segments

# q_tile, workers, group
CUTS = [(64, 4, 1), (128, 33, 4), (128, 8, 8), (128, 132, 7), (64, 1, 3), (16, 7, 16)]


def arguments(
    plan, *, rows=None, page_size=16, group=1, q_tile=64, workers=4, window=0, exact=False
):
    return (
        plan.positions, plan.node_pos, plan.node_len, plan.node_row_begin, plan.node_row_end,
        plan.node_page_indptr, plan.page_indices, len(plan.positions) if rows is None else rows,
        page_size, group, q_tile, workers, window, exact,
    )  # fmt: skip


def build(function, *args):
    needed, slots, blocks = function(*args, np.empty(0, np.int32))
    out = np.full(needed, -9, np.int32)
    assert function(*args, out) == (needed, slots, blocks)
    return out, slots, blocks


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("seed", range(6))
def test_native_and_twin_write_the_same_list(seed, cut, window, exact):
    q_tile, workers, group = cut
    page_size = [16, 4, 32, 1][seed % 4]
    case = TreeCase(random_segments(seed, longest=300), page_size=page_size, seed=seed)
    args = arguments(
        case.plan, rows=len(case.plan.positions) + seed, page_size=page_size, group=group,
        q_tile=q_tile, workers=workers, window=window, exact=exact,
    )  # fmt: skip
    native, *native_counts = build(_core.attention_work, *args)
    plain, *plain_counts = build(twin, *args)
    assert native_counts == plain_counts
    np.testing.assert_array_equal(native, plain)


def chains(work, rows, q_tile, group):
    """Segments of each block in merge order, as (block, entries)."""
    num_blocks = -(-rows // max(1, q_tile // group))
    at = 4 + 4 * num_blocks
    segments = work[at : at + 8 * work[1]].reshape(-1, 8)
    reached = set()
    for first in range(len(segments)):
        if segments[first][5] >= 0:
            assert segments[first][5] not in reached, "a segment is reached twice"
            reached.add(int(segments[first][5]))
    used = segments[segments[:, 1] > 0]
    order = np.argsort(used[:, 0], kind="stable")
    return [(s, work[s[0] : s[0] + 4 * s[1]].reshape(-1, 4)) for s in used[order]]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("q_tile", [64, 128])
@pytest.mark.parametrize("workers", [1, 4, 132])
@pytest.mark.parametrize("seed", range(5))
def test_every_row_reads_its_positions_once_and_in_order(seed, workers, q_tile, exact):
    case = TreeCase(random_segments(seed, count=20, longest=400), seed=seed)
    plan, group = case.plan, 4
    args = arguments(plan, group=group, q_tile=q_tile, workers=workers, exact=exact)
    work, slots, _ = build(_core.attention_work, *args)
    seen = [[] for _ in plan.positions]
    taken = set()
    for segment, entries in chains(work, len(plan.positions), q_tile, group):
        taken |= {int(segment[2])} if segment[2] >= 0 else set()
        for slot, pos, readers, length in entries.tolist():
            for row in range(readers & 0x7FFF, readers >> 16):
                seen[segment[3] + row] += [(pos + i, slot + i) for i in range(length)]
    assert sorted(taken) == list(range(slots))
    for row, position in enumerate(plan.positions.tolist()):
        places = [p for p, _ in seen[row] if p <= position]
        assert places == list(range(position + 1))
        pages = [p for n in plan.nodes() if n[2] <= row < n[3] for p in n[4]]
        assert [s for p, s in seen[row] if p <= position] == [
            pages[p // 16] * 16 + p % 16 for p in range(position + 1)
        ]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("function", [_core.attention_work, twin], ids=["native", "twin"])
@pytest.mark.parametrize("q_tile", [64, 128])
@pytest.mark.parametrize("seed", range(8))
def test_every_partial_result_of_every_row_is_written_once(seed, q_tile, function, exact):
    """Also of rows that read nothing of a chunk: the merge looks at all of a block's slots."""
    segments = [Segment(None, 0, 700, 0)]
    segments += [Segment(0, 700, 1 + (n * 97 + seed) % 600, 1) for n in range(40)]
    plan, group, workers = TreeCase(segments).plan, 4, 5 + seed
    args = arguments(plan, group=group, q_tile=q_tile, workers=workers, exact=exact)
    work, _slots, num_blocks = build(function, *args)
    blocks = work[4 : 4 + 4 * num_blocks].reshape(-1, 4)
    at = 4 + 4 * num_blocks
    listed = work[at : at + 8 * work[1]].reshape(-1, 8).tolist()
    written = []
    for first in range(workers):
        index = first
        while index >= 0 and listed[index][1] > 0:  # a kernel stops at a segment without entries
            _, _, slot, row, count, index, first_query, _ = listed[index]
            block = blocks[row // (q_tile // group)]
            assert first_query == (row - block[0]) * group
            written += [(slot, r) for r in range(row, row + count)]
    wanted = [
        (slot, row)
        for first_row, count, block_slots, first_slot in blocks.tolist()
        for slot in (range(first_slot, first_slot + block_slots) if block_slots else (-1,))
        for row in range(first_row, first_row + count)
    ]
    assert sorted(written) == sorted(wanted)


def test_blocks_with_a_common_prefix_are_cut_at_the_same_places():
    case = TreeCase([Segment(None, 0, 4096, 0)] + [Segment(0, 4096, 3, 1) for _ in range(64)])
    args = arguments(case.plan, group=4, q_tile=64, workers=33)
    work, _, _ = build(_core.attention_work, *args)
    starts = {}
    for segment, entries in chains(work, 64, 64, 4):
        starts.setdefault(int(segment[3]), []).append(int(entries[0][1]))
    cuts = [sorted(s for s in starts[block] if s < 4096) for block in starts]
    assert all(cut == cuts[0] for cut in cuts)


def parts(plan, rows=None, *, function=_core.attention_work, **options):
    """(header, blocks, segments) of a list."""
    work, _, num_blocks = build(function, *arguments(plan, rows=rows, **options))
    at = 4 + 4 * num_blocks
    segments = work[at : at + 8 * work[1]].reshape(-1, 8)
    return work, work[4:at].reshape(-1, 4), segments[segments[:, 1] > 0]


def leaves_under(prefix, count, length):
    """A plan of `count` branches of `length` tokens of their own."""
    segments = [Segment(None, 0, prefix, 0)]
    return TreeCase(segments + [Segment(0, prefix, length, 1) for _ in range(count)]).plan


@pytest.mark.parametrize("function", [_core.attention_work, twin], ids=["native", "twin"])
def test_rows_are_shared_out_where_their_pages_are_mostly_their_own(function):
    plan = leaves_under(256, 256, 32)
    work, blocks, segments = parts(plan, function=function, group=4, q_tile=128, workers=16)
    assert (work[0], len(blocks), len(segments)) == (0, 8, 16)
    assert (segments[:, 2] == -1).all(), "there is nothing to merge"
    assert (segments[:, 4] == 16).all(), "half of a block's rows each"
    assert segments[:, 6].tolist().count(64) == 8


@pytest.mark.parametrize("function", [_core.attention_work, twin], ids=["native", "twin"])
def test_few_pages_are_not_cut_since_a_merge_would_cost_more(function):
    plan = leaves_under(256, 4, 32)
    work, _, segments = parts(plan, function=function, group=4, q_tile=64, workers=33)
    assert work[0] == 0
    assert (segments[:, 2] == -1).all()


@pytest.mark.parametrize("function", [_core.attention_work, twin], ids=["native", "twin"])
def test_a_long_prefix_is_cut_along_its_tokens(function):
    plan = leaves_under(32768, 16, 20)
    work, blocks, _ = parts(plan, function=function, group=4, q_tile=64, workers=33)
    assert 16 <= work[0] <= 33
    assert blocks[:, 2].tolist() == [work[0]]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("function", [_core.attention_work, twin], ids=["native", "twin"])
@pytest.mark.parametrize("length", [16, 80, 130])
def test_tiles_of_the_two_halves_of_a_block_take_turns(length, function, exact):
    plan = leaves_under(112, 32, length)
    work, _, segments = parts(plan, function=function, group=4, q_tile=128, workers=1, exact=exact)
    for segment in segments[segments[:, 4] > 16]:
        entries = work[segment[0] : segment[0] + 4 * segment[1]].reshape(-1, 4)
        kinds = []
        for first in range(0, len(entries), 4):
            readers = [(int(e) & 0x7FFF, int(e) >> 16) for e in entries[first : first + 4, 2]]
            low = any(begin < 16 for begin, end in readers if end > begin)
            high = any(end > 16 for _, end in readers)
            kinds.append("first" if not high else "second" if not low else "both")
        private = [kind for kind in kinds if kind != "both"]
        assert len(private) < 2 or len(set(private)) == 2
        for before, after in pairwise(private[:-1]):
            assert before != after, "one half would wait"


@pytest.mark.parametrize("function", [_core.attention_work, twin], ids=["native", "twin"])
def test_rows_of_a_plan_that_is_no_tree_still_read_in_order(function):
    """What rows of both halves read comes after what those of one half read: nothing is moved."""
    positions = np.full(32, 95, np.int32)
    nodes = [(0, 32, 0, 16, [0, 1]), (0, 32, 16, 32, [2, 3]), (32, 64, 0, 32, [4, 5, 6, 7])]
    plan = FakePlan.from_nodes(positions, nodes)
    work, _, segments = parts(plan, function=function, group=4, q_tile=128, workers=1)
    last = [-1] * 32
    for segment in segments:
        entries = work[segment[0] : segment[0] + 4 * segment[1]].reshape(-1, 4)
        for _, pos, readers, size in entries.tolist():
            for row in range(readers & 0x7FFF, readers >> 16) if size else ():
                assert pos > last[segment[3] + row]
                last[segment[3] + row] = pos


def test_the_cuts_of_a_plan_do_not_depend_on_who_builds_it():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        prefix, count, length = map(int, rng.integers(1, [6000, 200, 60]))
        plan = leaves_under(prefix, count, length)
        options = {
            "group": int(rng.integers(1, 17)), "q_tile": 64 << seed % 2,
            "workers": int(rng.integers(1, 140)),
        }  # fmt: skip
        native, plain = (
            parts(plan, function=f, **options)[0] for f in (_core.attention_work, twin)
        )
        np.testing.assert_array_equal(native, plain)


@pytest.mark.parametrize("rows_per_block", [1, 3, 8, 64])
def test_reads_are_pages_by_blocks(rows_per_block):
    for seed in range(5):
        plan = TreeCase(random_segments(seed, count=30), seed=seed).plan
        nodes = (plan.node_row_begin, plan.node_row_end, plan.node_page_indptr, rows_per_block)
        read = {
            (n, r // rows_per_block) for n, v in enumerate(plan.nodes()) for r in range(*v[2:4])
        }
        wanted = sum(len(plan.nodes()[n][4]) for n, _ in read)
        assert _core.attention_reads(*nodes) == attention_reads(*nodes) == wanted
    with pytest.raises(InvalidArgument, match="rows_per_block must be at least 1, got 0"):
        _core.attention_reads(*nodes[:3], 0)


@pytest.mark.parametrize("workers", [8, 33, 132])
def test_no_worker_gets_much_more_than_its_share(workers):
    case = TreeCase(random_segments(3, count=60, longest=500), seed=1)
    args = arguments(case.plan, group=4, q_tile=64, workers=workers)
    loads = loads_of(args, workers)
    assert max(loads) <= 2 * max(2, -(-sum(loads) // workers))


def loads_of(args, workers: int) -> list[int]:
    """Tiles of every worker."""
    work, _, blocks = build(_core.attention_work, *args)
    at = 4 + 4 * blocks
    segments = work[at : at + 8 * work[1]].reshape(-1, 8).tolist()
    loads = []
    for first in range(workers):
        load, index = 0, first
        while index >= 0:
            load += -(-segments[index][1] // 4)
            index = segments[index][5]
        loads.append(load)
    return loads


@pytest.mark.parametrize(("q_tile", "workers"), [(64, 66), (128, 33)])
def test_at_fixed_cuts_rows_are_shared_out_so_that_loads_are_even(q_tile, workers):
    """Private pages of 64 branches fill what the chunks of their prefix leave, in small pieces."""
    plan = leaves_under(4096, 64, 64)
    args = arguments(plan, group=8, q_tile=q_tile, workers=workers, exact=True)
    loads = loads_of(args, workers)
    assert max(loads) <= 1.5 * sum(loads) / workers


def test_chunks_of_the_deterministic_mode_depend_on_positions_alone():
    edges = (0, 511, 512, 8191, 8192, 9215, 9216, 16383, 16384, 32767, 32768)
    assert [chunk_of(p) for p in edges] == [0, 0, 1, 15, 16, 16, 17, 23, 24, 31, 32]


def test_a_list_that_does_not_fit_is_not_begun():
    case = TreeCase(random_segments(1))
    out = np.full(10, -9, np.int32)
    for function in (_core.attention_work, twin):
        assert function(*arguments(case.plan), out)[0] > 10
        assert (out == -9).all()


def test_no_rows_give_a_list_without_work():
    case = TreeCase([Segment(None, 0, 20, 0)])
    native, slots, blocks = build(_core.attention_work, *arguments(case.plan, rows=8))
    assert (slots, blocks) == (0, 1)
    assert native[2] == 0
    np.testing.assert_array_equal(native, build(twin, *arguments(case.plan, rows=8))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 65}, "group must be from 1 to q_tile"),
        ({"group": 0}, "group"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"window": -1}, "window"),
        ({"page_size": 12}, "page_size must be a power of two, got 12"),
        ({"rows": 1}, "rows must be at least the rows of the plan, got 1"),
    ],
)
def test_bad_arguments_are_refused_with_their_numbers(changes, message):
    case = TreeCase(random_segments(2))
    with pytest.raises(InvalidArgument, match=message):
        _core.attention_work(*arguments(case.plan, **changes), np.empty(0, np.int32))


def test_a_plan_that_contradicts_itself_is_refused():
    case = TreeCase(random_segments(2))
    nodes = case.plan.nodes()
    nodes[0] = (*nodes[0][:4], nodes[0][4] + [0, 0])
    with pytest.raises(InvalidArgument, match="node 0"):
        _core.attention_work(
            *arguments(FakePlan.from_nodes(case.plan.positions, nodes)), np.empty(0, np.int32)
        )
