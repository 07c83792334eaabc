"""Searches whose root has a grammar: every child inherits it."""

from __future__ import annotations

import re

import pytest

from dendrite_engine import SamplingParams
from dendrite_engine.grammar import Choice, Regex
from dendrite_engine.search import MCTS, BeamSearch, Budget

PATTERN = "[ab]{2}-[cd]{2}"
PARAMS = SamplingParams(temperature=1.0, max_tokens=2)


def _prefix_of(pattern: str, text: str) -> bool:
    """Whether a text of "xx-xx" can still become one that matches."""
    return re.fullmatch(pattern, text + "aa-cc"[len(text) :]) is not None and len(text) <= 5


@pytest.mark.parametrize(
    "algorithm",
    [
        MCTS(width=3, tokens_per_node=2, parallel=4, sampling=PARAMS),
        BeamSearch(width=3, max_tokens=8),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_every_node_of_a_search_obeys_the_grammar_of_its_root(make_engine, algorithm):
    engine = make_engine()
    root = engine.prompt("a search below a grammar: ").constrain(Regex(PATTERN))
    start, seen = root.num_tokens, set()
    handle = engine.search(root, algorithm, Budget(tokens=150))
    result = handle.wait()
    for branch in engine.branches:
        if branch is not root:
            ids = [t for t in branch.token_ids[start:] if t not in engine.tokenizer.special_ids]
            text = engine.tokenizer.decode(ids)
            seen.add(text)
            assert _prefix_of(PATTERN, text), text
            assert branch.grammar == root.grammar
    assert seen
    assert result.text
    assert _prefix_of(PATTERN, result.text)
    if isinstance(algorithm, BeamSearch):
        assert re.fullmatch(PATTERN, result.text), "a beam ends with the end of a turn"
    result.prune()


def test_a_search_can_expand_by_the_alternatives_of_a_grammar(make_engine):
    """What a search by fixed actions does: one child for each way to go on."""
    engine = make_engine()
    root = engine.prompt("pick: ").constrain(Choice(["left", "right", "up"]))
    children = root.fork(3)
    engine.extend(children, root.alternatives())
    engine.top_tokens(children, 1)
    assert [child.own_text for child in children] == ["left", "right", "up"]
    assert all(child.is_complete for child in children)
