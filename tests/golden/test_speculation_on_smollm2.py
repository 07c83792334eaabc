"""The real default model, fp32, 50 prompts: speculative decoding gives the greedy tokens of plain
decoding.
"""

from __future__ import annotations

import pytest
from golden_prompts import PROMPTS

from dendrite_engine import PromptLookup, SamplingParams

pytestmark = pytest.mark.model
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
WAYS = {
    "chain": PromptLookup(tokens=4, shortest=1, adaptive=False),
    "tree": PromptLookup(tokens=3, shortest=1, width=2, adaptive=False),
}


@pytest.fixture(scope="module")
def plain(smollm2):
    return run(smollm2, None)


def run(engine, speculate):
    """Tokens and log-probabilities of all prompts, ten at a time."""
    found = []
    for start in range(0, len(PROMPTS), 10):
        roots = [engine.prompt(prompt) for prompt in PROMPTS[start : start + 10]]
        done = engine.complete(roots, GREEDY, speculate=speculate)
        found += [(completion.token_ids, completion.logprobs) for completion in done]
        for root in roots:
            root.prune()
    engine.check_integrity()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_fifty_prompts_have_the_greedy_tokens_of_plain_decoding(smollm2, plain, way):
    before = smollm2.stats().speculation.total
    found = run(smollm2, WAYS[way])
    after = smollm2.stats().speculation.total
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in plain]
    for (_, ours), (_, theirs) in zip(found, plain, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
    assert after.accepted - before.accepted > 300
    assert after.proposed - before.proposed > after.accepted - before.accepted
