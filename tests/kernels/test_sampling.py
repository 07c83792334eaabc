"""sample and top_logprobs against a straightforward numpy oracle, and against chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels import SamplingBatch


def batch_of(rows, *, penalties=None, bias=None, mask=None, **settings):
    """Neutral settings with some changed; penalties and bias: one list of tuples per row."""
    batch = SamplingBatch.neutral(rows)
    for name, value in settings.items():
        getattr(batch, name)[:] = value
    arrays = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    for prefix, rows_of, names in (("pen", penalties, "counts"), ("bias", bias, "values")):
        if rows_of is None:
            continue
        flat = [entry for row in rows_of for entry in row]
        arrays[f"{prefix}_indptr"] = np.cumsum([0] + [len(row) for row in rows_of]).astype(np.int32)
        arrays[f"{prefix}_ids"] = np.array([entry[0] for entry in flat], np.int32)
        dtype = np.int32 if prefix == "pen" else np.float32
        arrays[f"{prefix}_{names}"] = np.array([entry[1] for entry in flat], dtype)
    return SamplingBatch(**{**arrays, "mask": mask})


def pack_mask(allowed, vocab):
    words = np.zeros((len(allowed), -(-vocab // 32)), np.uint32)
    for row, ids in enumerate(allowed):
        for token in ids:
            words[row, token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words.view(np.int32)


def survivors(logits, batch, row):
    """(ids, probabilities) that may be drawn, most likely first: the rules, one after another."""
    x = logits[row].astype(np.float64)
    for i in range(batch.bias_indptr[row], batch.bias_indptr[row + 1]):
        x[batch.bias_ids[i]] += batch.bias_values[i]
    for i in range(batch.pen_indptr[row], batch.pen_indptr[row + 1]):
        token, count = batch.pen_ids[i], batch.pen_counts[i]
        factor = float(batch.repetition[row])
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
        x[token] -= float(batch.presence[row]) * (count > 0) + float(batch.frequency[row]) * count
    if batch.mask is not None:
        for token in range(len(x)):
            if not (int(batch.mask[row, token // 32]) >> (token % 32)) & 1:
                x[token] = -np.inf
    order = sorted((t for t in range(len(x)) if x[t] > -np.inf), key=lambda t: (-x[t], t))
    if batch.temperature[row] == 0:
        return order[:1], np.ones(1)
    weights = np.exp((x[order] - x[order[0]]) / float(batch.temperature[row]))
    if batch.top_k[row] > 0:
        order, weights = order[: batch.top_k[row]], weights[: batch.top_k[row]]
    if batch.top_p[row] < 1:
        before = np.cumsum(weights) - weights
        kept = max(1, int((before < float(batch.top_p[row]) * weights.sum()).sum()))
        order, weights = order[:kept], weights[:kept]
    kept = int((weights >= float(batch.min_p[row]) * weights[0]).sum())
    return order[:kept], weights[:kept] / weights[:kept].sum()


def check(ops, logits, batch):
    """Every draw is the oracle's, or its neighbour when `uniform` is within rounding of an edge."""
    tokens, logprobs = ops.sample(torch.from_numpy(logits), batch)
    assert tokens.dtype == np.int32
    assert logprobs.dtype == np.float32
    for row in range(len(logits)):
        ids, probabilities = survivors(logits, batch, row)
        edges = np.cumsum(probabilities)
        low = np.searchsorted(edges, batch.uniform[row] - 1e-5, side="right")
        high = np.searchsorted(edges, batch.uniform[row] + 1e-5, side="right")
        near = ids[min(low, len(ids) - 1) : min(high, len(ids) - 1) + 1]
        assert int(tokens[row]) in near
        shifted = logits[row].astype(np.float64) - logits[row].max()
        expected = shifted[tokens[row]] - np.log(np.exp(shifted).sum())
        np.testing.assert_allclose(logprobs[row], expected, rtol=1e-6, atol=2e-6)


def randn(rows, vocab, seed=0, spread=3.0):
    return np.random.default_rng(seed).normal(0, spread, (rows, vocab)).astype(np.float32)


def uniforms(rows, seed=9):
    return np.random.default_rng(seed).random(rows)


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 1000, 5003])
def test_greedy_takes_the_most_likely_token(ops, vocab):
    check(ops, randn(5, vocab), batch_of(5))


def test_greedy_ties_go_to_the_lowest_id(ops):
    logits = np.zeros((3, 100), np.float32)
    logits[1, [40, 17, 99]] = 2.5
    logits[2, 0] = -1
    assert ops.sample(torch.from_numpy(logits), batch_of(3))[0].tolist() == [0, 17, 1]


FILTERS = {
    "none": {},
    "top_k": {"top_k": 7},
    "top_k of everything": {"top_k": 10_000},
    "top_p": {"top_p": 0.7},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p of 1": {"min_p": 1.0},
    "top_k and top_p": {"top_k": 20, "top_p": 0.5},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.03},
}


@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_match_the_oracle(ops, name, temperature):
    logits = randn(30, 700, seed=1)
    batch = batch_of(30, temperature=temperature, uniform=uniforms(30), **FILTERS[name])
    check(ops, logits, batch)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("name", FILTERS)
def test_the_ends_of_the_unit_interval_give_the_first_and_last_survivor(ops, name, uniform):
    check(ops, randn(4, 333), batch_of(4, temperature=1, uniform=uniform, **FILTERS[name]))


def test_equal_logits_are_ordered_by_id(ops):
    logits = np.zeros((8, 640), np.float32)
    batch = batch_of(8, temperature=1, top_k=4, uniform=(np.arange(8) + 0.5) / 8)
    assert ops.sample(torch.from_numpy(logits), batch)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_many_ties_match_the_oracle(ops):
    logits = np.round(randn(20, 900, seed=4, spread=1))
    batch = batch_of(20, temperature=0.9, uniform=uniforms(20), top_k=101, top_p=0.95)
    check(ops, logits, batch)


def test_penalties_bias_and_mask_match_the_oracle(ops):
    rows, vocab = 12, 200
    rng = np.random.default_rng(3)
    penalties = [
        [(int(t), int(rng.integers(0, 4))) for t in rng.permutation(vocab)[: rng.integers(0, 60)]]
        for _ in range(rows)
    ]
    bias = [[(int(t), float(rng.normal() * 4)) for t in range(row)] for row in range(rows)]
    mask = pack_mask([rng.permutation(vocab)[: 1 + 10 * row] for row in range(rows)], vocab)
    for settings in (
        {"repetition": 1.3}, {"presence": 0.8}, {"frequency": 0.4},
        {"repetition": 1.2, "presence": -0.5, "frequency": 0.7, "top_p": 0.8, "top_k": 30},
    ):  # fmt: skip
        for temperature in (0, 0.8):
            batch = batch_of(
                rows, penalties=penalties, bias=bias, mask=mask, temperature=temperature,
                uniform=uniforms(rows), **settings,
            )  # fmt: skip
            check(ops, randn(rows, vocab, seed=6), batch)


def test_the_mask_decides_alone_when_it_allows_one_token(ops):
    for token in (0, 31, 32, 63, 64, 69):
        mask = pack_mask([[token]], 70)
        for temperature in (0.0, 1.0):
            batch = batch_of(1, mask=mask, temperature=temperature, uniform=0.99)
            assert ops.sample(torch.from_numpy(randn(1, 70)), batch)[0].tolist() == [token]


def test_a_bias_of_minus_infinity_bans_a_token(ops):
    logits = np.zeros((1, 50), np.float32)
    logits[0, 7] = 100
    batch = batch_of(1, bias=[[(7, -np.inf)]])
    tokens, logprobs = ops.sample(torch.from_numpy(logits), batch)
    assert tokens.tolist() == [0]
    np.testing.assert_allclose(logprobs, [-100], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_no_token_and_spares_the_others(ops, bad, temperature):
    logits = randn(5, 77)
    batch = batch_of(5, temperature=temperature, uniform=0.3)
    clean = ops.sample(torch.from_numpy(logits.copy()), batch)
    logits[1, 0], logits[3, 76] = bad, bad
    tokens, logprobs = ops.sample(torch.from_numpy(logits), batch)
    assert tokens[[1, 3]].tolist() == [-1, -1]
    assert np.isnan(logprobs[[1, 3]]).all()
    assert tokens[[0, 2, 4]].tolist() == clean[0][[0, 2, 4]].tolist()
    ids, values = ops.top_logprobs(torch.from_numpy(logits), 4)
    assert (ids[[1, 3]] == -1).all()
    assert np.isnan(values[[1, 3]]).all()
    assert not np.isnan(values[[0, 2, 4]]).any()


def test_a_row_with_every_token_banned_gives_no_token(ops):
    batch = batch_of(2, mask=np.zeros((2, 3), np.int32), temperature=1)
    assert ops.sample(torch.from_numpy(randn(2, 70)), batch)[0].tolist() == [-1, -1]


@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_draws_follow_the_distribution(ops, settings):
    """Pearson's statistic over 20 000 seeded draws stays below its 99.99 % point."""
    draws, logits = 20_000, randn(1, 24, seed=8, spread=1.2)
    batch = batch_of(draws, temperature=1.3, uniform=uniforms(draws, 5), **settings)
    tokens, _ = ops.sample(torch.from_numpy(np.repeat(logits, draws, axis=0)), batch)
    ids, probabilities = survivors(logits, batch_of(1, temperature=1.3, **settings), 0)
    counts = np.array([(tokens == token).sum() for token in ids])
    assert counts.sum() == draws
    expected = probabilities * draws
    free = len(ids) - 1
    limit = free + 3.8 * np.sqrt(2 * free) + 10
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_a_full_vocabulary_agrees_with_the_twin(native, reference):
    logits = torch.from_numpy(randn(6, 49152, seed=2))
    for settings in FILTERS.values():
        batch = batch_of(6, temperature=0.9, uniform=uniforms(6), **settings)
        tokens, logprobs = native.sample(logits, batch)
        want, want_logprobs = reference.sample(logits, batch)
        assert tokens.tolist() == want.tolist()
        np.testing.assert_allclose(logprobs, want_logprobs, rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_its_batch(native):
    logits = torch.from_numpy(randn(9, 3001))
    batch = batch_of(9, temperature=0.9, uniform=uniforms(9), top_p=0.9)
    tokens, logprobs = native.sample(logits, batch)
    for row in range(9):
        one = batch_of(1, temperature=0.9, uniform=uniforms(9)[row], top_p=0.9)
        token, logprob = native.sample(logits[row : row + 1], one)
        assert (token[0], logprob[0]) == (tokens[row], logprobs[row])


@pytest.mark.parametrize("k", [1, 2, 20, 32, 300, 700])
def test_top_logprobs_match_a_sort(ops, k):
    logits = np.round(randn(9, 700), 1)  # many ties
    ids, logprobs = ops.top_logprobs(torch.from_numpy(logits), k)
    assert ids.tolist() == np.argsort(-logits, axis=1, kind="stable")[:, :k].tolist()
    exact = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    np.testing.assert_allclose(
        logprobs, np.take_along_axis(exact, ids.astype(np.int64), 1), rtol=1e-6, atol=2e-6
    )


def test_logits_rows_may_lie_apart(ops):
    wide = torch.from_numpy(randn(4, 120))
    part = wide[:, :100]
    assert ops.sample(part, batch_of(4))[0].tolist() == part.argmax(1).tolist()
    assert ops.top_logprobs(part, 1)[0][:, 0].tolist() == part.argmax(1).tolist()


def test_no_rows_gives_empty_arrays(ops):
    empty = torch.empty(0, 50)
    assert [a.shape for a in ops.sample(empty, batch_of(0))] == [(0,), (0,)]
    assert [a.shape for a in ops.top_logprobs(empty, 3)] == [(0, 3), (0, 3)]


def test_arguments_that_make_no_sense_are_refused(ops):
    logits = torch.from_numpy(randn(2, 50))
    with pytest.raises(InvalidArgument, match="2 rows, batch 3"):
        ops.sample(logits, batch_of(3))
    with pytest.raises(InvalidArgument, match=r"k must be in 1\.\.50, got 51"):
        ops.top_logprobs(logits, 51)
    with pytest.raises(InvalidArgument, match="k must be"):
        ops.top_logprobs(logits, 0)
    with pytest.raises(InvalidArgument, match="pen_ids"):
        ops.sample(logits, batch_of(2, penalties=[[(50, 1)], []]))
    with pytest.raises(InvalidArgument, match="bias_ids"):
        ops.sample(logits, batch_of(2, bias=[[], [(-1, 1.0)]]))


def test_a_batch_checks_its_arrays():
    arrays = vars(SamplingBatch.neutral(2))
    with pytest.raises(InvalidArgument, match=r"SamplingBatch.top_k: int32 .* got float64"):
        SamplingBatch(**{**arrays, "top_k": np.zeros(2)})
    with pytest.raises(InvalidArgument, match=r"SamplingBatch.top_p: 2 entries are needed, got 3"):
        SamplingBatch(**{**arrays, "top_p": np.ones(3, np.float32)})
