"""What the host packs for sampling on a GPU: layout, cached parts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_sampling import batch_of, pack_mask, randn, uniforms

from dendrite_engine import sampling
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels import SamplingBatch
from dendrite_engine.kernels import device_reference_sampling as twin
from dendrite_engine.kernels import reference_sampling as reference
from dendrite_engine.kernels import sampling_pack as packing
from dendrite_engine.kernels.sampling_pack import Penalties, SamplingTable, pack_sampling


def full_batch(rows=5, vocab=70):
    """Every array in use; ids out of order, one of them twice."""
    penalties = [[(int(t), row) for t in (9, 3, 40)][: row + 1] for row in range(rows)]
    bias = [[(7, 0.5), (2, -1.0), (7, 0.25)][:row] for row in range(rows)]
    mask = pack_mask([range(row, vocab, 2) for row in range(rows)], vocab)
    return batch_of(
        rows, penalties=penalties, bias=bias, mask=mask, temperature=0.8, top_k=9, top_p=0.75,
        min_p=0.01, repetition=1.2, presence=0.3, frequency=-0.1, uniform=uniforms(rows),
    )  # fmt: skip


def test_unpacking_gives_back_the_settings_with_ids_in_order():
    batch = full_batch()
    found, rows = twin.unpack_sampling(pack_sampling(batch, 70))
    assert rows.tolist() == [0, 1, 2, 3, 4]
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition", "presence", "frequency"):
        assert np.array_equal(getattr(found, name), getattr(batch, name))
    assert found.uniform.tolist() == batch.uniform.tolist()
    assert np.array_equal(found.mask, batch.mask)
    assert np.array_equal(found.pen_indptr, batch.pen_indptr)
    assert found.pen_ids[-3:].tolist() == [3, 9, 40]
    assert found.bias_ids[-3:].tolist() == [2, 7, 7]
    assert found.bias_values[-3:].tolist() == [-1.0, 0.5, 0.25]


def test_the_twin_samples_as_the_reference_does():
    batch, logits = full_batch(), torch.from_numpy(randn(5, 70))
    out = torch.full((2, 7), -1111, dtype=torch.int32)
    params = torch.from_numpy(SamplingTable(batch, 70).pack(rows=[4, 1, -1, 3, 9]))
    twin.sample(logits, params, params, out)
    tokens, logprobs = reference.sample(logits[[4, 1, 3]], _rows(batch, [0, 1, 3]))
    assert out[0, [0, 1, 3]].tolist() == tokens.tolist()
    assert out[1, [0, 1, 3]].numpy().view(np.float32).tolist() == logprobs.tolist()
    assert out[0, [2, 4, 5, 6]].tolist() == [-1] * 4
    assert np.isnan(out[1, [2, 4, 5, 6]].numpy().view(np.float32)).all()


def _rows(batch: SamplingBatch, rows: list[int]) -> SamplingBatch:
    return twin._select(batch, np.array(rows))


def test_the_draws_are_those_of_the_engine():
    seeds, keys = [0, -1, 2**63, 2**64 + 5], [sampling.mix64(i) for i in range(4)]
    table = SamplingTable(batch_of(4, temperature=1), 50, seeds=seeds, path_keys=keys)
    for positions in ([0, 1, 2, 3], [2**31 - 1, 0, 77, 4096]):
        found, _ = twin.unpack_sampling(table.pack(positions))
        assert found.uniform.tolist() == [
            sampling.uniform(*each) for each in zip(seeds, keys, positions, strict=True)
        ]


def test_a_step_changes_only_what_it_is_given():
    batch = full_batch()
    table = SamplingTable(batch, 70, mask_rows=np.array([-1, 1, 0, -1, 1], np.int32))
    first = table.pack(11, rows=np.arange(5)).copy()
    ids = Penalties(
        np.array([0, 0, 2, 2, 2, 3], np.int32), np.array([8, 4, 1], np.int32),
        np.array([1, 2, 3], np.int32),
    )  # fmt: skip
    other = np.full((2, 3), 0x5555, np.int32)
    out = np.full(table.size(3) + 9, -7, np.int32)
    written = table.pack(12, rows=[4, 3, 2, 1, 0], penalties=ids, mask=other, out=out)
    assert np.shares_memory(written, out)
    assert len(written) == table.size(3)
    assert (out[len(written) :] == -7).all()
    found, rows = twin.unpack_sampling(written)
    assert rows.tolist() == [4, 3, 2, 1, 0]
    assert found.pen_ids.tolist() == [4, 8, 1]
    assert found.pen_counts.tolist() == [2, 1, 3]
    assert found.mask[[0, 3]].tolist() == [[-1] * 3] * 2
    assert found.mask[[1, 2, 4]].tolist() == [[0x5555] * 3] * 3
    assert np.array_equal(table.pack(11, rows=np.arange(5)), first)


def test_a_bitmask_can_be_filled_in_place():
    batch = batch_of(3)
    table = SamplingTable(batch, 70, mask_rows=np.array([1, -1, 0], np.int32))
    out = np.zeros(table.size(), np.int32)
    table.mask_view(out)[:] = [[1, 2, 3], [4, 5, 6]]
    found, _ = twin.unpack_sampling(table.pack(out=out))
    assert found.mask.tolist() == [[4, 5, 6], [-1, -1, -1], [1, 2, 3]]


def test_rows_without_a_penalty_carry_no_ids():
    penalties = [[(1, 1)], [(2, 1), (5, 0)], [(3, 1)]]
    batch = batch_of(3, penalties=penalties, presence=[0, 0.5, 0])
    found, _ = twin.unpack_sampling(pack_sampling(batch, 70))
    assert found.pen_indptr.tolist() == [0, 0, 2, 2]
    assert len(pack_sampling(batch_of(3, penalties=penalties), 70)) == len(
        pack_sampling(batch_of(3), 70)
    )


def test_settings_that_a_kernel_would_have_to_derive_are_the_twins():
    temperature = np.array([0, 1e-45, 0.7, 3], np.float32)
    min_p = np.array([0, 1, 2, 0.05], np.float32)
    buffer = pack_sampling(batch_of(4, temperature=temperature, min_p=min_p), 70)
    end = packing.HEADER_WORDS + 4 * packing.RECORD_WORDS
    records = buffer[packing.HEADER_WORDS : end].reshape(4, -1).view(np.float32)
    inverse = records[:, packing.RECORD["inverse_temperature"]]
    assert inverse.tolist() == [
        0,
        0,
        np.float32(1) / temperature[2],
        np.float32(1) / temperature[3],
    ]
    distance = records[:, packing.RECORD["min_p_distance"]]
    assert distance.tolist() == [np.inf, 0, 0, -np.log(min_p[3])]
    assert SamplingTable(batch_of(4), 70).greedy
    assert not SamplingTable(batch_of(4, temperature=temperature), 70).greedy


def test_what_makes_no_sense_is_refused():
    batch = full_batch()
    table = SamplingTable(batch, 70)
    with pytest.raises(InvalidArgument, match="buffer has 10 words"):
        table.pack(out=np.zeros(10, np.int32))
    with pytest.raises(InvalidArgument, match=r"mask must be \[5, 3\], got \[4, 3\]"):
        table.pack(mask=np.zeros((4, 3), np.int32))
    with pytest.raises(InvalidArgument, match="penalties of 5 rows"):
        table.pack(penalties=Penalties(*[np.zeros(2, np.int32)] * 3))
    with pytest.raises(InvalidArgument, match="5 rows need as many seeds"):
        SamplingTable(batch, 70, seeds=[1], path_keys=[1])
    with pytest.raises(InvalidArgument, match=r"bias_ids: ids 2..7 leave the vocabulary of 7"):
        SamplingTable(batch, 7, mask_rows=np.full(5, -1, np.int32))
    with pytest.raises(InvalidArgument, match=r"pen_ids: ids 3..40 leave the vocabulary of 40"):
        SamplingTable(batch, 40, mask_rows=np.full(5, -1, np.int32)).pack()
    with pytest.raises(InvalidArgument, match=r"vocabulary must be 1..524288, got 0"):
        SamplingTable(batch, 0)
    with pytest.raises(InvalidArgument, match="version 2, not 1"):
        twin.unpack_sampling(np.full(16, 2, np.int32))
