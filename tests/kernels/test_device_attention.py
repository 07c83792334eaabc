"""tree_attention of the device path against dense float64 attention: the twin, the kernels' source
in the emulator, and, marked `cuda`, the GPU.
"""

from __future__ import annotations

import pytest
import torch
from device_cases import make_target
from tree_cases import FakePlan, Segment, TreeCase, random_segments
from work_cases import Cut, attend_device, cut_work, device_pages

from dendrite_engine.kernels import device_reference_attention

FAST, WIDE, EXACT = Cut(), Cut(q_tile=128, workers=3), Cut(deterministic=True)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
HALF = [torch.bfloat16, torch.float16]


class Runner:
    """Attends with one implementation."""

    def __init__(self, name: str) -> None:
        if name == "twin":
            self.op, self.device = device_reference_attention.tree_attention, "cpu"
        else:
            target = make_target(name)
            self.op, self.device = target.ops.tree_attention, target.device
        self.name = name

    def __call__(self, case: TreeCase, cut: Cut = FAST, **options) -> torch.Tensor:
        return attend_device(self.op, case, cut, device=self.device, **options)

    def check(self, case: TreeCase, cut: Cut = FAST, dtype=torch.float32, window=0) -> None:
        if cut.q_tile == 128 and self.name != "twin" and wide_is_missing(case, dtype):
            cut = Cut(workers=cut.workers, deterministic=cut.deterministic)
        out = self(case, cut, dtype=dtype, window=window)
        expected = case.expected(0.25, window)
        assert not out.isnan().any()
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def wide_is_missing(case: TreeCase, dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or case.head_dim == 256


@pytest.fixture(params=["twin", "emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def attend(request) -> Runner:
    return Runner(request.param)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernel(request) -> Runner:
    return Runner(request.param)


def tree(seed: int, dim: int = 64, **options) -> TreeCase:
    case = TreeCase(random_segments(seed), seed=seed, head_dim=dim, **options)
    case.q *= 8 * dim**-0.5
    return case


def branches(prefix: int, count: int, **options) -> TreeCase:
    segments = [Segment(None, 0, prefix, 0)]
    segments += [Segment(0, prefix, 1 + n % 37, 1) for n in range(count)]
    return TreeCase(segments, **options)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("cut", [FAST, WIDE, EXACT], ids=["fast", "wide", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_random_trees_match_dense_attention(attend, dim, dtype, cut, window):
    attend.check(tree(dim + window, dim), cut, dtype, window)


@pytest.mark.parametrize("page_size", [1, 2, 4, 8, 16, 32, 64, 256])
def test_any_page_size_works(attend, page_size):
    attend.check(tree(6, page_size=page_size), WIDE, torch.bfloat16)
    attend.check(tree(7, page_size=page_size))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1), (32, 2), (64, 1)])
def test_any_group_of_query_heads_works(attend, heads, kv_heads):
    attend.check(tree(3, heads=heads, kv_heads=kv_heads), FAST, torch.bfloat16)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 63, 64, 65, 511, 512, 513, 8193])
def test_lengths_around_page_tile_and_cut_edges_work(attend, length):
    segments = [Segment(None, 0, length, min(length, 3))]
    segments += [Segment(0, length, n, 1) for n in (1, 2, 15, 16, 17)]
    case = TreeCase(segments, heads=4, kv_heads=1, head_dim=64)
    for cut in (FAST, EXACT):
        attend.check(case, cut, torch.bfloat16)


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_any_number_of_workers_works(attend, workers):
    case = branches(530, 40, heads=4, kv_heads=1, head_dim=128)
    attend.check(case, Cut(workers=workers), torch.bfloat16)


def test_prompts_below_a_shared_prefix_match_dense_attention(attend):
    segments = [Segment(None, 0, 283, 5), Segment(0, 283, 150, 150), Segment(0, 283, 41, 41)]
    attend.check(TreeCase(segments, heads=4, kv_heads=2, head_dim=64), WIDE, torch.bfloat16)


@pytest.mark.parametrize("window", [1, 16, 17, 64, 300, 5000])
def test_a_sliding_window_hides_older_tokens(attend, window):
    segments = [Segment(None, 0, 300, 20), Segment(0, 300, 290, 40), Segment(0, 300, 7, 7)]
    case = TreeCase(segments, heads=2, kv_heads=1, head_dim=64)
    attend.check(case, FAST, torch.bfloat16, window)


@pytest.mark.parametrize("dtype", HALF)
def test_large_scores_do_not_overflow(attend, dtype):
    case = tree(2)
    case.q *= 30
    out = attend(case, dtype=dtype)
    values = case.v_pages[~case.v_pages.isnan()]
    assert out.isfinite().all()
    assert out.abs().max() <= values.abs().max() * 1.01


def test_scores_that_keep_growing_update_the_maximum(attend):
    """Every later token scores higher, by far more than the lazy update lets pass."""
    case = TreeCase([Segment(None, 0, 400, 2)], heads=1, kv_heads=1, head_dim=64)
    case.q[:] = 4.0
    grow = (torch.arange(400) // 2) / 16  # exact in bf16
    plan = case.plan
    keys = torch.zeros_like(case.k_pages[:, 0])  # [pages, head_dim, page_size]
    for node in plan.nodes():
        for i, page in enumerate(node[4]):
            at = node[0] + 16 * i
            used = grow[at : at + 16]
            keys[page, :, : len(used)] = used
    case.k_pages = torch.where(case.k_pages.isnan(), case.k_pages, keys[:, None])
    path = case._paths[0][0]
    path[:] = grow.numpy()[:, None, None]
    attend.check(case, FAST, torch.bfloat16)


def test_padding_rows_are_left_alone(attend):
    case = branches(100, 5, heads=4, kv_heads=2, head_dim=64)
    work, slots, _ = cut_work(case.plan, 16, 2, FAST, rows=8)
    q = torch.full((8, 4, 64), float("nan"))
    q[:5] = case.q
    k, v = device_pages(case, torch.float32)
    positions = torch.zeros(8, dtype=torch.int32)
    positions[:5] = torch.from_numpy(case.plan.positions)
    out = torch.full_like(q, float("nan"))
    partials = torch.full((slots * 2 * 64 * 66 + 4,), float("nan"))
    tensors = [t.to(attend.device) for t in (q, k, v, positions, work, partials, out)]
    attend.op(*tensors, 0.25, 0, 64, 4)
    result = tensors[-1].cpu()
    torch.testing.assert_close(result[:5].double(), case.expected(0.25), rtol=2e-5, atol=2e-5)
    assert result[5:].isnan().all()


def test_nan_keys_of_one_branch_stay_in_that_branch(attend):
    """Stores turn a value that is not finite into a NaN key; siblings share tiles with it."""
    case = branches(40, 6, heads=4, kv_heads=1, head_dim=64)
    clean = attend(case, dtype=torch.bfloat16)
    page = case.plan.only_row(1).page_indices[-1]
    case.k_pages[page, :, 0, 0] = float("nan")
    out = attend(case, dtype=torch.bfloat16)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3, 4, 5]], clean[[0, 2, 3, 4, 5]])


DETERMINISTIC = {
    "branches": lambda dim: branches(1300, 40, heads=8, kv_heads=2, head_dim=dim),
    "uneven": lambda dim: TreeCase(
        [Segment(None, 0, 700, 0)]
        + [Segment(0, 700, 1 + n * 97 % 600, 1) for n in range(24)],
        heads=4, kv_heads=1, head_dim=dim,
    ),
    "random": lambda dim: tree(11, dim, heads=4, kv_heads=1),
    "prompt": lambda dim: TreeCase(
        [Segment(None, 0, 1100, 300)], heads=4, kv_heads=1, head_dim=dim
    ),
    "nested": lambda dim: TreeCase(
        [Segment(None, 0, 90, 4), Segment(0, 90, 600, 30), Segment(1, 690, 5, 5),
         Segment(1, 690, 140, 2), Segment(0, 90, 1, 1)],
        heads=8, kv_heads=2, head_dim=dim,
    ),
}  # fmt: skip


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", list(DETERMINISTIC))
def test_a_row_has_the_same_bits_in_any_company_at_fixed_cuts(kernel, name, dim, window):
    case = DETERMINISTIC[name](dim)
    case.q *= 3

    def run(cut, **options):
        return kernel(case, cut, dtype=torch.bfloat16, window=window, **options)

    together = run(EXACT)
    assert torch.equal(run(Cut(128, 7, True)), together), "another tile and other workers"
    assert torch.equal(run(Cut(64, 9, True), plan=case.plan.flat()), together), "nothing shared"
    assert torch.equal(run(Cut(64, 2, True), plan=case.plan.cut(16)), together), "nodes of a page"
    for row in range(0, len(case.q), 29):
        plan, q = case.plan.only_row(row), case.q[row : row + 1]
        assert torch.equal(run(EXACT, plan=plan, q=q)[0], together[row]), "alone"


def test_cuts_by_load_do_change_bits(kernel):
    """The comparison above means something: other cuts give other roundings."""
    case = DETERMINISTIC["branches"](64)
    assert not torch.equal(
        kernel(case, Cut(64, 33), dtype=torch.bfloat16), kernel(case, EXACT, dtype=torch.bfloat16)
    )


def test_shapes_without_a_kernel_are_refused_by_name(kernel):
    case = tree(1, dim=80)
    with pytest.raises(RuntimeError, match="tree_attention: q has head_dim 80"):
        kernel(case)
    with pytest.raises(RuntimeError, match="q_tile is 128"):
        kernel(tree(1), WIDE)


def test_no_rows_is_no_work(attend):
    case = TreeCase([Segment(None, 0, 20, 0)], head_dim=64)
    work = torch.zeros(16, dtype=torch.int32)
    k, v = device_pages(case, torch.float32)
    empty = torch.empty(0, 6, 64)
    tensors = [empty, k, v, torch.empty(0, dtype=torch.int32), work, torch.empty(4), empty]
    attend.op(*(t.to(attend.device) for t in tensors), 0.25, 0, 64, 4)


def test_a_plan_may_list_nodes_that_no_row_reads(attend):
    case = tree(4)
    nodes = [*case.plan.nodes(), (0, 16, 1, 1, [0]), (32, 0, 0, 1, [])]
    plan = FakePlan.from_nodes(case.plan.positions, nodes)
    assert torch.equal(attend(case, plan=plan), attend(case))
