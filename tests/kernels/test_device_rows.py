"""Row kernels and page copies of the device path against their torch twins."""

from __future__ import annotations

import pytest
import torch
from device_cases import DTYPES, NAN, Target, assert_close, same_bits

from dendrite_engine.kernels import device_reference as twin

ROWS = [0, 1, 3, 17]
WIDTHS = [4, 48, 576, 2048, 4096, 8200]


def both(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [4, 48, 576, 4096])
def test_embed_copies_rows_of_the_table(target: Target, rows, width, dtype):
    table = target.randn(11, width, dtype=dtype)
    ids = target.ints([(5 * row) % 11 for row in range(rows)])
    out, want = target.poisoned(2, rows, width)
    target.ops.embed(ids, table, out)
    twin.embed(ids, table, want)
    assert torch.equal(out, want)


def test_embed_gives_nan_for_a_token_outside_the_table_and_harms_no_other_row(target: Target):
    table = target.randn(11, 16)
    (out,) = target.poisoned(1, 4, 16)
    target.ops.embed(target.ints([0, -1, 11, 10]), table, out)
    assert torch.isnan(out[1:3]).all()
    assert torch.equal(out[[0, 3]], table[[0, 10]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_x", [False, True])
def test_norm_takes_in_x_and_norms_the_sum(target: Target, rows, width, dtype, with_x):
    residual = target.randn(rows, width, seed=1)
    x = target.randn(rows, width, dtype=dtype, seed=2) if with_x else None
    weight = target.randn(width, dtype=dtype, seed=3)
    (kept,) = both([residual])
    out, want = target.poisoned(2, rows, width, dtype=dtype)
    target.ops.add_rms_norm(x, residual, weight, 1e-5, out)
    twin.add_rms_norm(x, kept, weight, 1e-5, want, None)
    assert torch.equal(residual, kept)
    assert_close(out, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [[], [2], [4, 0, 0, 3], [-1, 5, 1]])
@pytest.mark.parametrize("with_x", [False, True])
def test_norm_of_chosen_rows_leaves_the_residual_alone(target: Target, chosen, dtype, with_x):
    residual = target.randn(5, 576, seed=1)
    x = target.randn(5, 576, dtype=dtype, seed=2) if with_x else None
    weight = target.randn(576, dtype=dtype, seed=3)
    (before,) = both([residual])
    out, want = target.poisoned(2, len(chosen), 576, dtype=dtype)
    rows = target.ints(chosen)
    target.ops.add_rms_norm(x, residual, weight, 1e-6, out, rows)
    twin.add_rms_norm(x, residual, weight, 1e-6, want, rows)
    assert_close(out, want)
    assert torch.equal(residual, before)
    outside = [i for i, row in enumerate(chosen) if not 0 <= row < 5]
    assert torch.count_nonzero(out[outside]) == 0


@pytest.mark.parametrize("width", [576, 4096])
def test_a_normed_row_has_the_same_bits_alone_and_among_others(target: Target, width):
    x = target.randn(40, width, dtype=torch.bfloat16, seed=2)
    residual = target.randn(40, width, seed=1)
    weight = target.randn(width, dtype=torch.bfloat16, seed=3)
    together = torch.empty_like(x)
    alone = torch.empty_like(x[:1])
    target.ops.add_rms_norm(x, residual.clone(), weight, 1e-5, together)
    for row in (0, 13, 39):
        one = slice(row, row + 1)
        target.ops.add_rms_norm(x[one], residual[one].clone(), weight, 1e-5, alone)
        assert same_bits(alone, together[one])


def test_a_row_that_is_not_finite_harms_no_other(target: Target):
    residual = target.randn(3, 64)
    residual[1, 5] = float("inf")
    weight = target.randn(64, dtype=torch.float16)
    out, clean = target.poisoned(2, 3, 64, dtype=torch.float16)
    target.ops.add_rms_norm(None, residual, weight, 1e-5, out)
    residual[1] = 0.0
    target.ops.add_rms_norm(None, residual, weight, 1e-5, clean)
    assert same_bits(out[[0, 2]], clean[[0, 2]])
    assert torch.isnan(out[1]).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [8, 80, 1536, 5640])
def test_silu_mul_matches_its_twin(target: Target, rows, width, dtype):
    gate_up = target.randn(rows, 2 * width, dtype=dtype)
    gate_up *= 4
    out, want = target.poisoned(2, rows, width, dtype=dtype)
    target.ops.silu_mul(gate_up, out)
    twin.silu_mul(gate_up, want)
    assert_close(out, want)


def test_silu_mul_of_extreme_gates(target: Target):
    gates = [-1e30, -500.0, -88.0, 0.0, 88.0, 500.0, 1e30, NAN]
    gate_up = target.put(torch.tensor([gates + [1.0] * 8]))
    (out,) = target.poisoned(1, 1, 8)
    target.ops.silu_mul(gate_up, out)
    assert out[0, :6].tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, 88.0, 500.0], abs=1e-30)
    assert float(out[0, 6]) == pytest.approx(1e30)
    assert torch.isnan(out[0, 7])


def test_a_gated_row_has_the_same_bits_alone_and_among_others(target: Target):
    gate_up = target.randn(9, 160, dtype=torch.bfloat16)
    together, alone = target.poisoned(2, 9, 80, dtype=torch.bfloat16)
    target.ops.silu_mul(gate_up, together)
    for row in range(9):
        target.ops.silu_mul(gate_up[row : row + 1], alone[row : row + 1])
    assert same_bits(alone, together)


COPIES = [
    [],
    [(0, 3, 5)],
    [(0, 3, 5), (1, 4, 0), (2, 5, 8), (0, 6, 1)],
    [(0, 3, 8), (0, 4, 7), (-1, 5, 8), (1, 7, 8), (1, 6, 99)],  # of seven pages
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize("dim", [8, 96])
def test_copy_pages_copies_the_used_slots_of_every_layer(
    target: Target, page_size, copies, dtype, dim
):
    k_all = target.randn(3, 7, 2, page_size, dim, dtype=dtype)
    v_all = target.randn(3, 7, 2, page_size, dim, dtype=dtype, seed=1)
    pages, want = [k_all, v_all], both([k_all, v_all])
    listed = target.ints([*copies, (0, 2, 4)])  # one more than there are
    count = target.ints([len(copies)])
    target.ops.copy_pages(*pages, listed, count)
    twin.copy_pages(*want, listed, count)
    assert torch.equal(k_all, want[0])
    assert torch.equal(v_all, want[1])


@pytest.mark.parametrize("count", [-1, 0, 1, 2, 99])
def test_copy_pages_reads_the_count_on_the_device(target: Target, count):
    k_all, v_all = target.randn(2, 5, 1, 16, 64), target.randn(2, 5, 1, 16, 64, seed=1)
    before = k_all.clone()
    copies = target.ints([(0, 3, 16), (1, 4, 16)])
    target.ops.copy_pages(k_all, v_all, copies, target.ints([count]))
    assert torch.equal(k_all[:, 3], before[:, 0 if count >= 1 else 3])
    assert torch.equal(k_all[:, 4], before[:, 1 if count >= 2 else 4])


def test_more_copies_than_warps(target: Target):
    k_all, v_all = target.randn(4, 80, 2, 8, 8), target.randn(4, 80, 2, 8, 8, seed=1)
    before = k_all.clone()
    copies = target.ints([(i, 40 + i, 1 + i % 8) for i in range(40)])
    target.ops.copy_pages(k_all, v_all, copies, target.ints([40]))
    want = [before, v_all.clone()]
    twin.copy_pages(*want, copies, target.ints([40]))
    assert torch.equal(k_all, want[0])


def test_mistakes_are_refused_with_the_names_of_op_and_argument(target: Target):
    f32 = target.randn(4, 32)
    bf16 = target.randn(4, 32, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"add_rms_norm: weight must have the shape \[32\]"):
        target.ops.add_rms_norm(None, f32, target.randn(31), 1e-5, bf16)
    with pytest.raises(RuntimeError, match=r"add_rms_norm: x must be BFloat16, got Float"):
        target.ops.add_rms_norm(f32, f32, bf16[0], 1e-5, bf16)
    with pytest.raises(RuntimeError, match=r"add_rms_norm: residual must have rows of a multiple"):
        target.ops.add_rms_norm(None, target.randn(4, 30), target.randn(30), 1e-5, f32)
    with pytest.raises(RuntimeError, match=r"silu_mul: gate_up must have the shape \[4, 64\]"):
        target.ops.silu_mul(f32, f32)
    with pytest.raises(RuntimeError, match=r"silu_mul: out must be contiguous"):
        target.ops.silu_mul(f32, f32.view(8, 16)[:, :8])
    with pytest.raises(RuntimeError, match=r"silu_mul: out must start at a multiple of 16"):
        target.ops.silu_mul(f32, f32.view(-1)[1:65].view(4, 16))
    with pytest.raises(RuntimeError, match=r"embed: token_ids must be Int, got Long"):
        target.ops.embed(target.ints([1, 2, 3, 0]).long(), f32, f32.clone())
    with pytest.raises(RuntimeError, match=r"embed: table must be fp32, fp16 or bf16"):
        target.ops.embed(target.ints([1, 2, 3, 0]), f32.double(), f32.clone())
