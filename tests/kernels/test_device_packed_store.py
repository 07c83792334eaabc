"""rope_store_packed and copy_packed: the twin against the CPU path, kernels against the twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from device_cases import DTYPES, NAN, Target, assert_close, same_bits
from device_packed_cases import MAX_POSITION, StoreCase, make_pool, need_packed
from packed_cases import NAMES, PAIRS, make_store

from dendrite_engine import kernels
from dendrite_engine.errors import InvalidArgument, UnknownName
from dendrite_engine.kernels import device_reference_packed as twin
from dendrite_engine.kernels.device_packed import codec, pack_signed, unpack_signed
from dendrite_engine.kernels.device_reference import rope_store_kv

MEAN = torch.linspace(-2, 2, 128).reshape(2, 64)


class TwinTarget(Target):
    """The twin as a target, for cases that need none of the kernels."""

    def __init__(self) -> None:
        from dendrite_engine.kernels.device_ops import DeviceKernels

        super().__init__(DeviceKernels("twin", "for tests"), "cpu")


@pytest.fixture
def store(target: Target) -> Target:
    """The kernels under test, where their library has the store."""
    need_packed(target, "rope_store_packed")
    return target


def cpu_pool(case: StoreCase, name: str):
    """What the CPU path's kernels store of the case's rows."""
    page_size = case.sides()[0].page_size
    pool = make_store(name, num_pages=6, head_dim=case.queries[0].shape[2], page_size=page_size)
    q = torch.empty(case.queries[0].shape)
    kernels.load("auto").rope_store_kv(
        case.qkv, case.positions.numpy(), case.cos, case.sin, case.slots.numpy(),
        *pool.layers[0], q,
    )  # fmt: skip
    return pool, q


@pytest.mark.parametrize("spread", [1.0, 1e-6, 3e3])
@pytest.mark.parametrize("name", NAMES + PAIRS)
def test_the_twin_chooses_the_codes_and_scales_of_the_cpu_path(name, spread):
    """Only the signs of the rotation differ between layers: the case's is layer 1."""
    case = StoreCase(TwinTarget(), name, spread=spread)
    for side in case.sides():
        object.__setattr__(side, "signs", None if side.signs is None else _signs(name, side, case))
    case.store(twin.rope_store_packed)
    pool, q = cpu_pool(case, name)
    slots = case.slots[case.slots >= 0].long()
    for ours, theirs in zip(case.sides(), pool.layers[0], strict=True):
        for mine, other in zip(ours.read_slots(slots), theirs.read(torch.arange(6)), strict=True):
            assert torch.equal(mine, other[slots // 16, :, slots % 16].to(mine.dtype))
    if case.sides()[0].signs is None:
        torch.testing.assert_close(case.queries[0], q, rtol=1e-6, atol=1e-6 * spread)
    assert torch.equal(case.pools[0].data[case.kept()], case.before[case.kept()])


def _signs(name, side, case):
    """The rotation of layer 0, as the CPU's pool of one layer has it."""
    index = 0 if side is case.sides()[0] else 1
    return make_store(name).layers[0][index].signs


@pytest.mark.parametrize("name", NAMES + PAIRS)
@pytest.mark.parametrize("page_size", [16, 32])
def test_pages_take_the_bytes_of_the_cpu_path(name, page_size):
    pool, other = make_pool(name, page_size=page_size), make_store(name, page_size=page_size)
    keys, values = pool.layers[1]
    assert keys.layer_bytes == values.layer_bytes == other.data.shape[1]
    assert pool.layers[2][0].layer_at == pool.layers[1][0].layer_at + keys.layer_bytes
    assert keys.layer_at % 16 == keys.cell_bytes % 16 == keys.scales_at % 16 == 0


@pytest.mark.parametrize("name", NAMES + PAIRS)
def test_whole_pages_and_single_slots_are_read_alike(name):
    case = StoreCase(TwinTarget(), name, rows=60, page_size=32)
    case.store(twin.rope_store_packed)
    slots = torch.arange(6 * 32)
    for side in case.sides():
        whole = side.read(torch.arange(6))
        for part, single in zip(whole, side.read_slots(slots), strict=True):
            assert torch.equal(part[slots // 32, :, slots % 32], single)
        case.before.copy_(side.data)
        side.write(torch.tensor([4, 1]), *(part[[4, 1]] for part in whole))
        assert torch.equal(side.data, case.before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", NAMES + PAIRS)
def test_kernels_store_the_bytes_of_the_twin(store: Target, name, dim, dtype):
    case = StoreCase(store, name, dim=dim, dtype=dtype)
    case.store(store.ops.rope_store_packed)
    case.store(twin.rope_store_packed, 1)
    assert_close(*case.queries)
    assert torch.equal(case.pools[0].data, case.pools[1].data)


@pytest.mark.parametrize(("dim", "page_size"), [(64, 32), (96, 16), (128, 64), (256, 16)])
@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3", "mxfp8", "k8v4", "tq3"])
def test_every_size_is_stored_like_the_twin(store: Target, name, dim, page_size):
    if dim == 96 and name in ("tq3", "k8v4", "mxfp8"):
        name = "fp8_e5m2"  # the others need a power of two or a multiple of 64
    case = StoreCase(store, name, 21, dim, page_size=page_size, dtype=torch.bfloat16)
    case.store(store.ops.rope_store_packed)
    case.store(twin.rope_store_packed, 1)
    assert_close(*case.queries)
    assert torch.equal(case.pools[0].data, case.pools[1].data)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 3e3])
@pytest.mark.parametrize("name", NAMES)
def test_small_and_large_numbers_are_stored_like_the_twin(store: Target, name, spread):
    case = StoreCase(store, name, spread=spread, rows=20)
    case.store(store.ops.rope_store_packed)
    case.store(twin.rope_store_packed, 1)
    assert torch.equal(case.pools[0].data, case.pools[1].data)


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp8", "tq4", "tq3", "tq2"])
def test_keys_are_normed_and_rotated_before_they_are_quantised(store: Target, name, rows):
    """Kernel and twin add in another order, so a code near a boundary may be its neighbour."""
    case = StoreCase(store, name, rows, dtype=torch.bfloat16, turned=True, mean=MEAN)
    for index, op in enumerate((store.ops.rope_store_packed, twin.rope_store_packed)):
        case.store(op, index, case.norm, case.norm.flip(0))
    assert_close(*case.queries)
    slots = case.slots[case.slots >= 0].long()
    (codes, _), (want, _) = (case.sides(i)[0].read_slots(slots) for i in range(2))
    assert int((codes != want).sum()) <= codes.numel() // 500
    ours, theirs = (case.sides(i)[0].stored_at(slots) for i in range(2))
    torch.testing.assert_close(ours.norm(dim=-1), theirs.norm(dim=-1), rtol=5e-3, atol=1e-6)
    assert torch.equal(case.pools[0].data[case.kept()], case.before[case.kept()])


@pytest.mark.parametrize("name", ["fp8_e4m3", "tq4"])
def test_the_mean_is_taken_off_keys_only(store: Target, name):
    case = StoreCase(store, name, mean=MEAN)
    plain = StoreCase(store, name)
    for this in (case, plain):
        this.store(store.ops.rope_store_packed)
    case.store(twin.rope_store_packed, 1)
    assert torch.equal(case.pools[0].data, case.pools[1].data)
    slots = case.slots[case.slots >= 0].long()
    assert torch.equal(case.sides()[1].stored_at(slots), plain.sides()[1].stored_at(slots))
    keys = [this.sides()[0].restored_at(slots) for this in (case, plain)]
    torch.testing.assert_close(*keys, rtol=0.3, atol=0.9)
    assert not torch.equal(*keys)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (9, 3), (32, 4), (5, 5)])
def test_every_number_of_heads_is_stored(store: Target, heads, kv_heads):
    case = StoreCase(store, "k4v2", 7, heads=heads, kv_heads=kv_heads, dtype=torch.float16)
    case.store(store.ops.rope_store_packed)
    case.store(twin.rope_store_packed, 1)
    assert_close(*case.queries)
    assert torch.equal(case.pools[0].data, case.pools[1].data)


@pytest.mark.parametrize("page_size", [16, 32])
@pytest.mark.parametrize("name", ["fp32", "k8v4", "tq3"])
def test_both_sides_of_page_boundaries_are_stored_and_nothing_else(store: Target, name, page_size):
    case = StoreCase(store, name, 7, page_size=page_size)
    last = 6 * page_size - 1
    edges = [0, page_size - 1, page_size, 2 * page_size - 1, 2 * page_size, 3 * page_size + 1, last]
    case.slots.copy_(torch.tensor(edges))
    case.store(store.ops.rope_store_packed)
    case.store(twin.rope_store_packed, 1)
    assert torch.equal(case.pools[0].data, case.pools[1].data)
    assert torch.equal(case.pools[0].data[case.kept()], case.before[case.kept()])


def test_slots_and_positions_outside_their_tables_harm_nothing_else(store: Target):
    case = StoreCase(store, "tq4", 5)
    case.slots.copy_(torch.tensor([3, 6 * 16, -7, 40, 41]))
    case.positions.copy_(torch.tensor([0, 1, 2, MAX_POSITION, -1]))
    case.store(store.ops.rope_store_packed)
    assert torch.isnan(case.queries[0][3:]).all()
    assert not torch.isnan(case.queries[0][:3]).any()
    keys, values = case.sides()
    assert torch.isnan(keys.stored_at(torch.tensor([40, 41]))).all()
    assert torch.isfinite(keys.stored_at(torch.tensor([3]))).all()
    assert torch.isfinite(values.stored_at(torch.tensor([3, 40, 41]))).all()
    assert torch.equal(case.pools[0].data[case.kept()], case.before[case.kept()])


@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 63, 40])
@pytest.mark.parametrize("name", NAMES)
def test_a_value_that_is_not_finite_shows_only_through_its_own_key(
    store: Target, name, place, poison
):
    case, clean = (StoreCase(store, name, 3, dtype=torch.bfloat16) for _ in range(2))
    for this in (case, clean):
        this.slots.copy_(torch.tensor([3, 4, 5]))
    case.qkv.view(3, 10, 64)[1, 8, place] = poison
    for this in (case, clean):
        this.store(store.ops.rope_store_packed)
    slots = torch.tensor([3, 4, 5], device=store.device)
    keys, values = (side.stored_at(slots) for side in case.sides())
    assert torch.count_nonzero(values[1, 0]) == 0
    assert torch.isnan(keys[1, 0]).any()
    for now, then in zip(case.sides(), clean.sides(), strict=True):
        healthy = torch.ones(3, 2, dtype=torch.bool, device=store.device)
        healthy[1, 0] = False
        assert torch.equal(now.stored_at(slots)[healthy], then.stored_at(slots)[healthy])


@pytest.mark.parametrize("name", ["fp16", "tq4", "tq2", "fp8_e4m3"])
def test_values_too_large_for_what_is_stored_count_as_not_finite(store: Target, name):
    case = StoreCase(store, name, 2)
    case.slots.copy_(torch.tensor([0, 1]))
    case.qkv.view(2, 10, 64)[0, 9] = 3e9
    case.store(store.ops.rope_store_packed)
    keys, values = (side.stored_at(torch.tensor([0, 1])) for side in case.sides())
    assert torch.isfinite(values).all()
    assert torch.count_nonzero(values[0, 1]) == 0
    assert torch.isnan(keys[0, 1]).any()
    assert torch.isfinite(keys[1]).all()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "mxfp8", "tq4", "bf16"])
def test_keys_that_are_not_finite_are_never_read_as_numbers(store: Target, name):
    case = StoreCase(store, name, 3, dtype=torch.bfloat16)
    case.slots.copy_(torch.tensor([0, 1, 2]))
    case.qkv.view(3, 10, 64)[0, 6, 9] = NAN
    case.qkv.view(3, 10, 64)[2, 7, 9] = float("inf")
    case.store(store.ops.rope_store_packed)
    keys = case.sides()[0].stored_at(torch.tensor([0, 1, 2]))
    assert not torch.isfinite(keys[0, 0]).all()
    assert not torch.isfinite(keys[2, 1]).all()
    assert torch.isfinite(keys[1]).all()


@pytest.mark.parametrize("name", ["mxfp8", "k8v4", "tq3", "fp32"])
def test_a_token_stores_the_same_bytes_alone_and_among_others(store: Target, name):
    case = StoreCase(store, name, 24, dtype=torch.bfloat16, turned=True)
    case.store(store.ops.rope_store_packed, 0, case.norm, case.norm)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2)).tolist()
    for row in order:
        one = slice(row, row + 1)
        case.store(store.ops.rope_store_packed, 1, case.norm, case.norm, one)
    assert torch.equal(case.pools[0].data, case.pools[1].data)
    assert same_bits(*case.queries)


@pytest.mark.parametrize("copies", [[], [(0, 3, 5)], [(0, 3, 5), (1, 4, 16), (2, 5, 1)]])
@pytest.mark.parametrize("name", ["tq3", "bf16", "k8v4"])
def test_copies_are_of_whole_pages_in_all_layers(target: Target, name, copies):
    need_packed(target, "copy_packed")
    pool = make_pool(name, num_pages=7, device=target.device)
    pool.data.copy_(torch.arange(pool.data.numel()).reshape(pool.data.shape) * 37 % 251)
    expected = pool.data.clone()
    for source, to, _ in copies:
        expected[to] = expected[source]
    listed = target.ints([*copies, (0, 6, 4)])  # one more than there are
    target.ops.copy_packed(pool.data, listed, target.ints([len(copies)]))
    assert torch.equal(pool.data, expected)


@pytest.mark.parametrize("count", [-1, 0, 1, 99])
def test_copies_that_do_not_exist_are_left_out(target: Target, count):
    need_packed(target, "copy_packed")
    pool = make_pool("tq4", num_pages=5, device=target.device)
    pool.data.copy_(torch.arange(pool.data.numel()).reshape(pool.data.shape) % 253)
    before = pool.data.clone()
    copies = target.ints([(0, 3, 5), (-1, 2, 5), (5, 2, 5), (1, 5, 5), (1, -1, 5)])
    target.ops.copy_packed(pool.data, copies, target.ints([count]))
    if count > 0:
        before[3] = before[0]
    assert torch.equal(pool.data, before)


def test_mistakes_are_refused_with_the_names_of_op_and_argument(store: Target):
    case = StoreCase(store, "tq4", 4)
    keys, values = case.sides()
    whole = {
        "qkv": case.qkv, "positions": case.positions, "cos": case.cos, "sin": case.sin,
        "slots": case.slots, "data": keys.data, "q_out": case.queries[0], "q_norm": None,
        "k_norm": None, "k_signs": keys.signs, "v_signs": values.signs, "k_mean": None,
        "eps": 1e-6, "layer_at": keys.layer_at, "page_size": 16, "kv_heads": 2, "k_codec": 6,
        "v_codec": 6,
    }  # fmt: skip
    for name, wrong in [
        ("qkv", case.qkv[:, 64:].contiguous()),
        ("slots", case.slots[:3]),
        ("page_size", 24),
        ("k_codec", 9),
        ("v_codec", -1),
        ("k_signs", None),
        ("k_mean", keys.signs[:1]),
        ("layer_at", keys.data.shape[1] - 64),
        ("q_out", store.poisoned(1, 4, 6, 80)[0]),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=r"rope_store_packed: \w+"):
            store.ops.rope_store_packed(**{**whole, name: wrong})


@pytest.mark.parametrize("number", [5, 6, 8])
def test_a_head_dim_that_a_format_cannot_take_is_refused_with_its_number(store: Target, number):
    case = StoreCase(store, "bf16", 4, dim=96)
    keys, _ = case.sides()
    signs = store.randn(96).sign() if number >= 6 else None
    with pytest.raises((RuntimeError, ValueError), match=r"rope_store_packed: k_codec .* got 96"):
        store.ops.rope_store_packed(
            case.qkv, case.positions, case.cos, case.sin, case.slots, keys.data, case.queries[0],
            None, None, signs, signs, None, 1e-6, keys.layer_at, 16, 2, number, number,
        )  # fmt: skip


def test_4_bit_codes_are_magnitudes_with_signs_in_the_highest_bits():
    codes = torch.tensor([[8, 15, 7, 0, 9, 6, 1, 14], [0, 0, 0, 0, 15, 15, 15, 15]])
    packed = pack_signed(codes.int())
    for word, row in zip(
        packed.contiguous().view(torch.int32).tolist(), codes.tolist(), strict=True
    ):
        for i, code in enumerate(row):
            size = word[0] >> (4 * i) & 7
            negative = word[0] >> (8 * (i % 4) + (7 if i < 4 else 3)) & 1
            assert code == (7 - size if negative else 8 + size)
    every = torch.randint(0, 16, (3, 5, 64), dtype=torch.int32)
    assert torch.equal(unpack_signed(pack_signed(every)), every)


def test_the_twin_refuses_pages_that_do_not_hold_the_layer():
    case = StoreCase(TwinTarget(), "tq4", 2)
    object.__setattr__(case.sides()[0], "layer_at", case.before.shape[1] - 64)
    with pytest.raises(InvalidArgument, match="was the pool made for another format"):
        case.store(twin.rope_store_packed)
    object.__setattr__(case.sides()[1], "signs", None)
    with pytest.raises(InvalidArgument, match="v_signs must be given exactly"):
        case.store(twin.rope_store_packed)


def test_operations_take_formats_by_the_numbers_of_the_native_kernels():
    assert [codec(number).name for number in range(9)] == list(NAMES)
    assert [codec(number).native_id for number in range(9)] == list(range(9))
    with pytest.raises(UnknownName, match="unknown codec '9'"):
        codec(9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unquantised_codes_are_what_dense_pages_would_hold(dtype):
    """But for one rounding less on the way: K is not rounded before it is stored."""
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    case = StoreCase(TwinTarget(), name, dtype=dtype, turned=True)
    case.store(twin.rope_store_packed)
    keys, values = (torch.zeros(6, 2, 16, 64, dtype=dtype) for _ in range(2))
    rope_store_kv(
        case.qkv, case.positions, case.cos, case.sin, case.slots, keys, values,
        case.queries[1], None, None, 1e-6,
    )  # fmt: skip
    slots = case.slots[case.slots >= 0].long()
    for side, dense in zip(case.sides(), (keys, values), strict=True):
        want = dense[slots // 16, :, slots % 16].float()
        assert torch.equal(side.stored_at(slots), want)
    assert same_bits(*case.queries)
    assert np.isfinite(want.numpy()).all()
