"""Products of up to 128 rows on Hopper: kernels against their twins, and rows against each other.

They need a GPU of that generation: the emulator has no warpgroup products.
"""

from __future__ import annotations

import pytest
import torch
from device_cases import Target, assert_close, make_target, same_bits

from dendrite_engine.kernels import device_reference_linear as twin

HALVES = [torch.float16, torch.bfloat16]
ROWS = [1, 7, 8, 9, 16, 31, 64, 65, 128]
# Outputs and inputs: tails of both kinds of tiles, few inputs, and shapes of real layers.
SHAPES = [(4, 64), (68, 128), (132, 576), (960, 576), (2560, 2048), (2048, 5632)]

pytestmark = pytest.mark.cuda


@pytest.fixture
def hopper():
    target = make_target("cuda")
    if not target.ops.stream_linear_serves(target.randn(1)):
        pytest.skip("this GPU has no warpgroup products")
    yield target
    torch.cuda.synchronize()
    target.check_guards()


def operands(target: Target, rows: int, outputs: int, inputs: int, dtype=torch.bfloat16):
    x = target.randn(rows, inputs, seed=1).mul_(inputs**-0.25).to(dtype)
    weight = target.randn(outputs, inputs, seed=2).mul_(inputs**-0.25).to(dtype)
    return target.put(x), target.put(weight)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_products_are_those_of_the_twin(hopper: Target, rows, outputs, inputs):
    x, weight = operands(hopper, rows, outputs, inputs)
    out, want = hopper.poisoned(2, rows, outputs)
    torch.cuda.synchronize()  # a weight is read before the kernel ahead has ended
    hopper.ops.stream_linear(x, weight, None, out)
    twin.stream_linear(x, weight, None, want)
    assert_close(out, want, 8.0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("splits", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("rows", [5, 64, 128])
def test_every_plan_gives_the_product(hopper: Target, rows, splits, groups):
    x, weight = operands(hopper, rows, 200, 704)
    out, want = hopper.poisoned(2, rows, 200)
    torch.cuda.synchronize()
    hopper.ops.stream_linear(x, weight, None, out, groups, splits)
    twin.stream_linear(x, weight, None, want)
    assert_close(out, want, 8.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("fp32_out", [False, True])
@pytest.mark.parametrize("rows", [0, 3, 12, 24, 100])
def test_bias_and_types(hopper: Target, rows, dtype, fp32_out):
    x, weight = operands(hopper, rows, 76, 320, dtype)
    bias = hopper.randn(76, dtype=dtype, seed=3)
    out_dtype = torch.float32 if fp32_out else dtype
    out, want = hopper.poisoned(2, rows, 76, dtype=out_dtype)
    torch.cuda.synchronize()
    hopper.ops.stream_linear(x, weight, bias, out)
    twin.stream_linear(x, weight, bias, want)
    assert_close(out, want, 8.0 if fp32_out else 1.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(8, 64), (88, 1024), (5632, 2048)])
def test_gating_gives_the_bits_of_a_product_and_silu_mul(
    hopper: Target, rows, outputs, inputs, groups, dtype
):
    x, weight = operands(hopper, rows, 2 * outputs, inputs, dtype)
    out, want, expected = hopper.poisoned(3, rows, outputs, dtype=dtype)
    (between,) = hopper.poisoned(1, rows, 2 * outputs, dtype=dtype)
    torch.cuda.synchronize()
    splits = 2 if inputs > 64 else 1
    hopper.ops.stream_linear_silu_mul(x, weight, out, groups, splits)
    hopper.ops.stream_linear(x, weight, None, between, 0, splits)
    hopper.ops.silu_mul(between, expected)
    twin.stream_linear_silu_mul(x, weight, want)
    assert same_bits(out, expected)
    assert_close(out, want, 2.0)


@pytest.mark.parametrize("outputs", [76, 2048])
def test_a_row_has_the_same_bits_in_every_batch(hopper: Target, outputs):
    x, weight = operands(hopper, 128, outputs, 1024)
    (whole,) = hopper.poisoned(1, 128, outputs)
    torch.cuda.synchronize()
    hopper.ops.stream_linear(x, weight, None, whole)
    for rows in ROWS:
        first = 128 - rows
        part = hopper.put(x[first:])
        (out,) = hopper.poisoned(1, rows, outputs)
        hopper.ops.stream_linear(part, weight, None, out)
        assert same_bits(out, whole[first:]), rows


def test_what_other_rows_hold_does_not_matter(hopper: Target):
    x, weight = operands(hopper, 64, 132, 576)
    clean, dirty = hopper.poisoned(2, 64, 132)
    torch.cuda.synchronize()
    hopper.ops.stream_linear(x, weight, None, clean)
    x[7] = float("nan")
    x[40] = float("inf")
    hopper.ops.stream_linear(x, weight, None, dirty)
    others = [row for row in range(64) if row not in (7, 40)]
    assert same_bits(dirty[others], clean[others])
    assert dirty[7].isnan().all()


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "extra", "message"),
    [
        (129, 64, 64, (), "x must have at most 128 rows, got 129"),
        (2, 64, 96, (), "x must have rows of a multiple of 64, got 96"),
        (2, 62, 64, (), "weight must have a multiple of 4 rows, got 62"),
        (2, 64, 64, (3, 1), "groups must be 1 or 2, got 3"),
        (2, 64, 128, (1, 3), "splits must be at most 2, got 3"),
    ],
)
def test_bad_arguments_are_named(hopper: Target, rows, outputs, inputs, extra, message):
    x, weight = operands(hopper, rows, outputs, inputs)
    (out,) = hopper.poisoned(1, rows, outputs)
    with pytest.raises(RuntimeError, match=f"stream_linear: {message}"):
        hopper.ops.stream_linear(x, weight, None, out, *extra)
