"""tree_attention against dense float64 attention over each row's own path."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tree_cases import FakePlan, Segment, TreeCase, attend, random_segments

from dendrite_engine import kernels
from dendrite_engine.errors import InvalidArgument


def check(ops, case, window=0, scale=0.25):
    out = attend(ops, case, window=window, scale=scale)
    expected = case.expected(scale, window)
    assert not torch.isnan(out).any()
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("seed", range(8))
def test_random_trees_match_dense_attention(ops, seed):
    check(ops, TreeCase(random_segments(seed), seed=seed))


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_any_group_of_query_heads_works(ops, kv_heads, group):
    check(ops, TreeCase(random_segments(3), heads=kv_heads * group, kv_heads=kv_heads))


@pytest.mark.parametrize("head_dim", [8, 24, 64, 72, 80, 96, 128, 256])
def test_any_head_dim_that_is_a_multiple_of_8_works(ops, head_dim):
    check(ops, TreeCase(random_segments(5, count=6), head_dim=head_dim), scale=head_dim**-0.5)


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64, 256])
def test_any_page_size_works(ops, page_size):
    check(ops, TreeCase(random_segments(6), page_size=page_size))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513])
def test_lengths_around_page_and_chunk_edges_work(ops, length):
    segments = [Segment(None, 0, length, min(length, 3))]
    segments += [Segment(0, length, n, 1) for n in (1, 2, 15, 16, 17)]
    check(ops, TreeCase(segments))


def test_a_long_prefill_matches_dense_attention(ops):
    check(ops, TreeCase([Segment(None, 0, 600, 330)], heads=3, kv_heads=1))


def test_a_prefill_below_a_shared_prefix_matches_dense_attention(ops):
    segments = [Segment(None, 0, 283, 5), Segment(0, 283, 70, 70), Segment(0, 283, 41, 41)]
    check(ops, TreeCase(segments, heads=4, kv_heads=2))


def test_many_branches_of_one_prefix_match_dense_attention(ops):
    segments = [Segment(None, 0, 530, 0)] + [Segment(0, 530, 1 + n % 40, 1) for n in range(70)]
    check(ops, TreeCase(segments, heads=9, kv_heads=3))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 255, 256, 257, 300, 5000])
def test_a_sliding_window_hides_older_tokens(ops, window):
    segments = [Segment(None, 0, 300, 20), Segment(0, 300, 290, 40), Segment(0, 300, 7, 7)]
    check(ops, TreeCase(segments, heads=2, kv_heads=1), window=window)


def test_a_window_never_reads_what_it_hides(ops):
    """Pages that fell out of every row's window may hold anything."""
    case = TreeCase([Segment(None, 0, 600, 2)], heads=2, kv_heads=1)
    expected = case.expected(0.25, window=20)
    case.k_pages[case.plan.page_indices[:30]] = float("nan")
    case.v_pages[case.plan.page_indices[:30]] = float("nan")
    out = attend(kernels.load("auto"), case, window=20)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


def test_large_scores_do_not_overflow(ops):
    case = TreeCase(random_segments(2))
    case.q *= 200
    out, expected = attend(ops, case), case.expected(0.25)
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


def test_no_rows_is_no_work(ops):
    case = TreeCase([Segment(None, 0, 20, 0)])
    assert attend(ops, case).shape == (0, 6, 16)


def test_a_plan_may_list_nodes_that_no_row_reads(ops):
    case = TreeCase(random_segments(4))
    nodes = [*case.plan.nodes(), (0, 16, 1, 1, [0]), (32, 0, 0, 1, [])]
    out = attend(ops, case, plan=FakePlan.from_nodes(case.plan.positions, nodes))
    assert torch.equal(out, attend(ops, case))


def test_nan_in_one_branch_stays_in_that_branch(native):
    segments = [Segment(None, 0, 40, 0)] + [Segment(0, 40, 9, 1) for _ in range(3)]
    case = TreeCase(segments)
    clean = attend(native, case)
    page = case.plan.only_row(1).page_indices[-1]
    case.v_pages[page] = float("nan")
    out = attend(native, case)
    assert torch.isnan(out[1]).all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


def broken(case, **changes):
    values = {name: np.array(value) for name, value in vars(case.plan).items()}
    for name, (index, value) in changes.items():
        values[name][index] = value
    return FakePlan(**values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": (-1, 10_000)}, "position 10000"),
        ({"positions": (0, -1)}, "position -1"),
        ({"node_pos": (0, 16)}, "covered up to 0"),
        ({"node_pos": (0, 3)}, "starts at 3"),
        ({"node_len": (0, 1)}, "lists"),
        ({"node_row_end": (0, 99)}, "rows 0..99"),
        ({"page_indices": (0, 1_000_000)}, "1000000"),
        ({"page_indices": (0, -2)}, "page index -2"),
    ],
)
def test_a_plan_that_does_not_cover_its_rows_is_refused(native, change, message):
    segments = [Segment(None, 0, 64, 2), Segment(0, 64, 20, 2)]
    case = TreeCase(segments)
    with pytest.raises(InvalidArgument, match=message):
        attend(native, case, plan=broken(case, **change))


def test_tensors_of_the_wrong_shape_dtype_or_layout_are_refused(native):
    case = TreeCase(random_segments(1))
    with pytest.raises(InvalidArgument, match=r"q must be .* of shape"):
        attend(native, case, q=case.q[:-1])
    with pytest.raises(InvalidArgument, match="float64"):
        attend(native, case, q=case.q.double())
    with pytest.raises(InvalidArgument, match="not contiguous"):
        attend(native, case, q=case.q.transpose(0, 1).contiguous().transpose(0, 1))
    case.v_pages = case.v_pages[:-1]
    with pytest.raises(InvalidArgument, match="v_pages"):
        attend(native, case)


def test_a_head_dim_that_is_no_multiple_of_8_is_refused(native):
    with pytest.raises(InvalidArgument, match="multiple of 8, got 12"):
        attend(native, TreeCase(random_segments(1), head_dim=12))
