"""MCTS: selection against an independent plain UCT, merging, pruning of losers, options."""

from __future__ import annotations

import math

import pytest
from search_fakes import EOS, FakeEngine, unit

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import MCTS, Budget, Runner, start_search, verifier

ENDLESS = -1e9  # logit of the end token in texts that never end


# -- with an engine -----------------------------------------------------------------------------


def run(engine, root, budget, evaluator=None, **options):
    result = start_search(engine, root, MCTS(**options), budget, evaluator=evaluator).wait(60)
    engine.check_integrity()
    return result


def test_equal_sampled_children_are_merged_into_visits():
    # two tokens, one of them nearly certain: width 6 samples mostly the same child
    engine = FakeEngine(3, logits=lambda tokens: [ENDLESS, 2.0, 0.0])
    root = engine.prompt([1, 2])
    search = MCTS(width=6, tokens_per_node=1, parallel=2)
    runner, state = Runner(engine, root, verifier(lambda text: 0.5)), search.init(root)
    for _ in range(3):
        search.tell(state, runner.run(search.ask(state, 2)))
        runner.settle(state)
    assert state.merged > 0
    texts = [child.token_ids for child in state.tree.root.children]
    assert len(set(texts)) == len(texts)
    assert sum(child.visits for child in state.tree.root.children) == 6
    assert len(engine.branches) == 1 + len(texts), "branches of merged children are pruned"
    engine.check_integrity()


def test_top_k_expansion_begins_children_with_the_likeliest_tokens_in_order():
    engine = FakeEngine(6, eos=ENDLESS)
    root = engine.prompt([1, 2])
    handle = start_search(
        engine, root, MCTS(width=3, tokens_per_node=4, expansion="top_k"), Budget(iterations=3)
    )
    handle.wait(60)
    top = engine.top_tokens([root], 3)[0]
    nodes = handle.tree.root.children
    assert [n.token_ids[0] for n in nodes] == [t.token_id for t in top]
    assert [n.logprobs[0] for n in nodes] == [t.logprob for t in top]
    assert all(len(n.token_ids) == 4 for n in nodes)


def test_top_k_expansion_with_one_token_a_node_needs_no_decoding():
    engine = FakeEngine(6)
    run(
        engine,
        engine.prompt([1, 2]),
        Budget(iterations=12),
        width=3,
        tokens_per_node=1,
        expansion="top_k",
    )
    assert not [entry for entry in engine.log if entry[0] == "submit"]


def test_a_vocabulary_smaller_than_the_width_exhausts_the_tree():
    engine = FakeEngine(3, eos=5.0)
    result = run(
        engine,
        engine.prompt([1]),
        Budget(iterations=500),
        width=8,
        tokens_per_node=1,
        max_depth=3,
        expansion="top_k",
    )
    assert result.reason == "exhausted"
    # of 3 tokens one ends: 3 + 2*3 + 4*3 nodes
    assert result.nodes == 3 + 6 + 12


def test_an_exhausted_tree_ends_the_search_and_leaves_only_the_path_to_the_best():
    engine = FakeEngine(4, eos=ENDLESS)
    root = engine.prompt([1, 2, 3])
    result = run(
        engine,
        root,
        Budget(iterations=1000),
        verifier(lambda text: text.count("w2") / 9),
        width=3,
        tokens_per_node=2,
        max_depth=3,
    )
    assert result.reason == "exhausted"
    path = [node.branch_id for node in result.node.path()]
    assert [b.id for b in engine.branches] == sorted(path)
    assert result.best.token_ids == [1, 2, 3, *result.token_ids]
    assert result.value == result.text.count("w2") / 9
    result.prune()
    assert engine.branches == [root]
    engine.check_integrity()


def test_losers_are_pruned_while_the_search_still_runs():
    engine = FakeEngine(6, eos=3.0)  # most texts end soon
    root = engine.prompt([1, 2, 3])
    search = MCTS(width=4, tokens_per_node=3, parallel=4)
    runner, state = Runner(engine, root, verifier(lambda text: len(text) / 100)), search.init(root)
    for _ in range(12):
        search.tell(state, runner.run(search.ask(state, 4)))
        runner.settle(state)
        leader = set(state.leader.path())
        for node in state.tree.nodes[1:]:
            useless = node.exhausted and node not in leader
            assert (node.branch is None) == useless, node
        alive = {n.branch_id for n in state.tree.nodes if n.branch is not None}
        assert {b.id for b in engine.branches} == alive
    assert any(node.exhausted for node in state.tree.nodes)


def test_keep_tree_leaves_every_branch_alive():
    engine = FakeEngine(6, eos=1.0)
    root = engine.prompt([1, 2, 3])
    result = run(engine, root, Budget(iterations=20), keep_tree=True, tokens_per_node=3)
    assert len(engine.branches) == 1 + result.nodes
    result.prune()
    assert engine.branches == [root]


def test_the_most_visited_path_is_grown_again_when_its_branch_was_pruned():
    engine = FakeEngine(4, eos=ENDLESS)
    root = engine.prompt([1, 2, 3])
    result = run(
        engine,
        root,
        Budget(iterations=1000),
        verifier(lambda text: unit(text)),
        width=2,
        tokens_per_node=2,
        max_depth=3,
        final="visits",
    )
    assert result.best is not None
    assert result.best.is_alive
    assert result.best.token_ids == [1, 2, 3, *result.token_ids]
    result.prune()
    assert engine.branches == [root]


def test_rollouts_are_valued_in_the_childs_place_and_pruned():
    engine = FakeEngine(6, eos=ENDLESS)
    root = engine.prompt([1, 2, 3])
    seen: list[int] = []

    def lengths(branches):
        seen.extend(b.num_tokens for b in branches)
        return [0.5] * len(branches)

    result = run(
        engine, root, Budget(iterations=4), lengths, tokens_per_node=3, rollout_tokens=5, width=4
    )
    assert seen == [3 + 3 + 5] * 4
    assert result.tokens == 4 * 8
    submits = [rows for name, rows in engine.log if name == "submit"]
    assert submits == [4, 4], "one job for the children, one for the rollouts"
    assert len(engine.branches) == 2


def test_rollouts_do_not_outlive_their_batch():
    engine = FakeEngine(6, eos=ENDLESS)
    root = engine.prompt([1, 2, 3])
    search = MCTS(tokens_per_node=3, rollout_tokens=5, width=4)
    runner, state = Runner(engine, root, verifier(lambda text: 0.5)), search.init(root)
    search.tell(state, runner.run(search.ask(state, 4)))
    assert {b.id for b in engine.branches} == {n.branch_id for n in state.tree.nodes}


def test_all_children_of_a_batch_share_their_forwards():
    engine = FakeEngine(6, eos=ENDLESS)
    root = engine.prompt([1, 2, 3])
    run(engine, root, Budget(iterations=40), parallel=8, width=8, tokens_per_node=5)
    submits = [rows for name, rows in engine.log if name == "submit"]
    assert submits == [8] * 5
    assert [rows for name, rows in engine.log if name == "forward"] == [8] * 25


def test_a_target_ends_the_search_as_soon_as_a_value_reaches_it():
    engine = FakeEngine(6, eos=ENDLESS)
    result = run(
        engine,
        engine.prompt([1, 2]),
        Budget(iterations=500),
        verifier(lambda text: "w3" in text.split()),
        target=1.0,
        tokens_per_node=2,
    )
    assert result.reason == "target"
    assert "w3" in result.text.split()


def test_texts_that_end_are_terminal_and_say_why():
    engine = FakeEngine(6, eos=2.5)
    root = engine.prompt([1, 2, 3])
    handle = start_search(
        engine, root, MCTS(stop=("w4",), tokens_per_node=4, max_depth=2), Budget(iterations=40)
    )
    handle.wait(60)
    nodes = handle.tree.nodes[1:]
    reasons = {n.finish_reason for n in nodes}
    assert {"eos", "stop"} <= reasons
    for node in nodes:
        if node.finish_reason == "eos":
            assert node.token_ids[-1] == EOS
        if node.finish_reason == "stop":
            assert node.token_ids[-1] == 4
        if node.status == "terminal":
            assert not node.children
    assert all(n.status == "terminal" for n in nodes if n.depth == 2)


def test_a_seeded_search_repeats_on_the_same_root_and_an_unseeded_one_goes_on_drawing():
    engine = FakeEngine(9, eos=0.0)
    root = engine.prompt([1, 2, 3])

    def texts(seed):
        handle = start_search(
            engine,
            root,
            MCTS(seed=seed, tokens_per_node=4, rollout_tokens=3),
            Budget(iterations=30),
        )
        handle.wait(60).prune()
        return [(n.token_ids, n.visits, n.value) for n in handle.tree.nodes]

    first = texts(11)
    texts(None)
    assert texts(11) == first
    assert texts(12) != first
    assert texts(None) != texts(None)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("exploration", -0.1),
        ("exploration", math.nan),
        ("exploration", math.inf),
        ("exploration", "1"),
        ("exploration", True),
        ("width", 0),
        ("width", 2.0),
        ("width", True),
        ("tokens_per_node", 0),
        ("max_depth", 0),
        ("rollout_tokens", -1),
        ("parallel", 0),
        ("virtual_loss", -1),
        ("expansion", "beam"),
        ("normalise", True),
        ("final", ""),
        ("target", math.nan),
        ("stop", ""),
        ("stop", ("",)),
        ("seed", -1),
        ("seed", 1.5),
        ("keep_tree", 1),
        ("sampling", SamplingParams(temperature=0)),
    ],
)
def test_a_bad_option_is_refused_by_name(option, value):
    with pytest.raises(InvalidArgument, match=option):
        MCTS(**{option: value})


def test_a_single_stop_string_needs_no_tuple():
    assert MCTS(stop="ab").stop == MCTS(stop=("ab",)).stop == ("ab",)
