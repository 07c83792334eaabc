"""Sampling on the device gives what sampling on the host gives; its buffers grow and take turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dendrite_engine import SamplingParams, kernels
from dendrite_engine.device.sampler import DeviceSampler
from dendrite_engine.kernels.device_ops import DeviceKernels, device_kernels
from dendrite_engine.sampling import Sampler, SamplerState, SamplingRows

VOCAB = 1000

SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_p=0.95),
    SamplingParams(temperature=1.3, top_k=7, min_p=0.02),
    SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5),
    SamplingParams(temperature=0.7, frequency_penalty=0.4, logit_bias={4: 3.0, 90: -float("inf")}),
    SamplingParams(logit_bias={17: 50.0}),
]


@pytest.fixture(params=["twin", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return torch.device("cpu" if request.param == "twin" else "cuda")


@pytest.fixture
def sampler(device) -> DeviceSampler:
    ops = DeviceKernels("twin", "for tests") if device.type == "cpu" else device_kernels()
    assert ops.name == ("twin" if device.type == "cpu" else "cuda"), ops.reason
    return DeviceSampler(ops, VOCAB, device)


@pytest.fixture
def plain() -> Sampler:
    return Sampler(kernels.load("reference"), VOCAB)


def rows_of(rng: np.random.Generator, count: int, settings=SETTINGS) -> SamplingRows:
    made = []
    for i in range(count):
        state = SamplerState(settings[i % len(settings)], i - 3, int(rng.integers(0, 2**63)))
        ids = rng.integers(0, VOCAB, 30).astype(np.int32)
        state.load(ids, rng.random(30) < 0.5)
        made.append(state)
    return SamplingRows.of(made)


def logits_of(rng: np.random.Generator, rows: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(0, 3, (rows, VOCAB)).astype(np.float32))


def positions_of(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(1, 9000, count).astype(np.int32)


@pytest.mark.parametrize("count", [1, 5, 64, 150])
def test_tokens_are_those_of_the_host(sampler, plain, device, count):
    rng = np.random.default_rng(count)
    settings, logits = rows_of(rng, count), logits_of(rng, count + 3)
    logits[1, 5] = float("nan")
    for _ in range(4):
        rows = rng.integers(0, count + 3, count)
        positions = positions_of(rng, count)
        tokens, logprobs = sampler.begin(logits.to(device), rows, settings, positions).wait()
        expected, values = plain.begin(logits, rows, settings, positions).wait()
        assert (tokens.dtype, logprobs.dtype) == (np.int32, np.float32)
        assert (tokens == expected).mean() > (0.999 if device.type == "cpu" else 0.98)
        assert (tokens[rows == 1] == -1).all()
        same = tokens == expected
        np.testing.assert_allclose(logprobs[same], values[same], atol=2e-4)


def test_the_next_step_may_begin_before_the_last_one_is_read(sampler, plain, device):
    rng = np.random.default_rng(0)
    pending, expected = [], []
    for count in (3, 40, 2, 90, 90):
        settings, logits = rows_of(rng, count), logits_of(rng, count)
        positions, rows = positions_of(rng, count), np.arange(count)
        expected.append(plain.begin(logits, rows, settings, positions).wait()[0])
        pending.append(sampler.begin(logits.to(device), rows, settings, positions))
        if len(pending) == 2:
            assert (pending.pop(0).wait()[0] == expected.pop(0)).mean() > 0.97
    assert (pending.pop().wait()[0] == expected.pop()).mean() > 0.97


def test_what_was_read_stays_when_the_buffers_are_used_again(sampler, device):
    rng = np.random.default_rng(1)
    settings, logits = rows_of(rng, 8), logits_of(rng, 8).to(device)
    tokens, _ = sampler.begin(logits, np.arange(8), settings, positions_of(rng, 8)).wait()
    before = tokens.copy()
    for _ in range(3):
        sampler.begin(logits, np.arange(8)[::-1].copy(), settings, positions_of(rng, 8)).wait()
    assert tokens.tolist() == before.tolist()


def test_penalties_follow_the_text_while_the_settings_stay_packed(sampler, plain, device):
    rng = np.random.default_rng(2)
    settings, logits = rows_of(rng, 12), logits_of(rng, 12)
    packed = None
    for step in range(4):
        positions = np.full(12, step, np.int32)
        tokens, _ = sampler.begin(logits.to(device), np.arange(12), settings, positions).wait()
        expected, _ = plain.begin(logits, np.arange(12), settings, positions).wait()
        assert tokens.tolist() == expected.tolist()
        assert packed is None or settings.packed is packed
        packed = settings.packed
        for row, state in settings.special.items():
            state.accept(int(tokens[row]))


@pytest.mark.parametrize("k", [1, 5, VOCAB + 9])
def test_alternatives_are_those_of_the_host(sampler, plain, device, k):
    rng = np.random.default_rng(3)
    logits = logits_of(rng, 9)
    rows = np.array([4, 0, 8, 4])
    ids, logprobs = sampler.begin_top(logits.to(device), rows, k).wait()
    expected, values = plain.begin_top(logits, rows, k).wait()
    assert ids.shape == expected.shape == (4, min(k, VOCAB))
    assert ids.tolist() == expected.tolist()
    np.testing.assert_allclose(logprobs, values, atol=2e-4)


def test_an_engine_gives_the_same_events_whether_tokens_come_from_the_device_or_the_host(
    make_engine, device
):
    results = []
    for is_device in (False, True):
        name = "cuda-twin" if device.type == "cpu" else "cuda"
        engine = make_engine(device=name, dtype="float32", attention="reference", seed=3)
        decoder = engine._parts.decoder
        vocab = engine.model_config.vocab_size
        if is_device and device.type == "cpu":
            decoder._sampler = DeviceSampler(DeviceKernels("twin", "for tests"), vocab, device)
        elif not is_device and device.type != "cpu":
            decoder._sampler = HostSampler(kernels.load("auto"), vocab)
        branches = engine.prompt("device or host").fork(len(SETTINGS))
        some = SETTINGS[1].replace(logprobs=2)
        params = [p.replace(max_tokens=9, ignore_eos=True) for p in (some, *SETTINGS[1:])]
        params = [p.replace(logit_bias=None) for p in params]
        results.append(
            [(r.token_ids, r.finish_reason, r.text) for r in engine.complete(branches, params)]
        )
        results[-1].append([x.token_id for x in engine.top_tokens(branches[:2], 5)[1]])
    assert results[0] == results[1]


class HostSampler(Sampler):
    """Samples on the host from logits on a device."""

    def begin(self, logits, *args):
        return super().begin(logits.cpu(), *args)

    def begin_top(self, logits, *args):
        return super().begin_top(logits.cpu(), *args)
