"""Transpositions counted by hand, and tree reuse."""

from __future__ import annotations

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import SearchError
from dendrite_engine.search import MCTS, Budget, Outcome, Runner, start_search

ENDLESS = -1e9


def half(branches):
    return [0.5] * len(branches)


def drive(engine, root, search, batches, evaluator=half):
    runner, state = Runner(engine, root, evaluator), search.init(root)
    for _ in range(batches):
        if search.done(state):
            break
        search.tell(state, runner.run(search.ask(state, search.plan(state).trials)))
        runner.settle(state)
        engine.check_integrity()
    return runner, state


# -- transpositions -----------------------------------------------------------------------------


def tell(search, state, *children):
    """Tell one simulation each: (index of the node, tokens, value)."""
    for index, tokens, value in children:
        node = state.tree.nodes[index]
        node.attempts += 1
        node.in_flight += 1
        for step in node.path():
            step.virtual += 1
        trial = search.open_trial(state, "expand", node, ordinal=node.attempts - 1)
        branch = node.branch.fork()[0].extend(tokens)
        search.tell(
            state,
            [Outcome(trial.id, branch, tuple(tokens), (-1.0,) * len(tokens), "length", value)],
        )


def counted(state):
    return [(node.visits, round(node.value_sum, 9)) for node in state.tree.nodes]


CASE = (  # parent's id, tokens, value; ids count from 1 where a node is new
    (0, [1], 0.1),  # node 1: 1
    (1, [2], 0.2),  # node 2: 1 2
    (0, [1, 2], 0.4),  # 1 2 again: merged with node 2
    (0, [1, 2, 3], 0.8),  # node 3: another path
    (2, [3], 0.6),  # 1 2 3 again, by way of 1 and 2: merged with node 3
    (1, [2, 3], 0.5),  # and by way of 1 alone
)


def test_equal_token_paths_are_one_node_however_they_are_cut():
    search = MCTS(width=9)
    state = search.init(FakeEngine(eos=ENDLESS).prompt([7]))
    tell(search, state, *CASE)
    # by hand: every simulation counts once at the root, at the merged node and on both ways to it
    assert counted(state) == [
        (6, 2.6),  # all
        (5, 1.8),  # node 1: 0.1 + 0.2 + 0.4 (on the way to node 2) + 0.6 + 0.5
        (3, 1.2),  # node 2: 0.2 + 0.4 + 0.6
        (3, 1.9),  # node 3: 0.8 + 0.6 + 0.5
    ]
    assert state.merged == 3
    assert len(state.tree.orphans) == 3


def test_without_transpositions_only_equal_siblings_are_merged():
    search = MCTS(width=9, transpositions=False)
    state = search.init(FakeEngine(eos=ENDLESS).prompt([7]))
    tell(search, state, *CASE, (0, [1, 2], 0.4))
    assert state.merged == 1
    assert len(state.tree) == 7


def test_a_merged_way_is_discounted_by_its_own_length():
    search = MCTS(width=9, discount=0.5)
    state = search.init(FakeEngine(eos=ENDLESS).prompt([7]))
    tell(search, state, (0, [1, 2, 3], 0.0), (0, [1], 0.0), (2, [2], 0.0), (3, [3], 1.0))
    #       node 1: 1 2 3        node 2: 1     node 3: 1 2       merged with node 1
    assert counted(state) == [(4, 0.5), (2, 1.0), (3, 0.25), (2, 0.5)]


def test_actions_that_meet_again_are_searched_once():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([7])
    search = MCTS(
        expansion="actions", actions=["w1", "w1 w1"], priors="uniform", width=2, max_depth=4
    )
    _, state = drive(engine, root, search, 200)
    paths = [tuple(state.tree.tokens(n)) for n in state.tree.nodes]
    assert len(paths) == len(set(paths))
    assert state.merged > 0
    owned = {n.branch_id for n in state.tree.nodes if n.branch is not None}
    assert {b.id for b in engine.branches} == owned


# -- tree reuse ---------------------------------------------------------------------------------


def test_advancing_keeps_the_subtree_and_prunes_the_rest():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = MCTS(width=3, tokens_per_node=2, parallel=3)
    runner, state = drive(engine, root, search, 12)
    child = max(state.tree.root.children, key=lambda c: c.visits)
    below = list(child.subtree())
    before = [(n.id, n.visits, n.value_sum) for n in below]
    search.advance(state, child)
    runner.settle(state)
    assert [(n.id, n.visits, n.value_sum) for n in below] == before
    assert {b.id for b in engine.branches} == {root.id} | {n.branch_id for n in below}
    for _ in range(10):
        trials = search.ask(state, 3)
        assert all(child in trial.node.path() for trial in trials)
        search.tell(state, runner.run(trials))
        runner.settle(state)
    assert child.visits == before[0][1] + 30
    assert child in search.best(state).path()
    engine.check_integrity()


def test_a_handle_advances_a_search_that_is_paused_and_goes_on_from_there():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    handle = start_search(
        engine, root, MCTS(tokens_per_node=2), Budget(iterations=80), evaluator=half, paused=True
    )
    handle.step(6)
    assert handle.wait_paused(60)
    first, second = handle.tree.root.children[:2]
    assert handle.advance(second.branch)
    assert handle.wait_paused(60)
    assert first.status == "pruned"
    with pytest.raises(SearchError, match="must be alive and below"):
        handle.advance(first.branch_id)
    handle.resume()
    result = handle.wait(60)
    assert result.token_ids[:2] == second.token_ids
    result.prune()
    assert engine.branches == [root]


def test_a_beam_search_says_that_it_cannot_advance():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    handle = start_search(engine, root, "beam", paused=True)
    with pytest.raises(SearchError, match="beam can't advance"):
        handle.advance(root)
    handle.stop()
