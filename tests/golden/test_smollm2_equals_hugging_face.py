"""The real default model gives Hugging Face's greedy tokens, fp32, 50 prompts x 64 tokens.

Each prompt and our 64 tokens go through Hugging Face in one pass; its most likely token at every
position must be ours. By induction that is what its greedy `generate` would have produced; two
prompts go through `generate` itself.
"""

from __future__ import annotations

import pytest
import torch
from golden_prompts import PROMPTS

from dendrite_engine import SamplingParams

pytestmark = pytest.mark.model
NEW_TOKENS = 64
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def reference(default_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def completions(smollm2):
    """All 50 prompts in one job: continuous batching is part of what is checked."""
    roots = [smollm2.prompt(prompt) for prompt in PROMPTS]
    done = smollm2.complete(roots, GREEDY)
    rows = [
        (root.token_ids[:-NEW_TOKENS], c.token_ids, c.logprobs)
        for root, c in zip(roots, done, strict=True)
    ]
    for root in roots:
        root.prune()
    return rows


def test_there_are_fifty_different_prompts():
    assert len(set(map(str, PROMPTS))) == 50


@torch.inference_mode()
def test_greedy_tokens_are_those_of_hugging_face(reference, completions):
    for prompt_ids, new_ids, logprobs in completions:
        assert len(new_ids) == NEW_TOKENS
        ids = torch.tensor([[*prompt_ids, *new_ids]])
        logits = reference(ids).logits[0, len(prompt_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == new_ids
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(new_ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(logprobs), expected, atol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("index", [0, 33])
def test_generate_of_hugging_face_gives_the_same_tokens(reference, completions, index):
    prompt_ids, new_ids, _ = completions[index]
    out = reference.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert out[0, len(prompt_ids) :].tolist() == new_ids


def test_tokenizer_and_chat_template_are_those_of_hugging_face(default_model, smollm2):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(default_model)
    for prompt in PROMPTS:
        if isinstance(prompt, str):
            assert (
                smollm2.tokenizer.encode(prompt, add_special_tokens=True)
                == theirs(prompt).input_ids
            )
        else:
            text = theirs.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            assert smollm2.tokenizer.apply_chat_template(prompt) == text


def test_forks_of_the_real_model_equal_linear_generation(smollm2):
    """Shared pages, copies inside a page, neighbours: still the tokens of the sequence run
    alone.
    """
    root = smollm2.prompt("The history of the lighthouse began when sailors asked for a light that")
    (trunk,) = smollm2.complete(root.fork(), SamplingParams(max_tokens=24, ignore_eos=True))
    base = root.num_tokens
    short = SamplingParams(max_tokens=8, ignore_eos=True)
    forks = [trunk.branch.fork(at=base + i)[0].extend(" but") for i in range(0, 24, 5)]
    assert smollm2.stats().pages_shared > 0
    done = smollm2.complete(forks, short)
    for fork, completion in zip(forks, done, strict=True):
        alone = smollm2.prompt(fork.token_ids[:-8], namespace=f"alone-{fork.id}")
        (linear,) = smollm2.complete([alone], short)
        assert completion.token_ids == linear.token_ids
        alone.prune()
    smollm2.check_integrity()
    root.prune(subtree=True)
