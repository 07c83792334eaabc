"""Resuming and releasing on a real, tiny model: K/V made again give the same search."""

from __future__ import annotations

import pytest

from dendrite_engine import Budget, SamplingParams
from dendrite_engine.errors import SnapshotRejected
from dendrite_engine.search import MCTS, BeamSearch

PROMPT = list(range(7, 60))
WAIT = 120
SEARCHES = {
    "mcts": MCTS(
        width=3, tokens_per_node=5, parallel=3, sampling=SamplingParams(1.0, ignore_eos=True)
    ),
    "beam": BeamSearch(width=3, max_tokens=14),
}
ALL = pytest.mark.parametrize("name", SEARCHES)


def spread(branches):
    return [len(set(b.token_ids[len(PROMPT) :])) / 40 for b in branches]


def begin(engine, name, **options):
    root = engine.prompt(PROMPT)
    evaluator = spread if name == "mcts" else None
    return engine.search(
        root, SEARCHES[name], Budget(iterations=60), evaluator=evaluator, **options
    )


def ending(handle):
    result = handle.wait(WAIT)
    tree = [(n.token_ids, n.visits, round(n.value, 6)) for n in handle.tree.nodes]
    return tree, result.token_ids, result.best.token_ids, result.reason


@ALL
def test_a_search_resumed_on_another_engine_ends_as_the_uninterrupted_one(
    make_engine, tmp_path, name
):
    one, other = make_engine(), make_engine()
    handle = begin(one, name, paused=True)
    handle.step(7)
    assert handle.wait_paused(WAIT)
    handle.save(tmp_path / "s")
    handle.resume()
    whole = ending(handle)
    again = other.resume_search(tmp_path / "s", evaluator=spread if name == "mcts" else None)
    assert ending(again) == whole
    again.result.prune()
    again.root.prune()
    assert other.stats().pages_live == 0


@ALL
def test_a_pool_too_small_for_the_tree_gives_the_same_search(make_engine, name):
    whole = ending(begin(make_engine(), name))
    small = make_engine(num_pages=8)  # the prompt takes 4, the longest path 5 or 6
    handle = begin(small, name)
    assert ending(handle) == whole
    assert handle.result.released > 0
    assert handle.result.remade > 0
    handle.result.prune()
    assert small.branches == [handle.root]


def test_a_file_of_another_model_is_refused(make_engine, tmp_path):
    handle = begin(make_engine(), "beam")
    handle.wait(WAIT)
    handle.save(tmp_path / "s")
    other = make_engine("qwen3")
    with pytest.raises(SnapshotRejected, match="model"):
        other.resume_search(tmp_path / "s")
    assert other.stats().pages_live == 0
    assert len(other.trace) == 0
