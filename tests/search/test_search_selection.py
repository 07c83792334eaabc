"""Selection rules of MCTS against plain implementations that share no code with the engine."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import pytest
from search_fakes import FakeEngine, unit

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import MCTS, PUCT, EpsilonGreedy, Outcome, UCB1Tuned
from dendrite_engine.search.selection import RULES, Arm, selection_rule
from dendrite_engine.search.tree import Candidate

ENDLESS = -1e9


@dataclass
class Plain:
    """A node of a textbook search; children are named by the order of attempts."""

    name: tuple[int, ...] = ()
    values: list[float] = field(default_factory=list)
    children: list[Plain] = field(default_factory=list)

    @property
    def mean(self):
        return sum(self.values) / len(self.values) if self.values else 0.0


def plain_search(simulations, width, choose, reward, max_depth=99):
    """`choose(node)` gives a child's index, or None to add the next child."""
    root = Plain()
    for _ in range(simulations):
        node, path = root, [root]
        while True:
            index = choose(node)
            if index is None:
                node = Plain((*node.name, len(node.children)))
                path[-1].children.append(node)
                path.append(node)
                break
            node = node.children[index]
            path.append(node)
        value = reward(node.name)
        for step in path:
            step.values.append(value)
    return root


def run_by_hand(search: MCTS, simulations: int, reward, priors=None):
    """Drive ask/tell without an engine; children get distinct tokens."""
    state = search.init(FakeEngine(eos=ENDLESS).prompt([1, 2, 3]))
    for _ in range(simulations):
        for trial in search.ask(state, 1):
            name = (*trial.node.ordinals(), trial.ordinal)
            if priors is not None:
                trial.node.candidates = candidates(trial.node.ordinals(), priors)
            branch = trial.node.branch.fork()[0].extend([name[-1] + 1])
            search.tell(
                state,
                [Outcome(trial.id, branch, (name[-1] + 1,), (-1.0,), "length", reward(name))],
            )
    return state


def candidates(name, priors):
    return tuple(Candidate((index + 1,), (math.log(p),)) for index, p in enumerate(priors(name)))


def counts(root):
    found, stack = {}, [root]
    while stack:
        node = stack.pop()
        found[node.name] = len(node.values)
        stack += node.children
    return found


def visits_of(state):
    return {n.ordinals(): n.visits for n in state.tree.root.subtree()}


def noisy_bandit(name):
    mean = 0.8 if name[0] == 2 else 0.5
    return min(1.0, max(0.0, mean + 0.4 * (unit("noise", name) - 0.5)))


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("width", [2, 4])
def test_ucb1_tuned_visits_equal_a_plain_implementation(width, weight):
    def choose(node):
        if len(node.children) < width:
            return None
        total = len(node.values)
        scores = []
        for child in node.children:
            n = len(child.values)
            square = sum(v * v for v in child.values) / n
            spread = square - child.mean**2 + math.sqrt(2 * math.log(total) / n)
            scores.append(child.mean + weight * math.sqrt(math.log(total) / n * min(0.25, spread)))
        return scores.index(max(scores))

    search = MCTS(width=width, parallel=1, exploration=weight, selection="ucb1_tuned")
    state = run_by_hand(search, 250, noisy_bandit)
    assert visits_of(state) == counts(plain_search(250, width, choose, noisy_bandit))


def falling_priors(name):
    raw = sorted((0.05 + unit("prior", name, i) for i in range(5)), reverse=True)
    return [p / sum(raw) for p in raw]


@pytest.mark.parametrize("first_play", [None, 0.0])
@pytest.mark.parametrize("weight", [0.5, 1.25])
def test_puct_visits_equal_a_plain_implementation(weight, first_play):
    base = 50.0

    def choose(node):
        total = len(node.values)
        if not node.children:
            return None
        growth = weight + math.log((1 + total + base) / base)
        priors = falling_priors(node.name)
        scores = [
            child.mean + growth * prior * math.sqrt(total) / (1 + len(child.values))
            for child, prior in zip(node.children, priors, strict=False)
        ]
        tried = len(node.children)
        if tried < 5:
            untried = node.mean if first_play is None else first_play
            if untried + growth * priors[tried] * math.sqrt(total) > max(scores):
                return None
        return scores.index(max(scores))

    search = MCTS(
        width=5, parallel=1, exploration=weight, max_depth=None,
        selection=PUCT(base=base, first_play=first_play),
        expansion="actions", actions=["w1", "w2", "w3", "w4", "w5"], priors="model",
    )  # fmt: skip
    state = run_by_hand(search, 300, noisy_bandit, falling_priors)
    assert visits_of(state) == counts(plain_search(300, 5, choose, noisy_bandit))


def test_puct_leaves_unlikely_children_untried_and_uct_does_not():
    def steep(name):
        return [0.9, 0.05, 0.03, 0.01, 0.01]

    actions = {"expansion": "actions", "actions": ["w1", "w2", "w3", "w4", "w5"]}
    puct = MCTS(width=5, parallel=1, selection=PUCT(first_play=0.0), **actions)
    uct = MCTS(width=5, parallel=1, **actions)
    tried = [
        len(run_by_hand(search, 5, lambda name: 0.5, steep).tree.root.children)
        for search in (puct, uct)
    ]
    assert tried[1] == 5
    assert tried[0] < 5


def test_root_noise_is_a_dirichlet_draw_mixed_in_at_the_root_only_and_repeats_for_a_seed():
    rule = PUCT(noise=0.25, alpha=0.3)
    priors = [0.5, 0.3, 0.2]
    mixed = rule.noisy(priors, lambda: random.Random(4))
    eta = [(m - 0.75 * p) / 0.25 for m, p in zip(mixed, priors, strict=True)]
    assert sum(mixed) == pytest.approx(1.0)
    assert sum(eta) == pytest.approx(1.0)
    assert min(eta) >= 0
    # the mean of a symmetric Dirichlet is 1 / n
    draws = [rule.noisy(priors, lambda s=seed: random.Random(s)) for seed in range(4000)]
    for index, prior in enumerate(priors):
        mean = sum(draw[index] for draw in draws) / len(draws)
        assert mean == pytest.approx(0.75 * prior + 0.25 / 3, abs=0.01)

    def run(seed):
        search = MCTS(
            width=5, parallel=1, seed=seed, selection=PUCT(noise=0.5),
            expansion="actions", actions=["w1", "w2", "w3", "w4", "w5"],
        )  # fmt: skip
        return visits_of(run_by_hand(search, 60, noisy_bandit, falling_priors))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_noise_does_not_reach_below_the_root():
    search = MCTS(
        width=3, parallel=1, selection=PUCT(noise=1.0),
        expansion="actions", actions=["w1", "w2", "w3"],
    )  # fmt: skip
    state = run_by_hand(search, 30, noisy_bandit, lambda name: [0.5, 0.3, 0.2])
    inner = next(n for n in state.tree.nodes[1:] if n.children)
    assert search._priors(state, inner) == pytest.approx([0.5, 0.3, 0.2])
    assert search._priors(state, state.tree.root) != pytest.approx([0.5, 0.3, 0.2])


def test_epsilon_greedy_takes_the_best_mean_and_strays_as_often_as_it_says():
    greedy = MCTS(width=4, parallel=1, selection=EpsilonGreedy(epsilon=0.0), max_depth=None)
    state = run_by_hand(greedy, 100, lambda name: 0.9 if name[0] == 2 else 0.1)
    assert [c.visits for c in state.tree.root.children] == [1, 1, 97, 1]
    rule = EpsilonGreedy(epsilon=0.3)
    strays = [rule.stray(5, lambda s=seed: random.Random(s)) for seed in range(5000)]
    taken = [index for index in strays if index is not None]
    assert len(taken) / 5000 == pytest.approx(0.3, abs=0.02)
    for index in range(5):
        assert taken.count(index) / len(taken) == pytest.approx(0.2, abs=0.03)


def test_an_epsilon_greedy_search_repeats_for_a_seed_and_explores():
    def run(seed):
        search = MCTS(width=4, parallel=1, seed=seed, selection=EpsilonGreedy(epsilon=0.4))
        state = run_by_hand(search, 120, lambda name: 0.9 if name[0] == 2 else 0.1)
        return [c.visits for c in state.tree.root.children]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert min(run(3)) > 1
    assert run(3)[2] == max(run(3))


@pytest.mark.parametrize("name", RULES.names())
def test_every_rule_prefers_value_and_gives_untried_children_a_chance(name):
    rule = selection_rule(name)
    good, bad = (Arm(10, mean, 0.1, 0.25) for mean in (0.9, 0.2))
    assert rule.score(good, 40, 1.0) > rule.score(bad, 40, 1.0)
    if rule.untried_first:
        assert rule.score(Arm(0, 0.0), 40, 1.0) == math.inf
    else:
        assert rule.score(Arm(0, 0.9, 0.0, 0.25), 40, 1.0) > rule.score(good, 40, 1.0)


def test_a_steady_child_is_explored_less_by_ucb1_tuned():
    rule = UCB1Tuned()
    steady, wild = (Arm(400, 0.5, variance, 1.0) for variance in (0.0, 0.25))
    assert rule.score(steady, 1000, 1.0) < rule.score(wild, 1000, 1.0)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MCTS(selection="best"), "selection"),
        (lambda: MCTS(selection=None), "selection"),
        (lambda: PUCT(noise=1.5), "noise"),
        (lambda: PUCT(alpha=0), "alpha"),
        (lambda: PUCT(base=math.nan), "base"),
        (lambda: EpsilonGreedy(epsilon=-0.1), "epsilon"),
        (lambda: EpsilonGreedy(epsilon=2), "epsilon"),
        (lambda: MCTS(widening=0), "widening"),
        (lambda: MCTS(widening_power=1.5), "widening_power"),
        (lambda: MCTS(discount=0), "discount"),
        (lambda: MCTS(discount=1.01), "discount"),
    ],
)
def test_a_bad_rule_or_option_is_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=named):
        make()
