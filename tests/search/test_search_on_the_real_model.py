"""Search on SmolLM2: beams equal those of `transformers`, MCTS leaves nothing behind."""

from __future__ import annotations

import pytest

from dendrite_engine import Budget
from dendrite_engine.search import (
    ABMCTS,
    LATS,
    MCTS,
    PUCT,
    BeamSearch,
    Lookahead,
    TreeOfThought,
    check_contract,
    combine,
    keyword_coverage,
    mean_logprob,
)

pytestmark = pytest.mark.model

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "A haiku about winter:\n",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "Once upon a time, in a village by the sea,",
    "The opposite of hot is",
    "Water boils at",
    "Dear Sir or Madam,\n\n",
    "Die Hauptstadt von Deutschland ist",
    "Roses are red,",
)


@pytest.fixture(scope="module")
def reference(default_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model, dtype="float32").eval()


def hf_beam(reference, ids, max_tokens, **options):
    import torch

    with torch.inference_mode():
        out = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=4,
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            **options,
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping", "prompts"),
    [(1.0, False, PROMPTS), (0.6, True, PROMPTS[:1]), (2.0, "never", PROMPTS[2:3])],
)
def test_beam_search_equals_transformers(
    smollm2, reference, beam_size, length_penalty, early_stopping, prompts
):
    count, max_tokens = beam_size
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    search = BeamSearch(width=4, max_tokens=max_tokens, **options)
    for prompt in prompts[:count]:
        root = smollm2.prompt(prompt)
        expected = hf_beam(reference, root.token_ids, max_tokens, **options)
        result = smollm2.search(root, search).wait(300)
        assert list(result.token_ids) == expected, prompt
        assert result.best.token_ids == [*root.token_ids, *expected]
        result.prune()
        root.prune()
    smollm2.check_integrity()


def test_a_seeded_mcts_repeats_on_the_same_root_and_leaves_only_the_root(smollm2):
    root = smollm2.prompt(
        [{"role": "user", "content": "Write one sentence about a cat, a moon and a violin."}]
    )
    before = set(smollm2.branches)
    runs = []
    for _ in range(2):
        handle = smollm2.search(
            root,
            MCTS(width=3, tokens_per_node=6, max_depth=3, seed=1),
            Budget(tokens=120),
            evaluator=combine(keyword_coverage(["cat", "moon", "violin"]), mean_logprob()),
        )
        result = handle.wait(300)
        assert result.tokens <= 120
        assert result.best.token_ids == [*root.token_ids, *result.token_ids]
        runs.append([(node.token_ids, node.visits) for node in handle.tree.nodes])
        result.prune()
        assert set(smollm2.branches) == before
    assert runs[0] == runs[1]
    root.prune()
    smollm2.check_integrity()


@pytest.mark.parametrize(
    "search",
    [
        MCTS(
            seed=1, width=4, parallel=2, max_depth=4, selection=PUCT(noise=0.25),
            expansion="actions", actions=[" cat", " moon", " violin and", " a"],
        ),
        MCTS(seed=1, width=3, parallel=2, tokens_per_node=4, expansion="top_p", max_depth=4),
        ABMCTS(seed=1, parallel=2, tokens_per_node=4, refine="\nBetter:"),
        TreeOfThought(seed=1, width=2, tokens_per_node=4, max_depth=3, thought_stop=" "),
        Lookahead(seed=1, width=2, tokens_per_node=3, max_depth=3),
        LATS(seed=1, parallel=2, tokens_per_node=3, simulations=4, reflection_tokens=4),
    ],
    ids=lambda search: f"{search.name}-{search.expansion}",
)  # fmt: skip
def test_the_tree_algorithms_keep_their_contract_on_the_real_model(smollm2, search):
    root = smollm2.prompt("A sentence with cat, moon and violin:")
    value = combine(keyword_coverage(["cat", "moon", "violin"]), mean_logprob())
    check_contract(search, root, value)
    root.prune()
    smollm2.check_integrity()
