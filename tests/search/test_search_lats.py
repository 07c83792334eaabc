"""LATS: episodes, reflections, and what later attempts have read."""

from __future__ import annotations

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import LATS, Budget, Runner, start_search, verifier

ENDLESS = -1e9
WORDS = {"reflect": "w8 w8", "heading": "w7", "resume": "w6 w5"}


def never(branches):
    return [0.5] * len(branches)


def make(**options):
    defaults = {
        "width": 3, "tokens_per_node": 3, "parallel": 3, "simulations": 6, "episodes": 3,
        "reflection_tokens": 4, **WORDS,
    }  # fmt: skip
    return LATS(**{**defaults, **options})


def drive(engine, root, search, evaluator=never):
    """Run to the end; returns the state, and the trials of each batch with their outcomes."""
    runner, state = Runner(engine, root, evaluator), search.init(root)
    batches = []
    while trials := search.ask(state, search.plan(state).trials):
        outcomes = runner.run(trials)
        batches.append((trials, outcomes))
        search.tell(state, outcomes)
        runner.settle(state)
        engine.check_integrity()
    return runner, state, batches


def test_an_episode_that_fails_is_followed_by_a_reflection_and_one_that_has_read_it():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    _, state, batches = drive(engine, root, make())
    reflections = [(t, o) for ts, os in batches for t, o in zip(ts, os, strict=True) if t.forced]
    assert [trial.forced for trial, _ in reflections] == [(8, 8)] * 2
    written = [outcome.token_ids[2:] for _, outcome in reflections]
    assert [len(tokens) for tokens in written] == [4, 4]
    heads = [n for n in state.tree.root.parent.children if n.token_ids[0] == 7]
    assert [n.token_ids for n in heads] == [
        (7, *written[0], 6, 5),
        (7, *written[0], *written[1], 6, 5),
    ]
    simulations = sum(len(trials) for trials, _ in batches) - 2
    assert simulations == 3 * 6
    assert state.reason == "exhausted"


def test_an_attempt_sees_only_the_last_reflections():
    engine = FakeEngine(9, eos=ENDLESS)
    _, state, _ = drive(engine, engine.prompt([1, 2]), make(episodes=6, memory=2))
    head = state.tree.root
    expected = (7, *state.reflections[-2], *state.reflections[-1], 6, 5)
    assert head.token_ids == expected
    assert len(state.reflections) == 5


def test_the_reflection_is_about_the_best_attempt_of_the_episode():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    value = verifier(lambda text: text.count("w3") / 40)
    _, state, batches = drive(engine, root, make(episodes=2), value)
    (trial,) = next(trials for trials, _ in batches if trials[0].forced)
    first = [
        n
        for n in state.tree.nodes[1:]
        if 7 not in n.path()[1].token_ids[:1] and n.id < trial.id + 1
    ]
    assert trial.node.score == max(n.score for n in first)


def test_a_solved_attempt_ends_the_search_without_reflection():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    result = start_search(
        engine, root, make(), Budget(iterations=200), evaluator=lambda bs: [1.0] * len(bs)
    ).wait(60)
    assert result.reason == "target"
    assert result.iterations == 3
    result.prune()
    assert engine.branches == [root]


def test_branches_of_a_failed_episode_are_pruned_but_for_the_best_path():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = make(episodes=2)
    runner, state = Runner(engine, root, verifier(lambda t: t.count("w3") / 40)), search.init(root)
    while state.episode == 1:
        search.tell(state, runner.run(search.ask(state, search.plan(state).trials)))
        runner.settle(state)
    kept = {root.id, state.tree.root.branch_id} | {n.branch_id for n in state.leader.path()}
    assert {b.id for b in engine.branches} == kept


def test_an_episode_whose_tree_is_exhausted_reflects_early():
    engine = FakeEngine(9, eos=ENDLESS)
    search = make(max_depth=1, width=2, simulations=50, episodes=2)
    _, state, batches = drive(engine, engine.prompt([1, 2]), search)
    sizes = [(len(trials), bool(trials[0].forced)) for trials, _ in batches]
    assert sizes[:2] == [(2, False), (1, True)]
    assert len(state.reflections) == 1


def test_a_full_pool_ends_the_search_and_leaks_nothing():
    for pages in range(4, 16):
        engine = FakeEngine(9, eos=ENDLESS, num_pages=pages)
        root = engine.prompt([1, 2])
        result = start_search(engine, root, make(), Budget(iterations=200), evaluator=never).wait(
            60
        )
        result.prune()
        assert engine.branches == [root]
        engine.check_integrity()


def test_episodes_after_an_advance_begin_at_the_new_root():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = make(episodes=2)
    runner, state = Runner(engine, root, never), search.init(root)
    search.tell(state, runner.run(search.ask(state, 3)))
    child = state.tree.root.children[0]
    search.advance(state, child)
    while trials := search.ask(state, search.plan(state).trials):
        search.tell(state, runner.run(trials))
        runner.settle(state)
    assert state.episode == 2
    assert state.tree.root.parent is child
    engine.check_integrity()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("simulations", 0),
        ("episodes", 0),
        ("reflection_tokens", 0),
        ("memory", 0),
        ("reflect", ""),
        ("heading", 3),
        ("target", None),
    ],
)
def test_a_bad_option_is_refused_by_name(option, value):
    with pytest.raises(InvalidArgument, match=option):
        LATS(**{option: value})
