"""Search on SmolLM2: beams equal those of `transformers`, MCTS leaves nothing behind."""

from __future__ import annotations

import pytest

from dendrite_engine import Budget, SamplingParams
from dendrite_engine.search import MCTS, BeamSearch, combine, keyword_coverage, mean_logprob

pytestmark = pytest.mark.model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The opposite of hot is",
    "A haiku about winter:\n",
    "Water boils at",
    "Dear Sir or Madam,\n\n",
    "Die Hauptstadt von Deutschland ist",
    "Roses are red,",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
)
MAX_TOKENS = 64


@pytest.fixture(scope="module")
def reference(default_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model, dtype="float32").eval()


def hf_beam(reference, ids, **options):
    import torch

    with torch.inference_mode():
        out = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=4,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            pad_token_id=0,
            **options,
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping", "prompts"),
    [(1.0, False, PROMPTS), (0.6, True, PROMPTS[-2:]), (2.0, "never", PROMPTS[-2:])],
)
def test_beam_search_equals_transformers(
    smollm2, reference, length_penalty, early_stopping, prompts
):
    search = BeamSearch(
        width=4,
        max_tokens=MAX_TOKENS,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    for prompt in prompts:
        root = smollm2.prompt(prompt)
        expected = hf_beam(
            reference, root.token_ids, length_penalty=length_penalty, early_stopping=early_stopping
        )
        result = smollm2.search(root, search).wait(300)
        assert list(result.token_ids) == expected, prompt
        assert result.best.token_ids == [*root.token_ids, *expected]
        result.prune()
        root.prune()
    smollm2.check_integrity()


def test_mcts_raises_the_value_and_leaves_only_the_root(smollm2):
    root = smollm2.prompt(
        [{"role": "user", "content": "Write one sentence about a cat, a moon and a violin."}]
    )
    evaluate = combine(keyword_coverage(["cat", "moon", "violin"]), mean_logprob())
    greedy = root.fork()[0]
    smollm2.complete([greedy], SamplingParams(max_tokens=24))
    baseline = evaluate.bind(root)([greedy])[0]
    greedy.prune()
    result = smollm2.search(
        root,
        MCTS(width=3, tokens_per_node=8, max_depth=3, seed=1),
        Budget(tokens=480),
        evaluator=evaluate,
    ).wait(300)
    assert result.value > 0
    assert result.tokens <= 480
    assert baseline >= 0
    assert result.best.token_ids == [*root.token_ids, *result.token_ids]
    result.prune()
    assert smollm2.branches == [root]
    root.prune()
    smollm2.check_integrity()
