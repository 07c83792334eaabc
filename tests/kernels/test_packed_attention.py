"""Attention on packed pages against dense attention over what the pages stand for."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from packed_cases import NAMES, PAIRS, PackedCase, make_store
from tree_cases import Segment, TreeCase, attend, random_segments

from dendrite_engine import kernels
from dendrite_engine.errors import InvalidArgument

TREES = {
    "random": lambda **sizes: TreeCase(random_segments(7), **sizes),
    "edges": lambda **sizes: TreeCase(
        [Segment(None, 0, 255, 2)] + [Segment(0, 255, n, 1) for n in (1, 2, 15, 16, 17)], **sizes
    ),
    "prefill": lambda **sizes: TreeCase([Segment(None, 0, 290, 40)], **sizes),
    "many": lambda **sizes: TreeCase(
        [Segment(None, 0, 270, 0)] + [Segment(0, 270, 1 + n % 20, 1) for n in range(24)], **sizes
    ),
}


def check(ops, packed: PackedCase, window=0, scale=0.125):
    """Against the float32 twin of dense attention over restored pages."""
    out = attend(ops, packed, window=window, scale=scale)
    assert not torch.isnan(out).any()
    expected = attend(kernels.load("reference"), packed.restored(), window=window, scale=scale)
    torch.testing.assert_close(out, expected, rtol=5e-5, atol=5e-5)


@cache
def tree_case(tree: str, name: str) -> PackedCase:
    return PackedCase(TREES[tree](head_dim=64, heads=6, kv_heads=2), name)


@cache
def tree_answer(tree: str, name: str) -> torch.Tensor:
    packed = tree_case(tree, name)
    return attend(kernels.load("reference"), packed.restored())


@pytest.mark.parametrize("tree", list(TREES))
@pytest.mark.parametrize("name", NAMES + PAIRS)
def test_attention_reads_codes_like_the_numbers_they_stand_for(ops, name, tree):
    out = attend(ops, tree_case(tree, name))
    assert not torch.isnan(out).any()
    torch.testing.assert_close(out, tree_answer(tree, name), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("head_dim", [32, 128, 256])
@pytest.mark.parametrize("name", NAMES)
def test_every_head_dim_that_fits_works(ops, name, head_dim):
    check(ops, PackedCase(TreeCase(random_segments(5, count=6), head_dim=head_dim), name))


@pytest.mark.parametrize("head_dim", [16, 48, 80, 96, 112])
@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3", "fp8_e5m2"])
def test_formats_without_rotation_take_multiples_of_16(ops, name, head_dim):
    check(ops, PackedCase(TreeCase(random_segments(5, count=6), head_dim=head_dim), name))


@pytest.mark.parametrize("head_dim", [96, 160])
def test_mxfp8_takes_multiples_of_32(ops, head_dim):
    check(ops, PackedCase(TreeCase(random_segments(5, count=6), head_dim=head_dim), "mxfp8"))


@pytest.mark.parametrize("page_size", [32, 64, 256])
@pytest.mark.parametrize("name", ["tq4", "tq3", "mxfp8", "fp8_e4m3", "bf16"])
def test_larger_pages_work(ops, name, page_size):
    check(
        ops,
        PackedCase(TreeCase(random_segments(6, count=6), page_size=page_size, head_dim=64), name),
    )


@pytest.mark.parametrize("group", [1, 3, 8, 13])
def test_any_group_of_query_heads_works(ops, group):
    check(ops, PackedCase(TreeCase(random_segments(3), heads=2 * group, head_dim=64), "tq4"))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33, 255, 256, 257, 511, 513])
@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2", "mxfp8"])
def test_lengths_around_page_and_chunk_edges_work(ops, name, length):
    segments = [Segment(None, 0, length, min(length, 3)), Segment(0, length, 17, 1)]
    check(ops, PackedCase(TreeCase(segments, head_dim=32), name))


@pytest.mark.parametrize("window", [1, 15, 17, 255, 257, 300])
@pytest.mark.parametrize("name", ["tq4", "k8v4", "mxfp8"])
def test_a_sliding_window_hides_older_tokens(ops, name, window):
    segments = [Segment(None, 0, 300, 20), Segment(0, 300, 290, 40), Segment(0, 300, 7, 7)]
    check(ops, PackedCase(TreeCase(segments, heads=2, head_dim=32), name), window=window)


@pytest.mark.parametrize("name", ["tq4", "fp8_e4m3", "bf16"])
def test_a_mean_taken_off_the_keys_changes_no_weight(ops, name):
    """Scores move by a constant of each query, which softmax does not see."""
    mean = torch.linspace(-3, 3, 128).reshape(1, 2, 64)
    check(ops, PackedCase(TreeCase(random_segments(4), head_dim=64), name, mean))


@pytest.mark.parametrize("first", ["bf16", "fp8_e4m3", "fp32/mxfp8"])
@pytest.mark.parametrize("name", ["tq4", "tq3", "k8v4", "fp8_e5m2"])
def test_first_pages_are_read_in_their_own_format(ops, name, first):
    segments = random_segments(12, count=9)
    mean = torch.linspace(-1, 1, 128).reshape(1, 2, 64)
    packed = PackedCase(TreeCase(segments, head_dim=64), name, mean, first)
    assert int((packed.store.first.index >= 0).sum()) >= 1
    check(ops, packed)
    plain = PackedCase(TreeCase(segments, head_dim=64), name, mean)
    assert not torch.equal(attend(ops, packed), attend(ops, plain))


@pytest.mark.parametrize("name", NAMES + PAIRS)
@pytest.mark.parametrize("tree", list(TREES))
def test_a_row_is_the_same_bits_alone_and_for_every_thread_count(isa, name, tree):
    packed = tree_case(tree, name)
    two = kernels.load("native", isa=isa, threads=2)
    together = attend(two, packed)
    for threads in (1, 3, 64):
        other = kernels.load("native", isa=isa, threads=threads)
        assert torch.equal(attend(other, packed), together)
    for row in range(0, len(packed.q), 7):
        alone = attend(two, packed, packed.plan.only_row(row), packed.q[row : row + 1])
        assert torch.equal(alone[0], together[row])
    assert torch.equal(attend(two, packed, packed.plan.cut(16)), together)


def test_fp32_codes_give_the_bits_of_unquantised_pages(isa):
    """The one format that loses nothing shows that both kernels sum in the same order."""
    ops = kernels.load("native", isa=isa, threads=2)
    case = TREES["many"](head_dim=64)
    assert torch.equal(attend(ops, PackedCase(case, "fp32")), attend(ops, case))


def test_keys_and_values_of_two_pools_are_refused(ops):
    case = TreeCase(random_segments(1), head_dim=64)
    packed, other = PackedCase(case, "tq4"), PackedCase(case, "fp8_e4m3")
    packed.v_pages = other.v_pages
    with pytest.raises(InvalidArgument, match=r"K \(tq4\) and V \(fp8_e4m3\) must be"):
        attend(ops, packed)
    packed.v_pages = case.v_pages
    with pytest.raises(InvalidArgument, match="both be packed pages, or both unquantised"):
        attend(ops, packed)


def test_a_pool_made_for_a_smaller_format_is_refused():
    small, large = make_store("tq2"), make_store("tq4")
    view = large.layers[0][0]
    with pytest.raises(InvalidArgument, match="was the pool made for another format"):
        replace(view, data=small.data)


def test_queries_of_another_head_dim_or_layout_are_refused(native):
    packed = PackedCase(TreeCase(random_segments(1), head_dim=64), "tq4")
    with pytest.raises(InvalidArgument, match="heads of 64, the queries have 32"):
        attend(native, packed, q=packed.q[..., :32].contiguous())
    with pytest.raises(InvalidArgument, match="float64"):
        attend(native, packed, q=packed.q.double())
