"""Logits of tiny random models equal transformers' through prefill, chunks, decode and fork."""

from __future__ import annotations

import pytest
import torch

from tiny_models import KINDS, reference_model

TOLERANCE = 1e-4
CHUNK = 23


def _ids(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def _logits(engine, branch) -> torch.Tensor:
    engine.top_tokens([branch], 1)
    row = branch._logits
    return row.tensor[row.row]


@pytest.fixture(params=KINDS)
def pair(request, make_engine, tiny_model):
    engine = make_engine(request.param, max_batch_tokens=CHUNK, page_size=16)
    return engine, reference_model(tiny_model(request.param))


@torch.inference_mode()
def test_prefill_in_chunks_then_decode_then_fork_equal_the_reference(pair):
    engine, reference = pair
    ids = _ids(70)
    expected = reference(torch.tensor([ids])).logits[0]
    root = engine.prompt(ids[:50])
    assert (_logits(engine, root) - expected[49]).abs().max() < TOLERANCE
    for position in range(50, 60):
        root.extend([ids[position]])
        assert (_logits(engine, root) - expected[position]).abs().max() < TOLERANCE
    left, right = root.fork(2)
    left.extend(ids[60:70])
    other = _ids(10, seed=2)
    right.extend(other)
    engine.top_tokens([left, right], 1)
    assert (_logits(engine, left) - expected[69]).abs().max() < TOLERANCE
    alone = reference(torch.tensor([ids[:60] + other])).logits[0, -1]
    assert (_logits(engine, right) - alone).abs().max() < TOLERANCE
    engine.check_integrity()


@torch.inference_mode()
def test_a_fork_inside_a_page_and_its_siblings_equal_the_reference(pair):
    engine, reference = pair
    ids = _ids(45)
    root = engine.prompt(ids)
    forks = [root.fork(at=at)[0].extend(_ids(5, seed=at)) for at in (1, 15, 16, 17, 32, 45)]
    engine.top_tokens(forks, 1)
    for fork in forks:
        expected = reference(torch.tensor([fork.token_ids])).logits[0, -1]
        assert (_logits(engine, fork) - expected).abs().max() < TOLERANCE
    engine.check_integrity()


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("attention", ["tree", "reference"])
def test_attention_backends_give_the_same_greedy_tokens(make_engine, kind, attention):
    from dendrite_engine import SamplingParams

    engine = make_engine(kind, attention=attention)
    oracle = make_engine(kind, attention="reference", core="reference")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    outputs = []
    for target in (engine, oracle):
        root = target.prompt(_ids(40))
        branches = [root.fork(at=at)[0] for at in (7, 16, 40)]
        outputs.append([c.token_ids for c in target.complete(branches, params)])
    assert outputs[0] == outputs[1]
