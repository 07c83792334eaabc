"""tree_attention_packed against dense attention on decoded pages: twin, emulated kernels, GPU."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from device_cases import make_target
from device_packed_cases import Tree, make_pool, need_packed
from packed_cases import NAMES, PAIRS, PackedCase
from tree_cases import Segment, TreeCase, random_segments
from tree_cases import attend as attend_on_cpu
from work_cases import Cut, cut_work

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels import device_reference_packed, reference

FAST, WIDE, EXACT = Cut(), Cut(q_tile=128, workers=3), Cut(deterministic=True)
FEW = Cut(q_tile=8, workers=7)  # of the kernel for pages that few queries read
TOLERANCE = {torch.float32: 5e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
HALF = [torch.bfloat16, torch.float16]
SOME = ("fp8_e4m3", "mxfp8", "k8v4", "tq4", "tq3", "tq2")  # every way to unpack


class Runner:
    """Attends with one implementation."""

    def __init__(self, name: str) -> None:
        self.name = name
        if name == "twin":
            self.op, self.device = device_reference_packed.tree_attention_packed, "cpu"
        else:
            target = make_target(name)
            need_packed(target, "tree_attention_packed")
            self.op, self.device = target.ops.tree_attention_packed, target.device

    def __call__(self, tree: Tree, cut: Cut = FAST, **options) -> torch.Tensor:
        return tree.attend(self.op, cut, device=self.device, **options)

    def check(
        self, case: TreeCase, name: str, cut: Cut = FAST, dtype=torch.bfloat16, window=0
    ) -> None:
        group = case.heads // case.kv_heads
        if cut.q_tile < group:
            cut = dataclasses.replace(cut, q_tile=16 if group <= 16 else 64)
        if self.name != "twin" and is_missing(cut, case, dtype):
            cut = dataclasses.replace(cut, q_tile=64)
        tree = Tree.make(case, name)
        out = self(tree, cut, dtype=dtype, window=window)
        assert not out.isnan().any()
        tolerance = TOLERANCE[dtype]
        expected = tree.expected(dtype, window)
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def is_missing(cut: Cut, case: TreeCase, dtype: torch.dtype) -> bool:
    """Whether there is no kernel for such tiles."""
    if cut.q_tile == 64:
        return False
    few = cut.q_tile < 64 and case.head_dim not in (64, 128)
    return dtype == torch.float32 or case.head_dim == 256 or few


CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=["twin", "emulated", CUDA])
def attend(request) -> Runner:
    return Runner(request.param)


@pytest.fixture(params=["emulated", CUDA])
def kernel(request) -> Runner:
    return Runner(request.param)


def tree(seed: int, dim: int = 64, **options) -> TreeCase:
    case = TreeCase(random_segments(seed), seed=seed, head_dim=dim, **options)
    case.q *= 8 * dim**-0.5
    return case


def branches(prefix: int, count: int, **options) -> TreeCase:
    segments = [Segment(None, 0, prefix, 0)]
    segments += [Segment(0, prefix, 1 + n % 37, 1) for n in range(count)]
    case = TreeCase(segments, **options)
    case.q *= 8 * case.head_dim**-0.5
    return case


@pytest.mark.parametrize("cut", [FAST, FEW], ids=["fast", "few"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", NAMES + PAIRS)
def test_random_trees_match_dense_attention_on_decoded_pages(attend, name, dim, cut):
    if name == "fp32" and dim == 128 and cut is FEW:
        name = "fp16"  # those cells are too large for that kernel, which says so; see below
    attend.check(tree(dim, dim), name, cut)


@pytest.mark.parametrize("cut", [FAST, WIDE, FEW, EXACT], ids=["fast", "wide", "few", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", SOME)
def test_every_type_and_every_way_to_cut_work(attend, name, dtype, cut):
    attend.check(tree(3), name, cut, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_format_goes_with_every_type(attend, name, dtype):
    attend.check(tree(5), name, FAST, dtype)


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "bf16"])
def test_heads_of_96(attend, name):
    attend.check(tree(9, 96), name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8_e4m3", "k8v4", "tq3"])
def test_heads_of_256(attend, name, dtype):
    attend.check(tree(9, 256), name, FAST, dtype)


@pytest.mark.parametrize("page_size", [16, 32, 64, 256])
@pytest.mark.parametrize("name", ["mxfp8", "tq3"])
def test_page_sizes(attend, name, page_size):
    attend.check(tree(6, page_size=page_size), name, WIDE)
    attend.check(tree(7, page_size=page_size), name)
    attend.check(tree(10, page_size=page_size), name, FEW)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1), (14, 2), (24, 2), (32, 2), (64, 1)]
)
@pytest.mark.parametrize("name", ["k8v4", "tq4"])
def test_any_group_of_query_heads_works(attend, heads, kv_heads, name):
    attend.check(tree(3, heads=heads, kv_heads=kv_heads), name)
    attend.check(tree(4, heads=heads, kv_heads=kv_heads), name, FEW)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 63, 64, 65, 511, 512, 513, 2049])
def test_lengths_around_page_tile_and_cut_edges_work(attend, length):
    segments = [Segment(None, 0, length, min(length, 3))]
    segments += [Segment(0, length, n, 1) for n in (1, 2, 15, 16, 17)]
    case = TreeCase(segments, heads=4, kv_heads=1, head_dim=64)
    for cut in (FAST, FEW, EXACT):
        attend.check(copy.copy(case), "tq4", cut)


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
@pytest.mark.parametrize("name", ["fp8_e4m3", "k4v2"])
def test_any_number_of_workers_works(attend, workers, name):
    case = branches(530, 40, heads=4, kv_heads=1, head_dim=128)
    attend.check(case, name, Cut(workers=workers))
    attend.check(case, name, Cut(8, workers))


@pytest.mark.parametrize("window", [1, 16, 17, 64, 300, 5000])
@pytest.mark.parametrize("name", ["fp8_e4m3", "tq4"])
def test_a_sliding_window_hides_older_tokens(attend, window, name):
    segments = [Segment(None, 0, 300, 20), Segment(0, 300, 290, 40), Segment(0, 300, 7, 7)]
    case = TreeCase(segments, heads=2, kv_heads=1, head_dim=64)
    for cut in (FAST, FEW):
        attend.check(case, name, cut, torch.bfloat16, window)


@pytest.mark.parametrize("name", ["fp8_e4m3", "tq3"])
def test_prompts_below_a_shared_prefix_match_dense_attention(attend, name):
    segments = [Segment(None, 0, 283, 5), Segment(0, 283, 150, 150), Segment(0, 283, 41, 41)]
    case = TreeCase(segments, heads=4, kv_heads=2, head_dim=64)
    attend.check(case, name, WIDE)
    attend.check(case, name, FEW)


@pytest.mark.parametrize("factor", [1e-4, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp8", "tq4"])
def test_scales_far_from_one_lose_nothing(attend, name, dtype, factor):
    """K and V of ordinary precision but unusual size: q takes K's size back."""
    case = tree(8)
    case.k_pages, case.v_pages = case.k_pages * factor, case.v_pages * factor
    case.q /= factor
    tree_ = Tree.make(case, name)
    out, expected = attend(tree_, dtype=dtype) / factor, tree_.expected(dtype) / factor
    torch.testing.assert_close(out, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("cut", [FAST, FEW], ids=["fast", "few"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["fp8_e4m3", "tq4"])
def test_large_scores_do_not_overflow(attend, name, dtype, cut):
    case = tree(2)
    case.q *= 30
    packed = Tree.make(case, name)
    out = attend(packed, cut, dtype=dtype)
    values = packed.sides[1].restored(torch.arange(packed.sides[1].num_pages))
    read = case.v_pages[~case.v_pages.isnan()].abs().max()
    assert out.isfinite().all()
    assert out.abs().max() <= read * 1.5 <= values.abs().max()


def test_padding_rows_are_left_alone(attend):
    case = branches(100, 5, heads=4, kv_heads=2, head_dim=64)
    packed = Tree.make(case, "tq4")
    work, slots, _ = cut_work(case.plan, 16, 2, FAST, rows=8)
    q = torch.full((8, 4, 64), float("nan"))
    q[:5] = packed.query(torch.float32)
    positions = torch.zeros(8, dtype=torch.int32)
    positions[:5] = torch.from_numpy(case.plan.positions)
    out = torch.full_like(q, float("nan"))
    partials = torch.full((slots * 2 * 64 * 66 + 4,), float("nan"))
    keys, values = packed.sides
    tensors = [t.to(attend.device) for t in (q, keys.data, positions, work, partials, out)]
    signs = values.signs.to(attend.device)
    attend.op(*tensors, signs, 0.25, 0, 64, 4, keys.layer_at, 16, 2, 6, 6)
    result = tensors[-1].cpu()
    torch.testing.assert_close(result[:5], packed.expected(torch.float32), rtol=5e-5, atol=5e-5)
    assert result[5:].isnan().all()


@pytest.mark.parametrize("cut", [FAST, FEW], ids=["fast", "few"])
@pytest.mark.parametrize("name", NAMES)
def test_nan_keys_of_one_branch_stay_in_that_branch(attend, name, cut):
    """Stores turn a value that is not finite into a NaN key; siblings share tiles with it."""
    case = branches(40, 6, heads=4, kv_heads=1, head_dim=64)
    packed = Tree.make(case, name)
    clean = attend(packed, cut, dtype=torch.bfloat16)
    slot = torch.tensor([case.plan.only_row(1).page_indices[-1] * 16])
    keys = packed.sides[0]
    codes, scales = keys.read_slots(slot)
    nan = keys.encode(torch.full((1, 1, 64), float("nan")))
    keys.write_slots(slot, codes if scales.numel() else nan[0], torch.full_like(scales, 255))
    out = attend(packed, cut, dtype=torch.bfloat16)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3, 4, 5]], clean[[0, 2, 3, 4, 5]])


DETERMINISTIC = {
    "branches": lambda dim: branches(700, 24, heads=8, kv_heads=2, head_dim=dim),
    "random": lambda dim: tree(11, dim, heads=4, kv_heads=1),
    "prompt": lambda dim: TreeCase(
        [Segment(None, 0, 600, 150)], heads=4, kv_heads=1, head_dim=dim
    ),
}  # fmt: skip


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp8", "k8v4", "tq3"])
@pytest.mark.parametrize("shape", list(DETERMINISTIC))
def test_a_row_has_the_same_bits_in_any_company_at_fixed_cuts(kernel, name, shape, window):
    case = DETERMINISTIC[shape](128 if name == "k8v4" else 64)
    packed = Tree.make(case, name)
    query = packed.query(torch.bfloat16)

    def run(cut, q=query, **options):
        return kernel(packed, cut, dtype=torch.bfloat16, window=window, q=q, **options)

    together = run(EXACT)
    assert torch.equal(run(Cut(128, 7, True)), together), "another tile and other workers"
    assert torch.equal(run(Cut(64, 9, True), plan=case.plan.flat()), together), "nothing shared"
    assert torch.equal(run(Cut(64, 2, True), plan=case.plan.cut(16)), together), "nodes of a page"
    for row in range(0, len(case.q), 29):
        plan, q = case.plan.only_row(row), query[row : row + 1]
        assert torch.equal(run(EXACT, plan=plan, q=q)[0], together[row]), "alone"


def test_cuts_by_load_do_change_bits(kernel):
    """The comparison above means something: other cuts give other roundings."""
    packed = Tree.make(DETERMINISTIC["branches"](64), "tq4")
    assert not torch.equal(
        kernel(packed, Cut(64, 33), dtype=torch.bfloat16),
        kernel(packed, EXACT, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("name", ["tq4", "k8v4", "mxfp8", "bf16"])
def test_the_twin_agrees_with_the_packed_kernels_of_the_cpu(name):
    """Both paths, each with its own layout, on the same K and V."""
    case = tree(4)
    packed = PackedCase(case, name)
    on_cpu = attend_on_cpu(reference.ReferenceKernels(), packed)
    device = Tree.make(case, name)
    for ours, theirs in zip(device.sides, (packed.k_pages, packed.v_pages), strict=True):
        if ours.signs is not None:  # the CPU's pool has one layer, this one three
            ours.signs.copy_(theirs.signs)
    device = Tree(case, _refill(device, case))
    out = Runner("twin")(device)
    torch.testing.assert_close(out, on_cpu, rtol=2e-5, atol=2e-5)


def _refill(device: Tree, case: TreeCase):
    keys = case.k_pages.permute(0, 3, 1, 2)
    values = case.v_pages.permute(0, 2, 1, 3)
    page, offset = (~keys[:, :, 0, 0].isnan()).nonzero(as_tuple=True)
    slots = page * case.page_size + offset
    for side, vectors in zip(device.sides, (keys, values), strict=True):
        side.write_slots(slots, *side.encode(vectors[page, offset]))
    return device.pool


def test_a_mean_of_keys_changes_no_weights(attend):
    case = tree(12)
    mean = torch.linspace(-1, 1, 128).reshape(2, 64)
    plain, centred = Tree.make(case, "fp32"), Tree.make(case, "fp32", mean)
    outs = [attend(packed, dtype=torch.float32) for packed in (plain, centred)]
    torch.testing.assert_close(*outs, rtol=5e-5, atol=5e-5)
    assert not torch.equal(plain.pool.data, centred.pool.data)


def test_no_rows_is_no_work(attend):
    pool = make_pool("tq4")
    keys, values = pool.layers[1]
    empty = torch.empty(0, 6, 64)
    tensors = [empty, keys.data, torch.empty(0, dtype=torch.int32),
               torch.zeros(16, dtype=torch.int32), torch.empty(4), empty]  # fmt: skip
    on_device = [t.to(attend.device) for t in tensors]
    signs = values.signs.to(attend.device)
    attend.op(*on_device, signs, 0.25, 0, 64, 4, keys.layer_at, 16, 2, 6, 6)


def test_what_has_no_kernel_is_refused_by_name(kernel):
    with pytest.raises(RuntimeError, match="tree_attention_packed: q has head_dim 80"):
        kernel(Tree.make(tree(1, dim=80), "fp8_e4m3"))
    with pytest.raises(RuntimeError, match=r"tree_attention_packed: k_codec is mxfp8, .* got 96"):
        kernel(Tree.make(tree(1, dim=96), "mxfp8"))
    packed = Tree.make(tree(1), "tq4")
    for dtype, tile in ((torch.float32, 8), (torch.bfloat16, 32)):
        with pytest.raises(RuntimeError, match=f"q has head_dim 64 and q_tile is {tile}"):
            kernel(packed, Cut(tile), dtype=dtype)
    with pytest.raises(RuntimeError, match=r"q_tile is 8, .* no room for cells of 16384"):
        kernel(Tree.make(tree(1, dim=128), "fp32"), FEW, dtype=torch.bfloat16)
    object.__setattr__(packed.sides[1], "signs", None)
    with pytest.raises(RuntimeError, match="tree_attention_packed: v_signs"):
        kernel(packed)


def test_the_twin_refuses_a_page_that_is_no_whole_number_of_cells():
    with pytest.raises(InvalidArgument, match="multiple of 16"):
        make_pool("tq4", page_size=8)
