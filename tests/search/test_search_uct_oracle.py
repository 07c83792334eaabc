"""UCT selection against an independent plain UCT, and how parallel simulations spread."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from search_fakes import FakeEngine, unit

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import MCTS, Outcome

ENDLESS = -1e9  # logit of the end token in texts that never end


# -- an independent UCT -------------------------------------------------------------------------


@dataclass
class Plain:
    """A node of textbook UCT; children are named by the order in which they were made."""

    name: tuple[int, ...] = ()
    total: float = 0.0
    count: int = 0
    children: list[Plain] = field(default_factory=list)


def plain_uct(simulations: int, width: int, c: float, reward) -> Plain:
    """Kocsis & Szepesvari 2006, written recursively and without any of the engine's code."""
    root = Plain()

    def simulate(node: Plain) -> float:
        if len(node.children) < width:
            child = Plain((*node.name, len(node.children)))
            node.children.append(child)
            value = reward(child.name)
            child.total += value
            child.count += 1
        else:
            scores = [
                k.total / k.count + c * math.sqrt(math.log(node.count) / k.count)
                for k in node.children
            ]
            value = simulate(node.children[scores.index(max(scores))])
        node.total += value
        node.count += 1
        return value

    for _ in range(simulations):
        simulate(root)
    return root


def bandit(name: tuple[int, ...]) -> float:
    """Arm 2 of the root pays 0.8 on average, the others 0.5; noise by path."""
    mean = 0.8 if name[0] == 2 else 0.5
    return min(1.0, max(0.0, mean + 0.4 * (unit("noise", name) - 0.5)))


def run_by_hand(search: MCTS, simulations: int, reward):
    """Drive ask/tell without an engine: children get distinct tokens, values come from `reward`."""
    state = search.init(FakeEngine(eos=ENDLESS).prompt([1, 2, 3]))
    for _ in range(simulations):
        trials = search.ask(state, 1)
        outcomes = []
        for trial in trials:
            name = (*trial.node.ordinals(), trial.ordinal)
            branch = trial.node.branch.fork()[0]
            tokens = (name[-1] + 1,)
            value = reward(name)
            outcomes.append(Outcome(trial.id, branch, tokens, (-1.0,), "length", value))
        search.tell(state, outcomes)
    return state


def named_visits(node) -> dict[tuple[int, ...], int]:
    return {n.ordinals(): n.visits for n in node.subtree()}


@pytest.mark.parametrize("width", [1, 3, 5])
@pytest.mark.parametrize("exploration", [0.0, 0.7, 1.414])
def test_visit_counts_equal_an_independent_uct(width, exploration):
    def reward(name):
        return unit(1, name) if width == 1 else bandit(name)

    search = MCTS(exploration=exploration, width=width, parallel=1)
    state = run_by_hand(search, 300, reward)
    oracle = plain_uct(300, width, exploration, reward)
    expected = {}
    stack = [oracle]
    while stack:
        node = stack.pop()
        expected[node.name] = node.count
        stack += node.children
    assert named_visits(state.tree.root) == expected
    assert state.tree.root.value_sum == pytest.approx(oracle.total)


def test_uct_converges_to_the_best_arm_of_a_bandit():
    state = run_by_hand(MCTS(exploration=0.7, width=4, parallel=1), 400, bandit)
    visits = [child.visits for child in state.tree.root.children]
    assert visits.index(max(visits)) == 2
    assert visits[2] > 0.6 * sum(visits)
    assert MCTS(width=4, final="visits").best(state).ordinals()[0] == 2


def test_minmax_selects_like_plain_uct_on_scaled_values():
    raw = run_by_hand(MCTS(width=3, parallel=1, exploration=0.5), 200, bandit)
    low = min(bandit(n.ordinals()) for n in raw.tree.nodes[1:])
    search = MCTS(width=3, parallel=1, exploration=0.5, normalise="minmax")
    state = run_by_hand(search, 200, lambda name: 100.0 * bandit(name) - 7.0)
    best = max(c.visits for c in state.tree.root.children)
    assert state.tree.root.children[2].visits == best
    assert state.low == pytest.approx(100.0 * low - 7.0, abs=5.0)
    child = state.tree.root.children[0]
    scaled = (child.value - state.low) / (state.high - state.low)
    bonus = 0.5 * math.sqrt(math.log(state.tree.root.visits) / child.visits)
    assert search.rank(state, child) == pytest.approx(scaled + bonus)


def test_equal_scores_go_to_the_lowest_node_id():
    search = MCTS(width=3, parallel=1, exploration=1.0)
    state = run_by_hand(search, 3, lambda name: 0.5)
    (trial,) = search.ask(state, 1)
    assert trial.node is state.tree.root.children[0]


def test_simulations_under_way_send_the_next_ones_elsewhere():
    search = MCTS(width=3, parallel=3, exploration=1.0)
    state = run_by_hand(search, 3, lambda name: 0.5)
    nodes = [trial.node for trial in search.ask(state, 3)]
    assert nodes == state.tree.root.children
    lossless = MCTS(width=3, parallel=3, exploration=1.0, virtual_loss=0)
    state = run_by_hand(lossless, 3, lambda name: 0.5)
    assert {trial.node.id for trial in lossless.ask(state, 3)} == {1}


def test_a_batch_is_cut_where_every_path_is_in_flight():
    search = MCTS(width=2, parallel=8)
    state = search.init(FakeEngine().prompt([1]))
    assert len(search.ask(state, 8)) == 2
    assert search.ask(state, 8) == []
    assert not search.done(state), "trials are pending, so nothing is exhausted"


def test_a_seed_gives_every_attempt_its_own_key_by_path():
    search = MCTS(seed=7, parallel=1)
    state = run_by_hand(search, 30, bandit)
    keys = {search.node_key(n, i) for n in state.tree.nodes for i in range(3)}
    assert len(keys) == 3 * len(state.tree.nodes)
    again = run_by_hand(search, 30, bandit)
    assert [search.node_key(n, 0) for n in again.tree.nodes] == [
        search.node_key(n, 0) for n in state.tree.nodes
    ]


def test_a_value_outside_0_to_1_is_refused_with_a_way_out():
    search = MCTS(parallel=1)
    state = search.init(FakeEngine().prompt([1]))
    (trial,) = search.ask(state, 1)
    branch = state.tree.root.branch.fork()[0]
    with pytest.raises(InvalidArgument, match=r"1\.5.*minmax"):
        search.tell(state, [Outcome(trial.id, branch, (1,), (-1.0,), "length", 1.5)])
    assert len(state.tree) == 1
    assert trial.id in state.pending, "nothing was changed"
