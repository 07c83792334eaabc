"""Norm, rotary embedding, SwiGLU and page copies against plain torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dendrite_engine.errors import InvalidArgument

NAN = float("nan")
ROWS = [0, 1, 17, 200]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ints(*values):
    return np.array(values, np.int32)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 576])
def test_norm_matches_torch(ops, rows, width):
    x, weight = randn(rows, width), randn(width, seed=1)
    out = torch.full_like(x, NAN)
    ops.add_rms_norm(x, None, weight, 1e-5, out)
    expected = torch.nn.functional.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_norm_adds_into_the_residual_first(ops, rows):
    x, residual, weight = randn(rows, 96), randn(rows, 96, seed=2), randn(96, seed=1)
    total, out = x + residual, torch.full((rows, 96), NAN)
    ops.add_rms_norm(x, residual, weight, 1e-6, out)
    assert torch.equal(residual, total)
    expected = torch.nn.functional.rms_norm(total.double(), (96,), weight.double(), 1e-6)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)


def test_norm_may_write_over_its_input(ops):
    x, weight = randn(9, 48), randn(48, seed=1)
    apart = torch.empty_like(x)
    ops.add_rms_norm(x, None, weight, 1e-5, apart)
    ops.add_rms_norm(x, None, weight, 1e-5, x)
    assert torch.equal(x, apart)


def test_a_row_of_a_norm_does_not_depend_on_its_batch(native):
    x, weight = randn(300, 100), randn(100, seed=1)
    together, alone = torch.empty_like(x), torch.empty(1, 100)
    native.add_rms_norm(x, None, weight, 1e-5, together)
    for row in (0, 7, 299):
        native.add_rms_norm(x[row : row + 1], None, weight, 1e-5, alone)
        assert torch.equal(alone[0], together[row])


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * torch.cat((cos, cos), -1) + turned * torch.cat((sin, sin), -1)


def rope_case(rows, dim, page_size=16, heads=3, kv_heads=2):
    case = {
        "qkv": randn(rows, (heads + 2 * kv_heads) * dim),
        "positions": np.random.default_rng(0).integers(0, 50, rows).astype(np.int32),
        "cos": randn(50, dim // 2, seed=3),
        "sin": randn(50, dim // 2, seed=4),
        "slots": np.random.default_rng(1).permutation(6 * page_size)[:rows].astype(np.int32),
        "k_pages": torch.full((6, kv_heads, dim, page_size), NAN),
        "v_pages": torch.full((6, kv_heads, page_size, dim), NAN),
        "q_out": torch.full((rows, heads, dim), NAN),
    }
    case["slots"][1::3] = -1
    return case


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize(
    ("dim", "page_size"), [(2, 8), (8, 16), (64, 16), (80, 8), (128, 32), (256, 16)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_rotates_and_stores(ops, rows, dim, page_size, normed):
    case = rope_case(rows, dim, page_size)
    norms = {"q_norm": randn(dim, seed=5), "k_norm": randn(dim, seed=6), "eps": 1e-6}
    ops.rope_store_kv(**case, **(norms if normed else {}))
    states = case["qkv"].double().reshape(rows, 7, dim)
    query, key, value = states[:, :3], states[:, 3:5], states[:, 5:]
    if normed:
        rms_norm = torch.nn.functional.rms_norm
        query = rms_norm(query, (dim,), norms["q_norm"].double(), 1e-6)
        key = rms_norm(key, (dim,), norms["k_norm"].double(), 1e-6)
    at = torch.from_numpy(case["positions"]).long()
    cos, sin = case["cos"][at][:, None].double(), case["sin"][at][:, None].double()
    close = {"rtol": 3e-6, "atol": 3e-6}
    torch.testing.assert_close(case["q_out"].double(), rotate(query, cos, sin), **close)
    keys = rotate(key, cos, sin)
    stored = [slot for slot in case["slots"].tolist() if slot >= 0]
    for row, slot in enumerate(case["slots"].tolist()):
        if slot >= 0:
            page, offset = divmod(slot, page_size)
            k_slot = case["k_pages"][page, :, :, offset].double()
            torch.testing.assert_close(k_slot, keys[row], **close)
            assert torch.equal(case["v_pages"][page, :, offset].double(), value[row])
    untouched = 6 * page_size - len(stored)
    assert int(torch.isnan(case["k_pages"]).sum()) == untouched * 2 * dim
    assert int(torch.isnan(case["v_pages"]).sum()) == untouched * 2 * dim


def test_integer_arrays_may_be_torch_tensors(ops):
    case, again = rope_case(6, 16), rope_case(6, 16)
    ops.rope_store_kv(**case)
    for name in ("positions", "slots"):
        again[name] = torch.from_numpy(again[name])
    ops.rope_store_kv(**again)
    assert torch.equal(case["q_out"], again["q_out"])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("positions", 50, r"positions\[2\] = 50"),
        ("positions", -1, r"positions\[2\] = -1"),
        ("slots", 96, r"slots\[2\] = 96"),
        ("slots", -2, r"slots\[2\] = -2"),
    ],
)
def test_rope_refuses_positions_and_slots_outside_their_tables(ops, name, value, message):
    case = rope_case(4, 16)
    case[name][2] = value
    with pytest.raises(InvalidArgument, match=message):
        ops.rope_store_kv(**case)


def test_integer_arrays_of_another_type_or_length_are_refused(native):
    case = rope_case(4, 16)
    with pytest.raises(InvalidArgument, match="positions has format 'l'"):
        native.rope_store_kv(**{**case, "positions": case["positions"].astype(np.int64)})
    with pytest.raises(InvalidArgument, match="slots has 3 entries, 4 are needed"):
        native.rope_store_kv(**{**case, "slots": case["slots"][:3]})


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [1, 5, 64, 1536])
def test_silu_mul_matches_torch(ops, rows, width):
    gate_up = randn(rows, 2 * width) * 4
    out = torch.full((rows, width), NAN)
    ops.silu_mul(gate_up, out)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


def test_silu_mul_of_extreme_gates_is_finite(ops):
    gates = torch.tensor([[-1e30, -500.0, -88.0, 0.0, 88.0, 500.0, 1e30]])
    out = torch.empty(1, 7)
    ops.silu_mul(torch.cat((gates, torch.ones(1, 7)), dim=1), out)
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 88.0, 500.0, 1e30]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_the_exponential_is_accurate_to_the_last_bits(native):
    """Below -17, silu(x) is x / exp(-x) in fp32, so its error is that of exp and one division."""
    x = torch.linspace(-80, -17, 40_000).reshape(1, -1)
    out = torch.empty_like(x)
    native.silu_mul(torch.cat((x, torch.ones_like(x)), dim=1), out)
    exact = x.double() / torch.exp(-x.double())
    assert float(((out.double() - exact) / exact).abs().max()) < 2.6e-7


def test_a_value_gives_the_same_bits_in_every_lane(native):
    for width in (1, 3, 16, 37):
        gate_up, out = torch.full((2, 2 * width), -3.7), torch.empty(2, width)
        native.silu_mul(gate_up, out)
        one = torch.empty(1, 1)
        native.silu_mul(torch.full((1, 2), -3.7), one)
        assert torch.equal(out, one.expand_as(out))


def test_nan_passes_through(ops):
    gate_up, out = torch.ones(1, 40), torch.empty(1, 20)
    gate_up[0, 3] = NAN
    ops.silu_mul(gate_up, out)
    assert torch.isnan(out).nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("page_size", [8, 16, 32])
@pytest.mark.parametrize("copies", [[], [(0, 3, 5)], [(0, 3, 5), (1, 4, 0), (2, 5, 8), (0, 2, 1)]])
def test_copy_pages_copies_the_used_slots_of_every_layer(ops, page_size, copies):
    k_all, v_all = randn(3, 6, 2, 8, page_size), randn(3, 6, 2, page_size, 8, seed=1)
    k_want, v_want = k_all.clone(), v_all.clone()
    for source, target, used in copies:
        k_want[:, target, ..., :used] = k_want[:, source, ..., :used]
        v_want[:, target, :, :used] = v_want[:, source, :, :used]
    ops.copy_pages(k_all, v_all, np.array(copies, np.int32).reshape(-1, 3))
    assert torch.equal(k_all, k_want)
    assert torch.equal(v_all, v_want)


@pytest.mark.parametrize("copy", [(6, 0, 1), (0, -1, 1), (0, 1, 17)])
def test_copy_pages_refuses_pages_and_slots_that_do_not_exist(native, copy):
    k_all, v_all = randn(1, 6, 2, 8, 16), randn(1, 6, 2, 16, 8)
    with pytest.raises(InvalidArgument, match="copies"):
        native.copy_pages(k_all, v_all, np.array([copy], np.int32))


def test_row_kernels_refuse_tensors_of_the_wrong_shape(native):
    x = randn(4, 32)
    with pytest.raises(InvalidArgument, match="weight"):
        native.add_rms_norm(x, None, randn(31), 1e-5, x)
    with pytest.raises(InvalidArgument, match="residual"):
        native.add_rms_norm(x, randn(3, 32), randn(32), 1e-5, x)
    with pytest.raises(InvalidArgument, match="gate_up"):
        native.silu_mul(x, randn(4, 15))
    with pytest.raises(InvalidArgument, match="v_all"):
        native.copy_pages(randn(1, 2, 1, 8, 16), randn(1, 2, 1, 8, 16), ints(0, 1, 1).reshape(1, 3))
    with pytest.raises(InvalidArgument, match=r"copies must be \[C, 3\]"):
        native.copy_pages(randn(1, 2, 1, 8, 16), randn(1, 2, 1, 16, 8), ints(0, 1, 1))
    case = rope_case(4, 16)
    with pytest.raises(InvalidArgument, match="qkv"):
        native.rope_store_kv(**{**case, "qkv": case["qkv"][:, 1:].contiguous()})
