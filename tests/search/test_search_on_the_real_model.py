"""Search on SmolLM2: beams equal those of `transformers`, no search leaves anything behind."""

from __future__ import annotations

import pytest

from dendrite_engine import Budget
from dendrite_engine.search import (
    ABMCTS,
    DVTS,
    LATS,
    MCTS,
    PUCT,
    REBASE,
    BeamSearch,
    BestOfN,
    DiverseBeam,
    Lookahead,
    PRMBeam,
    SelfConsistency,
    StochasticBeam,
    TreeOfThought,
    check_contract,
    combine,
    keyword_coverage,
    mean_logprob,
    reward_model,
    rollout,
    self_evaluation,
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


PADDING = {0, 2}  # what `generate` fills up with


@pytest.fixture(scope="module")
def reference(default_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(default_model, dtype="float32").eval()


def hf_beam(reference, ids, max_tokens, **options):
    """All four hypotheses of `generate`, best first, padded to one length, and their scores."""
    import torch

    with torch.inference_mode():
        out = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            num_beams=4,
            num_return_sequences=4,
            return_dict_in_generate=True,
            output_scores=True,
            do_sample=False,
            max_new_tokens=max_tokens,
            pad_token_id=0,
            **options,
        )
    return out.sequences[:, len(ids) :].tolist(), out.sequences_scores.tolist()


@pytest.mark.parametrize(
    ("length_penalty", "early_stopping", "prompts"),
    [(1.0, False, PROMPTS), (0.6, True, PROMPTS[:1]), (2.0, "never", PROMPTS[2:3])],
)
def test_all_hypotheses_and_scores_of_beam_search_equal_those_of_transformers(
    smollm2, reference, beam_size, length_penalty, early_stopping, prompts
):
    count, max_tokens = beam_size
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    search = BeamSearch(width=4, max_tokens=max_tokens, **options)
    for prompt in prompts[:count]:
        root = smollm2.prompt(prompt)
        expected, scores = hf_beam(reference, root.token_ids, max_tokens, **options)
        result = smollm2.search(root, search).wait(300)
        for found, padded in zip(result.found, expected, strict=True):
            size = len(found.token_ids)
            assert list(found.token_ids) == padded[:size], prompt
            assert {*padded[size:]} <= PADDING, prompt
        assert [found.value for found in result.found] == pytest.approx(scores, abs=1e-4)
        assert result.token_ids == result.found[0].token_ids
        assert result.best.token_ids == [*root.token_ids, *result.token_ids]
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


STEPS = {"tokens_per_step": 8, "stop": (".", ","), "max_steps": 3}


@pytest.mark.parametrize(
    "search",
    [
        BestOfN(n=6, max_tokens=12, parallel=3, seed=2),
        SelfConsistency(n=6, max_tokens=12, seed=2, extract=r"\w+"),
        DiverseBeam(width=4, groups=2, max_tokens=8),
        StochasticBeam(width=3, max_tokens=6, candidates=64, seed=2),
        PRMBeam(width=2, branching=2, seed=2, **STEPS),
        DVTS(subtrees=2, branching=2, seed=2, **STEPS),
        REBASE(width=4, seed=2, **STEPS),
    ],
    ids=lambda search: search.name,
)
def test_a_seeded_search_repeats_and_leaves_only_the_root(smollm2, search):
    root = smollm2.prompt("Three things about the sea: it is")
    before = set(smollm2.branches)
    runs = []
    for _ in range(2):
        result = smollm2.search(root, search).wait(300)
        assert result.best.token_ids == [*root.token_ids, *result.token_ids]
        runs.append([(found.token_ids, found.value) for found in result.found])
        result.prune()
        assert set(smollm2.branches) == before
    assert runs[0] == runs[1]
    assert runs[0]
    root.prune()
    smollm2.check_integrity()


def test_self_evaluation_gives_the_probabilities_of_transformers_and_keeps_no_trace(
    smollm2, reference
):
    import torch

    ask = "\nQuestion: Is the sentence above true? Answer (yes or no):"
    root = smollm2.prompt("Fact:")
    forks = root.fork(2)
    forks[0].extend(" Paris is the capital of France.")
    forks[1].extend(" The moon is a small green vegetable.")
    before = set(smollm2.branches)
    values = self_evaluation(ask, good=" Yes", bad=" No").bind(root)(forks)
    assert set(smollm2.branches) == before
    yes, no = (smollm2.tokenizer.encode(text)[0] for text in (" Yes", " No"))
    for fork, value in zip(forks, values, strict=True):
        ids = fork.token_ids + smollm2.tokenizer.encode(ask)
        with torch.inference_mode():
            p = reference(torch.tensor([ids])).logits[0, -1].softmax(-1)
        assert value == pytest.approx(float(p[yes] / (p[yes] + p[no])), abs=1e-4)
    both = combine(self_evaluation(ask), rollout(mean_logprob(), tokens=4))
    search = BestOfN(n=3, max_tokens=6, seed=1)
    result = smollm2.search(root, search, evaluator=both).wait(300)
    assert result.compute > result.tokens
    result.prune()
    for branch in (*forks, root):
        branch.prune()
    smollm2.check_integrity()


def test_a_reward_model_in_a_second_engine_agrees_with_the_same_model_asked_in_place(
    smollm2, default_model
):
    from dendrite_engine import Engine

    ask = "\nQuestion: Is the sentence above true? Answer (yes or no):"
    root = smollm2.prompt("Fact:")
    forks = root.fork(2)
    forks[0].extend(" Water is wet.")
    forks[1].extend(" Fire is cold.")
    here = self_evaluation(ask).bind(root)(forks)
    with Engine.from_pretrained(default_model, num_pages=128) as other:
        good, bad = (" Yes", "Yes", " yes", "yes"), (" No", "No", " no", "no")
        model = reward_model(other, good=good, bad=bad, template=lambda p, t: p + t + ask)
        bound = model.bind(root)
        assert bound(forks) == pytest.approx(here, abs=1e-3)
        assert other.branches == []
        assert bound.tokens_computed() > 20
    for branch in (*forks, root):
        branch.prune()
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
