"""Rotary embedding with QK norm and the K/V store on the device path, against the torch twin."""

from __future__ import annotations

import pytest
import torch
from device_cases import DTYPES, NAN, Target, assert_close, same_bits

from dendrite_engine.kernels import device_reference as twin

PAGES = 6
MAX_POSITION = 50


class Case:
    """Inputs of a batch of tokens, and two sets of poisoned outputs."""

    def __init__(self, target: Target, rows, dim, dtype, page_size=16, heads=3, kv_heads=2):
        self.target = target
        self.qkv = target.randn(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
        self.positions = target.ints([(7 * row) % MAX_POSITION for row in range(rows)])
        self.cos = target.randn(MAX_POSITION, dim // 2, seed=3)
        self.sin = target.randn(MAX_POSITION, dim // 2, seed=4)
        self.norm = target.randn(dim, dtype=dtype, seed=5)
        order = torch.randperm(PAGES * page_size, generator=torch.Generator().manual_seed(1))
        slots = order[:rows].tolist()
        slots[1::3] = [-1] * len(slots[1::3])
        self.slots = target.ints(slots)
        shape = (PAGES, kv_heads, page_size, dim)
        self.keys = target.poisoned(2, *shape, dtype=dtype)
        self.values = target.poisoned(2, *shape, dtype=dtype)
        self.queries = target.poisoned(2, rows, heads, dim, dtype=dtype)

    def run(self, q_norm=None, k_norm=None):
        for i, rope in enumerate((self.target.ops.rope_store_kv, twin.rope_store_kv)):
            rope(
                self.qkv, self.positions, self.cos, self.sin, self.slots, self.keys[i],
                self.values[i], self.queries[i], q_norm, k_norm, 1e-6,
            )  # fmt: skip

    def check(self):
        """Kernel and twin agree, slots that weren't written included (they hold NaN)."""
        for pair in (self.queries, self.keys):
            assert_close(*pair)
        assert same_bits(*self.values)

    def heads_of(self, page_slot):
        page, offset = divmod(page_slot, self.keys[0].shape[2])
        return self.keys[0][page, :, offset], self.values[0][page, :, offset]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 13])
@pytest.mark.parametrize(
    ("dim", "page_size"),
    [(8, 16), (16, 8), (24, 16), (64, 16), (80, 8), (96, 16), (128, 32), (248, 16), (256, 16)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_rotates_and_stores(target: Target, rows, dim, page_size, dtype, normed):
    case = Case(target, rows, dim, dtype, page_size)
    case.run(*((case.norm, case.norm.flip(0)) if normed else ()))
    case.check()
    stored = int((case.slots >= 0).sum())
    for pages in (case.keys[0], case.values[0]):
        assert int(torch.isnan(pages).sum()) == (PAGES * page_size - stored) * 2 * dim


@pytest.mark.parametrize("norms", ["q", "k"])
@pytest.mark.parametrize("dim", [64, 80])
def test_rope_norms_only_queries_or_only_keys(target: Target, norms, dim):
    case = Case(target, 9, dim, torch.bfloat16)
    case.run(case.norm if norms == "q" else None, case.norm if norms == "k" else None)
    case.check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (32, 4), (5, 5)])
def test_rope_serves_every_number_of_heads(target: Target, heads, kv_heads):
    case = Case(target, 5, 64, torch.float16, heads=heads, kv_heads=kv_heads)
    case.run(case.norm, case.norm)
    case.check()


@pytest.mark.parametrize("page_size", [8, 16])
def test_rope_stores_at_both_sides_of_page_boundaries(target: Target, page_size):
    case = Case(target, 5, 16, torch.float32, page_size)
    last = PAGES * page_size - 1
    case.slots.copy_(torch.tensor([0, page_size - 1, page_size, 2 * page_size, last]))
    case.run()
    case.check()
    assert not any(torch.isnan(heads).any() for heads in case.heads_of(last))


def test_slots_and_positions_outside_their_tables_harm_nothing_else(target: Target):
    case = Case(target, 5, 16, torch.float32)
    case.slots.copy_(torch.tensor([3, PAGES * 16, -7, 40, 41]))
    case.positions.copy_(torch.tensor([0, 1, 2, MAX_POSITION, -1]))
    case.run()
    case.check()
    assert torch.isnan(case.queries[0][3:]).all()
    assert torch.isnan(case.heads_of(40)[0]).all()
    assert not torch.isnan(case.queries[0][:3]).any()


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 63, 40])
def test_a_value_that_is_not_finite_shows_only_through_its_own_key(
    target: Target, poison, dtype, place
):
    case = Case(target, 3, 64, dtype, heads=3, kv_heads=2)
    case.slots.copy_(torch.tensor([3, 4, 5]))
    value_heads = case.qkv.view(3, 7, 64)[:, 5:]
    value_heads[1, 0, place] = poison
    case.run(case.norm, case.norm)
    case.check()
    key, value = case.heads_of(4)
    assert torch.count_nonzero(value[0]) == 0
    assert torch.isnan(key[0]).nonzero().tolist() == [[0]]
    assert not torch.isnan(key[1]).any()
    assert same_bits(value[1], value_heads[1, 1])


def test_a_rotated_row_has_the_same_bits_alone_and_among_others(target: Target):
    case = Case(target, 12, 96, torch.bfloat16)
    case.run(case.norm, case.norm)
    keys, values, queries = case.keys[0], case.values[0], case.queries[0]
    for row in (0, 5, 11):
        one = slice(row, row + 1)
        alone = [torch.full_like(tensor, NAN) for tensor in (keys, values, queries[one])]
        target.ops.rope_store_kv(
            case.qkv[one], case.positions[one].clone(), case.cos, case.sin, case.slots[one].clone(),
            *alone, case.norm, case.norm, 1e-6,
        )  # fmt: skip
        assert same_bits(alone[2], queries[one])
        slot = int(case.slots[row])
        if slot >= 0:
            at = (slice(None), slice(None), slot % 16)
            page = slot // 16
            assert same_bits(alone[0][page : page + 1][at], keys[page : page + 1][at])
            assert same_bits(alone[1][page : page + 1][at], values[page : page + 1][at])


def test_mistakes_are_refused_with_the_names_of_op_and_argument(target: Target):
    case = Case(target, 4, 16, torch.float32)
    whole = {
        "qkv": case.qkv, "positions": case.positions, "cos": case.cos, "sin": case.sin,
        "slots": case.slots, "k_pages": case.keys[0], "v_pages": case.values[0],
        "q_out": case.queries[0],
    }  # fmt: skip
    for name, wrong, message in [
        ("qkv", case.qkv[:, 16:].contiguous(), r"qkv must have the shape \[4, 112\]"),
        ("sin", case.sin[:9], r"sin must have the shape \[50, 8\]"),
        ("slots", case.slots[:3], r"slots must have the shape \[4\], got \[3\]"),
        ("v_pages", case.values[0][1:], r"v_pages must have the shape"),
        ("q_out", target.poisoned(1, 4, 3, 12)[0], r"q_out must have heads of a multiple of 8"),
    ]:
        with pytest.raises(RuntimeError, match=f"rope_store_kv: {message}"):
            target.ops.rope_store_kv(**{**whole, name: wrong})
