"""Storing into packed pages: the native kernels write the twin's bytes, and nothing beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from packed_cases import NAMES, PAIRS, make_store

from dendrite_engine import kernels
from dendrite_engine.cache.formats.choice import layer_format
from dendrite_engine.errors import InvalidArgument

HEADS, KV_HEADS = 6, 2


def rope_tables(dim: int, length: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(length)[:, None] / 100.0 ** (torch.arange(dim // 2) / (dim // 2))
    return angles.cos().contiguous(), angles.sin().contiguous()


def make_rows(rows: int, dim: int, kind: str = "normal", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, (HEADS + 2 * KV_HEADS), dim, generator=generator)
    if kind == "outliers":
        x[..., : dim // 16] *= 40
        x[..., -1] += 300
    elif kind == "tiny":
        x *= 1e-6
        x[::3] = 0
    elif kind == "huge":
        x *= 3e3
    return x.reshape(rows, -1)


def store(ops, pool, qkv, slots, dim, positions=None, **norms):
    rows = len(qkv)
    q = torch.full((rows, HEADS, dim), float("nan"))
    positions = np.arange(rows, dtype=np.int32) % 64 if positions is None else positions
    slots = np.array(slots, np.int32)
    keys, values = pool.layers[0]
    ops.rope_store_kv(qkv, positions, *rope_tables(dim), slots, keys, values, q, **norms)
    return q


@pytest.mark.parametrize("kind", ["normal", "outliers", "tiny", "huge"])
@pytest.mark.parametrize("name", NAMES + PAIRS)
def test_native_kernels_store_the_bytes_of_the_twin(native, reference, name, kind):
    qkv = make_rows(50, 64, kind)
    slots = [*range(3, 33), -1, *range(48, 67)]
    pools = [make_store(name, num_pages=5) for _ in range(2)]
    queries = [
        store(ops, pool, qkv, slots, 64)
        for ops, pool in zip((native, reference), pools, strict=True)
    ]
    torch.testing.assert_close(
        queries[0], queries[1], rtol=1e-6, atol=1e-6 * float(qkv.abs().max())
    )
    assert torch.equal(pools[0].data, pools[1].data)


@pytest.mark.parametrize(("head_dim", "page_size"), [(32, 16), (128, 32), (256, 64)])
@pytest.mark.parametrize("name", NAMES)
def test_every_size_stores_the_bytes_of_the_twin(native, reference, name, head_dim, page_size):
    qkv = make_rows(20, head_dim, "outliers")
    slots = np.random.default_rng(1).permutation(3 * page_size)[:20]
    pools = [
        make_store(name, num_pages=3, head_dim=head_dim, page_size=page_size) for _ in range(2)
    ]
    for ops, pool in zip((native, reference), pools, strict=True):
        store(ops, pool, qkv, slots, head_dim)
    assert torch.equal(pools[0].data, pools[1].data)


@pytest.mark.parametrize("first", ["bf16", "fp16", "fp32", "mxfp8"])
@pytest.mark.parametrize("name", ["tq4", "tq2", "fp8_e4m3", "k8v4"])
def test_first_pages_get_the_bytes_of_the_twin_and_the_others_none(native, reference, name, first):
    mean = torch.linspace(-2, 2, 128).reshape(1, 2, 64)
    pools = [make_store(name, num_pages=4, mean=mean, first=first) for _ in range(2)]
    for ops, pool in zip((native, reference), pools, strict=True):
        pool.first.index[2] = 3
        store(ops, pool, make_rows(40, 64, "outliers"), range(20, 60), 64)
    assert torch.equal(pools[0].data, pools[1].data)
    assert torch.equal(pools[0].first.data, pools[1].first.data)
    assert (pools[0].data[2] == 255).all()
    assert (pools[0].first.data[:3] == 255).all()
    assert not (pools[0].first.data[3] == 255).all()


@pytest.mark.parametrize("name", ["tq4", "fp8_e4m3"])
def test_the_mean_is_taken_off_keys_only(native, reference, name):
    mean = torch.linspace(-2, 2, 128).reshape(1, 2, 64)
    qkv = make_rows(20, 64)
    pools = [make_store(name, num_pages=3, mean=mean) for _ in range(2)]
    for ops, pool in zip((native, reference), pools, strict=True):
        store(ops, pool, qkv, range(20), 64)
    assert torch.equal(pools[0].data, pools[1].data)
    plain = make_store(name, num_pages=3)
    store(native, plain, qkv, range(20), 64)
    pages = torch.arange(2)
    values = [pool.layers[0][1].restored(pages)[0, :, :16] for pool in (plain, pools[0])]
    keys = [pool.layers[0][0].restored(pages)[0, :, :16] for pool in (plain, pools[0])]
    assert torch.equal(*values)
    torch.testing.assert_close(*keys, rtol=0.3, atol=0.9)
    assert not torch.equal(*keys)


@pytest.mark.parametrize("name", NAMES + PAIRS)
def test_a_token_stores_the_same_bytes_whatever_is_stored_beside_it(ops, name):
    """One at a time, in any order, with full or empty neighbours: appending never re-quantises."""
    qkv = make_rows(32, 64)
    positions = np.arange(32, dtype=np.int32)
    together, single = make_store(name, num_pages=2), make_store(name, num_pages=2)
    store(ops, together, qkv, range(32), 64, positions)
    for row in torch.randperm(32, generator=torch.Generator().manual_seed(3)).tolist():
        store(ops, single, qkv[row : row + 1].contiguous(), [row], 64, positions[row : row + 1])
    assert torch.equal(together.data, single.data)


@pytest.mark.parametrize("name", NAMES)
def test_slots_that_are_not_named_keep_their_bytes(ops, name):
    pool = make_store(name, num_pages=3)
    before = [side.read(torch.arange(3)) for side in pool.layers[0]]
    store(ops, pool, make_rows(3, 64), [5, 16, 31], 64)
    kept = torch.ones(3, 16, dtype=torch.bool)
    kept[0, 5] = kept[1, 0] = kept[1, 15] = False
    for side, old in zip(pool.layers[0], before, strict=True):
        for now, then in zip(side.read(torch.arange(3)), old, strict=True):
            assert torch.equal(now.transpose(1, 2)[kept], then.transpose(1, 2)[kept])


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_the_thread_count_changes_no_byte(isa, threads):
    qkv = make_rows(600, 64)
    pools = [make_store("tq3", num_pages=40) for _ in range(2)]
    for pool, count in zip(pools, (1, threads), strict=True):
        store(kernels.load("native", isa=isa, threads=count), pool, qkv, range(600), 64)
    assert torch.equal(pools[0].data, pools[1].data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fp32"])
def test_nan_and_infinity_are_stored_as_what_reads_as_nan(ops, name, bad):
    qkv = make_rows(2, 64).reshape(2, -1, 64)
    qkv[0, HEADS, 7] = bad  # K of row 0, head 0
    qkv[0, HEADS + KV_HEADS + 1, 9] = bad  # V of row 0, head 1
    pool = make_store(name, num_pages=1)
    store(ops, pool, qkv.reshape(2, -1), [0, 1], 64)
    key, value = (side.restored(torch.tensor([0]))[0] for side in pool.layers[0])
    assert not key[0, 0].isfinite().all()
    assert not value[1, 0].isfinite().all()
    for healthy in (key[1, 0], value[0, 0], key[:, 1], value[:, 1]):
        assert healthy.isfinite().all()


def test_a_key_norm_is_applied_before_the_key_is_quantised(native, reference):
    weight = torch.linspace(0.5, 2, 64)
    pools = [make_store("fp32", num_pages=1) for _ in range(2)]
    for ops, pool in zip((native, reference), pools, strict=True):
        store(ops, pool, make_rows(9, 64), range(9), 64, q_norm=weight, k_norm=weight)
    keys = [pool.layers[0][0].restored(torch.tensor([0]))[:, :, :9] for pool in pools]
    torch.testing.assert_close(*keys, rtol=1e-5, atol=1e-5)


def test_copying_pages_copies_every_byte(ops):
    pool = make_store("tq4", num_pages=5)
    pool.data.copy_(torch.randint(0, 255, pool.data.shape, dtype=torch.uint8))
    before = pool.data.clone()
    ops.copy_packed(pool.data, np.array([[0, 3, 5], [1, 4, 16]], np.int32))
    assert torch.equal(pool.data[3], before[0])
    assert torch.equal(pool.data[4], before[1])
    assert torch.equal(pool.data[:3], before[:3])


@pytest.mark.parametrize("copies", [[[0, 9, 1]], [[-1, 0, 1]], [[0, 1]]])
def test_copies_of_pages_that_do_not_exist_are_refused(native, copies):
    pool = make_store("tq4", num_pages=5)
    with pytest.raises(InvalidArgument, match="copy_packed"):
        native.copy_packed(pool.data, np.array(copies, np.int32))


def test_slots_and_positions_outside_are_refused(ops):
    pool = make_store("tq4", num_pages=2)
    with pytest.raises(InvalidArgument, match="slots"):
        store(ops, pool, make_rows(1, 64), [32], 64)
    with pytest.raises(InvalidArgument, match="positions"):
        store(ops, pool, make_rows(1, 64), [0], 64, np.array([64], np.int32))


def test_keys_of_one_format_and_values_of_another_pool_are_refused(ops):
    keys, values = make_store("tq4").layers[0][0], make_store("tq4").layers[0][1]
    q = torch.empty(1, HEADS, 64)
    with pytest.raises(InvalidArgument, match="one layer of one pool"):
        ops.rope_store_kv(
            make_rows(1, 64), np.zeros(1, np.int32), *rope_tables(64), np.zeros(1, np.int32), keys,
            values, q,
        )  # fmt: skip


def test_native_ids_and_bits_are_those_of_the_formats():
    """The numbers in packed.h, as the native module would misread pages otherwise."""
    table = {name: layer_format(name).key for name in NAMES}
    assert [table[name].native_id for name in NAMES] == list(range(9))
    assert [table[name].bits for name in NAMES] == [32, 16, 16, 8, 8, 8, 4, 3, 2]
