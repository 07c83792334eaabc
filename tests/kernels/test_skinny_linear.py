"""Products of a few rows: kernels against their twins, and rows against each other."""

from __future__ import annotations

import ctypes

import pytest
import torch
from device_cases import Target, assert_close, make_target, same_bits

from dendrite_engine.kernels import device_ops
from dendrite_engine.kernels import device_reference_linear as twin

HALVES = [torch.float16, torch.bfloat16]
ROWS = [1, 2, 7, 8, 9, 15, 16]
# Outputs and inputs: tails in both, fewer inputs than slices, and more outputs than one round.
SHAPES = [(1, 8), (37, 200), (100, 576), (16, 704), (130, 1032), (515, 72)]


def scaled(target: Target, *shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers whose products add up to about one."""
    return target.put(target.randn(*shape, seed=seed).mul_(shape[-1] ** -0.25).to(dtype))


def tolerance(target: Target) -> float:
    """For fp32 results: tensor cores cut off what twins round."""
    return 8.0 if target.device == "cuda" else 1.0


def operands(target: Target, rows: int, outputs: int, inputs: int, dtype=torch.bfloat16):
    x = scaled(target, rows, inputs, dtype=dtype, seed=1)
    return x, scaled(target, outputs, inputs, dtype=dtype, seed=2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_those_of_the_twin(target: Target, rows, outputs, inputs):
    x, weight = operands(target, rows, outputs, inputs)
    out, want = target.poisoned(2, rows, outputs)
    target.ops.skinny_linear(x, weight, None, out)
    twin.skinny_linear(x, weight, None, want)
    assert_close(out, want, tolerance(target))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fp32_out", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 12])
def test_bias_and_types(target: Target, rows, dtype, fp32_out):
    x, weight = operands(target, rows, 75, 328, dtype)
    bias = target.randn(75, dtype=dtype, seed=3)
    out_dtype = torch.float32 if fp32_out else dtype
    out, want = target.poisoned(2, rows, 75, dtype=out_dtype)
    target.ops.skinny_linear(x, weight, bias, out)
    twin.skinny_linear(x, weight, bias, want)
    assert_close(out, want, tolerance(target) if fp32_out else 1.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 8), (75, 1032), (300, 200)])
def test_gating_in_the_product_is_gating_after_it(target: Target, rows, outputs, inputs, dtype):
    x, weight = operands(target, rows, 2 * outputs, inputs, dtype)
    out, want = target.poisoned(2, rows, outputs, dtype=dtype)
    (between,) = target.poisoned(1, rows, 2 * outputs, dtype=dtype)
    target.ops.skinny_linear_silu_mul(x, weight, out)
    target.ops.skinny_linear(x, weight, None, between)
    twin.skinny_linear_silu_mul(x, weight, want)
    # A sum next to the middle of two numbers may round to either, before the gating and after.
    assert_close(out, want, scale=4.0)
    if outputs % 8 == 0:
        target.ops.silu_mul(between, want)
        assert same_bits(out, want)


@pytest.mark.parametrize(("outputs", "inputs"), [(130, 1032), (515, 72), (50, 200)])
def test_a_row_has_the_same_bits_beside_any_others(target: Target, outputs, inputs):
    x, weight = operands(target, 16, outputs, inputs)
    (whole,) = target.poisoned(1, 16, outputs)
    target.ops.skinny_linear(x, weight, None, whole)
    for rows in ROWS:
        for first in {0, 16 - rows}:
            (out,) = target.poisoned(1, rows, outputs)
            target.ops.skinny_linear(target.put(x[first : first + rows]), weight, None, out)
            assert same_bits(out, whole[first : first + rows])


def test_a_row_of_nan_stays_one_row(target: Target):
    x, weight = operands(target, 12, 100, 576)
    for rows in (5, 12):
        clean, dirty = target.poisoned(2, rows, 100)
        given = target.put(x[:rows])
        target.ops.skinny_linear(given, weight, None, clean)
        given[3] = float("nan")
        target.ops.skinny_linear(given, weight, None, dirty)
        kept = [row for row in range(rows) if row != 3]
        assert same_bits(dirty[kept], clean[kept])
        assert dirty[3].isnan().all()


@pytest.mark.parametrize(("order", "seed"), [(1, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("rows", [5, 12])
def test_the_order_of_threads_does_not_matter(rows, order, seed):
    target = make_target("emulated")
    x, weight = operands(target, rows, 300, 1032)
    out, want = target.poisoned(2, rows, 300)
    target.ops.skinny_linear(x, weight, None, want)
    library = ctypes.CDLL(str(device_ops.load_emulated().path))
    library.dendrite_emulator_set_order(order, ctypes.c_uint64(seed))
    try:
        target.ops.skinny_linear(x, weight, None, out)
    finally:
        library.dendrite_emulator_set_order(0, ctypes.c_uint64(0))
    assert same_bits(out, want)


def bad_calls(target: Target) -> dict[str, tuple]:
    """Arguments that are refused, by what the message has to say."""
    randn = target.randn
    half = {"dtype": torch.bfloat16}
    x, weight, out = randn(4, 64, **half), randn(6, 64, **half), randn(4, 6)
    return {
        "x must be fp16 or bf16": (randn(4, 64), randn(6, 64), None, out),
        "x must have at most 16 rows, got 17": (randn(17, 64, **half), weight, None, randn(17, 6)),
        "x must have rows of a multiple of 8, got 12": (
            randn(4, 12, **half), randn(6, 12, **half), None, out,
        ),
        "weight must have the shape": (x, randn(6, 56, **half), None, out),
        "weight must be BFloat16": (x, randn(6, 64, dtype=torch.float16), None, out),
        "bias must have the shape": (x, weight, randn(5, **half), out),
        "out must have the shape": (x, weight, None, randn(4, 7)),
        "out must be fp32 or of the dtype of x": (x, weight, None, out.half()),
    }  # fmt: skip


def test_mistakes_are_named(target: Target):
    for message, arguments in bad_calls(target).items():
        with pytest.raises(RuntimeError, match=f"skinny_linear: {message}"):
            target.ops.skinny_linear(*arguments)
    x, weight = operands(target, 4, 7, 64)
    with pytest.raises(RuntimeError, match="as many gates as ups"):
        target.ops.skinny_linear_silu_mul(x, weight, target.randn(4, 3, dtype=x.dtype))
