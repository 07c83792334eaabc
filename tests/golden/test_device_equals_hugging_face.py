"""The device path gives Hugging Face's numbers on the real default model: greedy tokens in fp32; in
bf16 almost always the same tokens, with log-probabilities close to those of the rounded weights.

On a GPU (marker `cuda`) all prompts run; without one, the twin of the path runs a few.
"""

from __future__ import annotations

import pytest
import torch
from golden_prompts import PROMPTS

from dendrite_engine import Engine, SamplingParams

pytestmark = pytest.mark.model
DEVICES = ["cuda-twin", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    return request.param


def complete(default_model, device, dtype):
    """(prompt ids, new ids, logprobs) of greedy completions, all in one job."""
    prompts, tokens = (PROMPTS, 64) if device == "cuda" else (PROMPTS[:2], 12)
    greedy = SamplingParams(max_tokens=tokens, ignore_eos=True)
    options = {"num_pages": 1500, "max_context": 1024}
    with Engine.from_pretrained(default_model, device=device, dtype=dtype, **options) as engine:
        roots = [engine.prompt(prompt) for prompt in prompts]
        done = engine.complete(roots, greedy)
        return [
            (root.token_ids[:-tokens], c.token_ids, torch.tensor(c.logprobs))
            for root, c in zip(roots, done, strict=True)
        ]


@torch.inference_mode()
def expected_rows(default_model, rows, *, rounded):
    """Hugging Face's fp32 log-probabilities at each new token, teacher-forced."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32).eval()
    if rounded:  # the same weights as a bf16 engine holds
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    for prompt_ids, new_ids, _ in rows:
        logits = model(torch.tensor([[*prompt_ids, *new_ids]])).logits[0, len(prompt_ids) - 1 : -1]
        yield torch.log_softmax(logits, -1)


def test_fp32_tokens_are_those_of_hugging_face(default_model, device):
    rows = complete(default_model, device, "float32")
    expected = expected_rows(default_model, rows, rounded=False)
    for (_, new_ids, logprobs), want in zip(rows, expected, strict=True):
        assert want.argmax(-1).tolist() == new_ids
        at_token = want.gather(1, torch.tensor(new_ids)[:, None])[:, 0]
        torch.testing.assert_close(logprobs, at_token, atol=1e-3, rtol=0)


def test_bf16_stays_close_to_the_same_weights_in_fp32(default_model, device):
    rows = complete(default_model, device, "bfloat16")
    expected = expected_rows(default_model, rows, rounded=True)
    differences, agreed, total = [], 0, 0
    for (_, new_ids, logprobs), want in zip(rows, expected, strict=True):
        at_token = want.gather(1, torch.tensor(new_ids)[:, None])[:, 0]
        differences.append((logprobs - at_token).abs())
        agreed += sum(a == b for a, b in zip(want.argmax(-1).tolist(), new_ids, strict=True))
        total += len(new_ids)
    worst = torch.cat(differences)
    said = f"mean {worst.mean():.4f}, worst {worst.max():.4f}, top-1 {agreed} of {total}"
    assert worst.mean() < 2e-2, said
    assert agreed >= 0.97 * total, said
