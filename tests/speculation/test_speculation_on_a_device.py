"""Speculative decoding on the device path: its twin, the emulated kernels, a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from proposers import Scripted, noise, oracle

from dendrite_engine import PromptLookup, SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from device_engines import engine_maker
from test_device_path import ON_A_GPU

TEXT = "one two three, one two four; one two three, one two "
PARAMS = (
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.8, top_p=0.95, logprobs=2),
    SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.8, frequency_penalty=0.3),
)


@pytest.fixture(params=["twin", "emulated", ON_A_GPU], name="on_device")
def _on_device(request, make_engine, monkeypatch):
    return engine_maker(request.param, make_engine, monkeypatch)


def run(engine, params, speculate=None):
    forks = engine.prompt(TEXT).fork(3)
    forks[1].extend("x" * 9)
    events = list(engine.generate(forks, params, speculate=speculate))
    engine.check_integrity()
    top = [[other.token_id for other in event.top] for event in events if event.branch is forks[0]]
    return [branch.token_ids for branch in forks], top


@pytest.mark.parametrize("params", PARAMS, ids=["greedy", "drawn", "penalties"])
def test_tokens_are_those_of_plain_decoding(on_device, params):
    plain, engine = on_device(), on_device()
    expected = run(plain, params)
    for speculate in (PromptLookup(shortest=1, width=2), Scripted(noise(1, 250))):
        assert run(engine, params, speculate) == expected
        engine.prune_all()
    before = engine.stats().steps
    assert run(engine, params, Scripted(oracle(expected[0]))) == expected
    assert engine.stats().steps - before < 8
    assert engine.stats().speculation.total.accepted > 0


def test_plain_steps_between_drafts_still_run_ahead(on_device):
    """A lane that rests does not hold up the pipeline."""
    engine = on_device(debug=False)
    (branch,) = engine.prompt("nothing is said twice here").fork()
    engine.complete(
        [branch], PARAMS[1].replace(max_tokens=60, temperature=2.0), speculate=PromptLookup()
    )
    assert engine._loop._forward.num_ahead > 10
