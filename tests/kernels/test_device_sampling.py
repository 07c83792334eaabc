"""sample and top_logprobs of the device path against the oracle, their twins and chance."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from device_cases import Target, same_bits
from test_sampling import FILTERS, batch_of, check, pack_mask, randn, survivors, uniforms

from dendrite_engine import sampling
from dendrite_engine.kernels import SamplingBatch, device_ops, device_reference_sampling
from dendrite_engine.kernels.sampling_pack import SamplingTable, make_workspace, pack_sampling

ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


class DeviceSampler:
    """The device operations with the interface of the CPU kernels, for the checks they share."""

    def __init__(self, target: Target, blocks: int = 0, room: int = 64) -> None:
        self._target, self._blocks, self._room = target, blocks, room
        self.workspace: torch.Tensor | None = None

    def run(self, logits, params, rows, previous=None, greedy=False):
        target, vocab = self._target, logits.shape[1]
        if self.workspace is None:
            self.workspace = make_workspace(vocab, self._room, target.device)
        (out,) = target.poisoned(1, 2, rows, dtype=torch.int32)
        packed = target.put(torch.from_numpy(params))
        target.ops.sample(logits, packed, self.workspace, out, previous, greedy, self._blocks)
        tokens, logprobs = out.cpu().numpy()
        return tokens.copy(), logprobs.view(np.float32).copy()

    def sample(self, logits, batch):
        on_device = (
            logits if logits.device.type == self._target.device else self._target.put(logits)
        )
        return self.run(on_device, pack_sampling(batch, logits.shape[1]), batch.num_rows)

    def top_logprobs(self, logits, k):
        (ids,) = self._target.poisoned(1, len(logits), k, dtype=torch.int32)
        (logprobs,) = self._target.poisoned(1, len(logits), k)
        self._target.ops.top_logprobs(self._target.put(logits), k, ids, logprobs)
        return ids.cpu().numpy(), logprobs.cpu().numpy()


@pytest.fixture(params=[1, 3])
def device(request, target):
    """The kernels with one block a row, and with several."""
    return DeviceSampler(target, request.param)


@pytest.fixture(params=ORDERS)
def any_order(request):
    """Lets the emulator run threads and blocks in each order; the GPU has its own."""
    result = device_ops.load_emulated()
    if not result.loaded:
        yield
        return
    set_order = ctypes.CDLL(str(result.path)).dendrite_emulator_set_order
    set_order.argtypes = [ctypes.c_int, ctypes.c_uint64]
    set_order(ORDERS[request.param], 7)
    yield
    set_order(0, 0)


def same(a, b):
    """Tokens and log-probabilities agree to the bit."""
    return a[0].tolist() == b[0].tolist() and np.array_equal(
        a[1].view(np.int32), b[1].view(np.int32)
    )


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 1000, 5003, 49152])
def test_greedy_takes_the_most_likely_token(device, vocab):
    check(device, randn(5, vocab), batch_of(5))


def test_greedy_ties_go_to_the_lowest_id(device):
    logits = np.zeros((3, 3000), np.float32)
    logits[1, [1700, 1040, 2999]] = 2.5
    logits[2, :2048] = -1
    assert device.sample(torch.from_numpy(logits), batch_of(3))[0].tolist() == [0, 1040, 2048]


@pytest.mark.parametrize("vocab", [31, 700, 3001])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_match_the_oracle(device, name, vocab):
    for temperature in (0.05, 0.7, 1.0, 3.0, 100.0):
        settings = FILTERS[name]
        batch = batch_of(9, temperature=temperature, uniform=uniforms(9), **settings)
        check(device, randn(9, vocab, seed=1), batch)


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("name", FILTERS)
def test_the_ends_of_the_unit_interval_give_the_first_and_last_survivor(device, name, uniform):
    settings = {"temperature": 1, "uniform": uniform, **FILTERS[name]}
    check(device, randn(4, 2333, spread=1), batch_of(4, **settings))


# Few values and values far apart are what the windows of the fast way can't hold.
SHAPES = {
    "all equal": lambda x: x * 0 + 1.5,
    "whole numbers": np.round,
    "bf16": lambda x: torch.from_numpy(x).bfloat16().float().numpy(),
    "one of 20 nats more": lambda x: np.where(np.arange(x.shape[1]) == 77, 20, x * 0.3),
    "one of 1000 nats more": lambda x: np.where(np.arange(x.shape[1]) == 77, 1000, x),
    "tiny": lambda x: x * 1e-30,
    "huge": lambda x: x * 1e37,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_every_shape_match_the_twin(device, reference, shape):
    rows, vocab = 24, 5003
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(SHAPES[shape](randn(rows, vocab, seed=3)).astype(np.float32))
    batch = batch_of(
        rows, temperature=rng.choice([0.7, 1.0, 3.0, 50.0], rows), uniform=rng.random(rows),
        top_k=rng.choice([0, 0, 1, 101, 2500, 5002], rows),
        top_p=rng.choice([1, 1, 0.9, 0.2], rows), min_p=rng.choice([0, 0, 0.01, 1], rows),
    )  # fmt: skip
    tokens, logprobs = device.sample(logits, batch)
    want, want_logprobs = reference.sample(logits, batch)
    assert tokens.tolist() == want.tolist()
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("vocab", [640, 5000])
def test_equal_logits_are_ordered_by_id(device, vocab):
    logits = torch.zeros(8, vocab)
    batch = batch_of(8, temperature=1, top_k=4, uniform=(np.arange(8) + 0.5) / 8)
    assert device.sample(logits, batch)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("settings", FILTERS.values(), ids=FILTERS)
def test_a_full_vocabulary_agrees_with_the_twin(device, reference, settings):
    logits = torch.from_numpy(randn(6, 49152, seed=2))
    batch = batch_of(6, temperature=0.9, uniform=uniforms(6), **settings)
    tokens, logprobs = device.sample(logits, batch)
    want, want_logprobs = reference.sample(logits, batch)
    assert tokens.tolist() == want.tolist()
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=1e-6, atol=1e-6)


def constrained(rows, vocab, **settings):
    """Rows with penalties, a bias (some ids twice) and a bitmask; some with little of each."""
    rng = np.random.default_rng(3)
    penalties = [
        [(int(t), int(rng.integers(0, 4))) for t in rng.permutation(vocab)[: rng.integers(0, 60)]]
        for _ in range(rows)
    ]
    bias = [[(int(t), float(rng.normal() * 4)) for t in (*range(row), row)] for row in range(rows)]
    mask = pack_mask(
        [rng.permutation(vocab)[: 1 + vocab * row // 13] for row in range(rows)], vocab
    )
    return batch_of(rows, penalties=penalties, bias=bias, mask=mask, **settings)


@pytest.mark.parametrize("vocab", [200, 6007])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition": 1.3},
        {"presence": 0.8},
        {"frequency": 0.4},
        {"repetition": 1.2, "presence": -0.5, "frequency": 0.7, "top_p": 0.8, "top_k": 30},
    ],
    ids=str,
)
def test_penalties_bias_and_mask_match_the_oracle(device, reference, vocab, temperature, settings):
    logits = randn(12, vocab, seed=6)
    batch = constrained(12, vocab, temperature=temperature, uniform=uniforms(12), **settings)
    check(device, logits, batch)
    tokens, _ = device.sample(torch.from_numpy(logits), batch)
    assert tokens.tolist() == reference.sample(torch.from_numpy(logits), batch)[0].tolist()


def test_the_mask_decides_alone_when_it_allows_one_token(device):
    for token in (0, 31, 32, 1023, 1024, 3069):
        mask = pack_mask([[token]], 3070)
        for temperature in (0.0, 1.0):
            batch = batch_of(1, mask=mask, temperature=temperature, uniform=0.99)
            assert device.sample(torch.from_numpy(randn(1, 3070)), batch)[0].tolist() == [token]


def test_a_bias_of_minus_infinity_bans_a_token(device):
    logits = np.zeros((1, 50), np.float32)
    logits[0, 7] = 100
    tokens, logprobs = device.sample(torch.from_numpy(logits), batch_of(1, bias=[[(7, -np.inf)]]))
    assert tokens.tolist() == [0]
    np.testing.assert_allclose(logprobs, [-100], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2047, 3076])
def test_a_row_that_is_not_finite_gives_no_token_and_spares_the_others(device, bad, place):
    logits = randn(6, 3077)
    mask = pack_mask([range(1, 3076)] * 6, 3077)  # what is not finite is also banned
    for settings in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1, "mask": mask}):
        batch = batch_of(6, uniform=0.3, **settings)
        clean = device.sample(torch.from_numpy(logits), batch)
        spoilt = logits.copy()
        spoilt[[1, 4], place] = bad
        tokens, logprobs = device.sample(torch.from_numpy(spoilt), batch)
        assert tokens[[1, 4]].tolist() == [-1, -1]
        assert np.isnan(logprobs[[1, 4]]).all()
        kept = [0, 2, 3, 5]
        assert same((tokens[kept], logprobs[kept]), (clean[0][kept], clean[1][kept]))


def test_a_row_of_nothing_but_minus_infinity_or_with_every_token_banned_gives_no_token(device):
    logits = torch.from_numpy(randn(3, 2500))
    logits[2] = -np.inf
    batch = batch_of(3, mask=np.zeros((3, 79), np.int32), temperature=[0, 1, 1])
    tokens, logprobs = device.sample(logits, batch)
    assert tokens.tolist() == [-1, -1, -1]
    assert np.isnan(logprobs).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_draws_follow_the_distribution(target, settings):
    """Pearson's statistic over 4000 draws of the kernel's own generator stays below its limit."""
    draws, logits = 4000, randn(1, 24, seed=8, spread=1.2)
    batch = batch_of(draws, temperature=1.3, **settings)
    table = SamplingTable(batch, 24, seeds=[5] * draws, path_keys=[sampling.mix64(1)] * draws)
    device = DeviceSampler(target, 1, room=1024)
    params = table.pack(np.arange(draws), rows=0)
    tokens, _ = device.run(target.put(torch.from_numpy(logits)), params, draws)
    ids, probabilities = survivors(logits, batch_of(1, temperature=1.3, **settings), 0)
    counts = np.array([(tokens == token).sum() for token in ids])
    assert counts.sum() == draws
    expected = probabilities * draws
    free = len(ids) - 1
    limit = free + 3.8 * np.sqrt(2 * free) + 10
    assert ((counts - expected) ** 2 / expected).sum() < limit


def test_the_kernel_draws_as_the_engine_does(target):
    rows, vocab = 40, 2500
    seeds = [0, 1, -1, 2**63, 12345678901234567890] * 8
    keys = [sampling.mix64(row) for row in range(rows)]
    positions = np.arange(rows) * 97
    draws = [sampling.uniform(s, k, int(p)) for s, k, p in zip(seeds, keys, positions, strict=True)]
    batch = batch_of(rows, temperature=1, uniform=draws)
    params = SamplingTable(batch, vocab, seeds=seeds, path_keys=keys).pack(positions)
    assert device_reference_sampling.unpack_sampling(params)[0].uniform.tolist() == draws
    logits = target.put(torch.from_numpy(randn(rows, vocab, spread=1)))
    device = DeviceSampler(target)
    assert same(device.run(logits, params, rows), device.sample(logits, batch))


def mixed(rows, vocab):
    """Greedy and random rows, with and without filters, penalties, bias and mask."""
    rng = np.random.default_rng(11)
    batch = constrained(
        rows, vocab, temperature=rng.choice([0, 0.5, 1, 2], rows), uniform=rng.random(rows),
        top_k=rng.choice([0, 50], rows), top_p=rng.choice([1, 0.9], rows),
        min_p=rng.choice([0, 0.02], rows), repetition=rng.choice([1, 1.2], rows),
    )  # fmt: skip
    return batch, rng.choice([-1, *range(rows)], rows).astype(np.int32)  # some have no mask


def test_a_row_has_the_same_bits_with_any_blocks_neighbours_and_addresses(any_order, target):
    rows, vocab = 11, 6007
    batch, mask_rows = mixed(rows, vocab)
    table = SamplingTable(batch, vocab, mask_rows=mask_rows)
    logits = torch.from_numpy(randn(rows, vocab, seed=12))
    want = DeviceSampler(target, 1).run(target.put(logits), table.pack(), rows)
    for blocks, room in ((2, 64), (6, 64), (1, 1), (3, 2), (0, 64)):
        device = DeviceSampler(target, blocks, room)
        assert same(device.run(target.put(logits), table.pack(), rows), want)
    order = np.array([7, -1, 3, 3, 10, 0, 99, 5], np.int32)
    for lead, gap in ((0, 1), (1, 0), (2, 3), (3, 5)):
        whole = target.put(torch.zeros(rows * (vocab + gap) + lead))
        apart = whole[lead:].view(rows, vocab + gap)[:, :vocab]
        apart.copy_(logits)
        for row in (0, 5, 10):
            one = SamplingTable(batch, vocab, mask_rows=mask_rows).pack(rows=row)
            tokens, logprobs = DeviceSampler(target, 2).run(apart, one, rows)
            assert (tokens[row], logprobs[row]) == (want[0][row], want[1][row])
    greedy = SamplingTable(batch_of(8), vocab).pack(rows=order)
    tokens, logprobs = DeviceSampler(target, 2).run(target.put(logits), greedy, 9, greedy=True)
    best = logits.argmax(1).tolist()
    assert tokens.tolist() == [best[7], -1, best[3], best[3], best[10], best[0], -1, best[5], -1]
    assert np.isnan(logprobs[[1, 6, 8]]).all()


def test_a_workspace_is_left_as_it_was_found(target):
    device = DeviceSampler(target, 4)
    batch, _ = mixed(9, 5003)
    logits = torch.from_numpy(randn(9, 5003))
    first = device.sample(logits, batch)
    assert same(device.sample(logits, batch), first)
    head, state = 16, 32
    left = device.workspace.cpu().view(64, -1)
    assert torch.count_nonzero(left[:, :head]) == 0
    assert torch.count_nonzero(left[:, head + state : head + state + 4 * 2048]) == 0


def test_the_token_of_the_step_before_counts_as_generated(target):
    vocab, rows = 3000, 7
    logits = target.put(torch.from_numpy(randn(rows, vocab, seed=2)))
    best = logits.argmax(1).tolist()
    penalties = [[(best[row], 1)] if row % 2 else [] for row in range(rows)]
    batch = batch_of(rows, presence=1e4, frequency=3, repetition=2, penalties=penalties)
    previous = [best[3], -1, best[0], best[5], 17, vocab + 3]
    indices = np.array([2, 0, 4, 1, -1, 3, 99], np.int32)
    params = SamplingTable(batch, vocab).pack(previous=indices)
    tokens = target.ints(previous)
    for blocks in (1, 3):
        got = DeviceSampler(target, blocks).run(logits, params, rows, tokens)
        want = torch.empty(2, rows, dtype=torch.int32)
        packed = torch.from_numpy(params)
        device_reference_sampling.sample(logits.cpu(), packed, packed, want, tokens.cpu())
        assert got[0].tolist() == want[0].tolist()
        assert got[0][0] != best[0]
        assert got[0][6] == best[6]


@pytest.mark.parametrize("k", [1, 20, 64, 300, 700])
def test_top_logprobs_match_a_sort(target, k):
    check_top(target, np.round(randn(9, 700), 1), k)


@pytest.mark.parametrize("k", [1, 64, 2048, 2049, 5003])
@pytest.mark.parametrize("shape", SHAPES)
def test_top_logprobs_of_rows_of_every_shape_match_a_sort(target, shape, k):
    check_top(target, SHAPES[shape](randn(2, 5003, seed=4)).astype(np.float32), k)


def check_top(target, logits, k):
    ids, logprobs = DeviceSampler(target).top_logprobs(torch.from_numpy(logits), k)
    assert ids.tolist() == np.argsort(-logits, axis=1, kind="stable")[:, :k].tolist()
    exact = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    expected = np.take_along_axis(exact, ids.astype(np.int64), 1)
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6, atol=2e-6)


def test_top_logprobs_of_chosen_rows(target):
    logits = torch.from_numpy(randn(5, 2600))
    logits[2, 5] = np.nan
    whole = target.put(torch.zeros(5, 2603))
    whole[:, :2600] = logits
    rows = [4, -1, 2, 0, 5, 0]
    (ids, want_ids) = target.poisoned(2, 6, 3, dtype=torch.int32)
    (logprobs, want) = target.poisoned(2, 6, 3)
    target.ops.top_logprobs(whole[:, :2600], 3, ids, logprobs, target.ints(rows))
    device_reference_sampling.top_logprobs(whole[:, :2600], 3, want_ids, want, target.ints(rows))
    assert torch.equal(ids, want_ids)
    assert ids[[1, 2, 4]].eq(-1).all()
    torch.testing.assert_close(logprobs, want, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert same_bits(logprobs[3], logprobs[5])


def test_no_rows_are_no_mistake(target):
    device = DeviceSampler(target)
    empty = torch.empty(0, 50)
    assert [a.shape for a in device.sample(empty, batch_of(0))] == [(0,), (0,)]
    assert [a.shape for a in device.top_logprobs(empty, 3)] == [(0, 3), (0, 3)]


def test_arguments_that_make_no_sense_are_refused(target):
    logits = target.randn(2, 50)
    params = target.put(torch.from_numpy(pack_sampling(SamplingBatch.neutral(2), 50)))
    workspace = make_workspace(50, 1, target.device)
    (out,) = target.poisoned(1, 2, 2, dtype=torch.int32)
    (floats,) = target.poisoned(1, 2, 51)
    for arguments, message in (
        ((logits.half(), params, workspace, out), "logits must be fp32"),
        ((logits[0], params, workspace, out), "logits must have 2 dimensions"),
        ((logits.t(), params, workspace, out), "logits must be contiguous inside a row"),
        ((logits, params[:9], workspace, out), "params must start with a header"),
        ((logits, params, workspace[:-16], out), "workspace must have at least"),
        ((logits, params, workspace, out.view(-1)), "out must have the shape"),
        ((logits, params, workspace, floats), "out must be Int"),
    ):
        with pytest.raises(RuntimeError, match=f"sample: {message}"):
            target.ops.sample(*arguments)
    for k in (0, 51):
        (ids,) = target.poisoned(1, 2, k, dtype=torch.int32)
        with pytest.raises(RuntimeError, match=r"top_logprobs: k must be in 1..50"):
            target.ops.top_logprobs(logits, k, ids, floats[:, :k].contiguous())
