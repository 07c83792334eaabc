"""AB-MCTS: its posteriors against integration and moments, its choices against a plain twin."""

from __future__ import annotations

import math
import random

import pytest
from search_fakes import EOS, FakeEngine, unit

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import (
    ABMCTS,
    BetaPosterior,
    Budget,
    GaussianPosterior,
    Outcome,
    start_search,
    verifier,
)
from dendrite_engine.search.draws import generator

ENDLESS = -1e9
VALUES = ([], [0.4], [0.2, 0.9, 0.7], [0.5] * 6, [1.0, 0.0, 1.0, 1.0])


# -- posteriors ---------------------------------------------------------------------------------


def integrated(prior: GaussianPosterior, values):
    """Posterior mean of mu and mean of sigma^2 by summing over a grid, from the density alone."""
    total = mean = variance = 0.0
    for i in range(1, 800):
        var = math.exp(-9.0 + 14.0 * i / 800)  # sigma^2 on a log grid; d var = var d log var
        density = var ** -(prior.nu / 2 + 1) * math.exp(-prior.nu * prior.scale / (2 * var)) * var
        for j in range(121):
            mu = -3.0 + 6.0 * j / 120
            log = -0.5 * math.log(var) - prior.kappa * (mu - prior.mean) ** 2 / (2 * var)
            log += sum(-0.5 * math.log(var) - (r - mu) ** 2 / (2 * var) for r in values)
            weight = density * math.exp(log)
            total += weight
            mean += weight * mu
            variance += weight * var
    return mean / total, variance / total


@pytest.mark.parametrize("values", VALUES[1:], ids=str)
def test_the_gaussian_update_equals_numeric_integration_of_prior_times_likelihood(values):
    prior = GaussianPosterior(mean=0.3, kappa=2.0, nu=6.0, scale=0.1)
    mean, kappa, nu, spread = prior.updated(values)
    expected_mean, expected_variance = integrated(prior, values)
    assert mean == pytest.approx(expected_mean, abs=2e-3)
    assert spread / (nu - 2) == pytest.approx(expected_variance, rel=2e-2)
    assert (kappa, nu) == (2.0 + len(values), 6.0 + len(values))


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_gaussian_draws_have_the_moments_of_the_predictive_student_t(values):
    prior = GaussianPosterior(mean=0.3, kappa=2.0, nu=8.0, scale=0.1)
    mean, kappa, nu, spread = prior.updated(values)
    draws = [prior.draw(values, random.Random(seed)) for seed in range(8000)]
    average = sum(draws) / len(draws)
    variance = sum((x - average) ** 2 for x in draws) / len(draws)
    expected = spread / nu * (1 + 1 / kappa) * nu / (nu - 2)
    assert average == pytest.approx(mean, abs=4 * math.sqrt(expected / len(draws)))
    assert variance == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("values", VALUES, ids=str)
def test_beta_draws_have_the_moments_of_the_counted_distribution(values):
    prior = BetaPosterior(alpha=1.0, beta=2.0)
    a, b = 1.0 + sum(values), 2.0 + len(values) - sum(values)
    draws = [prior.draw(values, random.Random(seed)) for seed in range(8000)]
    average = sum(draws) / len(draws)
    variance = sum((x - average) ** 2 for x in draws) / len(draws)
    expected = a * b / ((a + b) ** 2 * (a + b + 1))
    assert average == pytest.approx(a / (a + b), abs=4 * math.sqrt(expected / len(draws)))
    assert variance == pytest.approx(expected, rel=0.1)


# -- choices ------------------------------------------------------------------------------------


def run_by_hand(search, count, reward):
    state = search.init(FakeEngine(eos=ENDLESS).prompt([7]))
    for _ in range(count):
        (trial,) = search.ask(state, 1)
        name = (*trial.node.ordinals(), trial.ordinal)
        branch = trial.node.branch.fork()[0].extend([trial.ordinal + 1])
        outcome = Outcome(trial.id, branch, (trial.ordinal + 1,), (-1.0,), "length", reward(name))
        search.tell(state, [outcome])
    return state


def plain_abmcts(count, posterior, seed, reward):
    """The algorithm of the paper over names alone; the draws come from the same generators."""
    scores: dict[tuple[int, ...], float] = {}
    for number in range(count):
        node: tuple[int, ...] = ()
        while True:
            source = generator(seed, "thompson", node, number)
            children = sorted(
                (n for n in scores if len(n) == len(node) + 1 and n[: len(node)] == node),
                key=list(scores).index,
            )
            inside = [n for n in scores if len(n) > len(node) + 1 and n[: len(node)] == node]
            wider = posterior.draw([scores[c] for c in children], source)
            deeper = posterior.draw([scores[n] for n in inside], source)
            if not children or wider >= deeper:
                break
            drawn = []
            for child in children:
                own = [scores[n] for n in scores if n[: len(child)] == child]
                drawn.append(posterior.draw(own, source))
            node = children[drawn.index(max(drawn))]
        made = sum(len(n) == len(node) + 1 and n[: len(node)] == node for n in scores)
        child = (*node, made)
        scores[child] = reward(child)
    return scores


@pytest.mark.parametrize("posterior", [GaussianPosterior(), BetaPosterior()], ids=["gauss", "beta"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_tree_equals_that_of_a_plain_implementation(posterior, seed):
    def reward(name):
        return unit("reward", name)

    search = ABMCTS(posterior=posterior, seed=seed, parallel=1)
    state = run_by_hand(search, 80, reward)
    expected = plain_abmcts(80, posterior, seed, reward)
    assert [n.ordinals() for n in state.tree.nodes[1:]] == list(expected)
    assert search.best(state).ordinals() == max(expected, key=expected.get)


def shape(posterior, reward, seeds=8, count=60):
    """Mean share of nodes right below the root, and mean depth, over several seeds."""
    wide = deep = 0.0
    for seed in range(seeds):
        state = run_by_hand(ABMCTS(posterior=posterior, seed=seed, parallel=1), count, reward)
        nodes = state.tree.nodes[1:]
        wide += sum(n.depth == 1 for n in nodes) / len(nodes) / seeds
        deep += sum(n.depth for n in nodes) / len(nodes) / seeds
    return wide, deep


@pytest.mark.parametrize("posterior", [GaussianPosterior(), BetaPosterior()], ids=["gauss", "beta"])
def test_it_goes_wider_where_refining_spoils_and_deeper_where_refining_helps(posterior):
    def width_wins(name):  # a first answer is good by luck; every refinement spoils it
        return max(0.0, 0.4 + 0.6 * unit(name[0]) - 0.4 * (len(name) - 1))

    def depth_wins(name):  # first answers are poor; every refinement adds a little
        return min(1.0, 0.1 + 0.1 * unit(name) + 0.15 * (len(name) - 1))

    wide_share, shallow = shape(posterior, width_wins)
    narrow_share, deep = shape(posterior, depth_wins)
    assert wide_share > 0.6
    assert narrow_share < 0.3
    assert deep > 2 * shallow


def test_the_best_answer_of_a_world_where_refining_helps_is_a_refinement():
    def depth_wins(name):
        return min(1.0, 0.1 + 0.1 * unit(name) + 0.15 * (len(name) - 1))

    search = ABMCTS(seed=3, parallel=1)
    state = run_by_hand(search, 60, depth_wins)
    assert search.best(state).depth >= 4


# -- with an engine -----------------------------------------------------------------------------


def test_a_refinement_follows_its_answer_and_the_text_between_them():
    engine = FakeEngine(9, eos=1.5)
    root = engine.prompt([1, 2])
    search = ABMCTS(refine="w8 w8", tokens_per_node=4, seed=2, max_depth=3)
    handle = start_search(
        engine, root, search, Budget(iterations=40), evaluator=verifier(lambda t: len(t) / 99)
    )
    handle.wait(60)
    answers = [n for n in handle.tree.nodes if n.depth == 1]
    refined = [n for n in handle.tree.nodes if n.depth > 1]
    assert answers
    assert refined
    assert all(n.token_ids[:2] == (8, 8) for n in refined)
    assert all(n.token_ids[:2] != (8, 8) for n in answers)
    assert any(n.parent.token_ids[-1] == EOS for n in refined), "an ended answer can be refined"
    assert all(math.isnan(n.logprobs[0]) and not math.isnan(n.logprobs[2]) for n in refined)


def test_without_refinement_a_text_that_has_ended_has_no_children():
    engine = FakeEngine(9, eos=2.0)
    handle = start_search(
        engine, engine.prompt([1]), ABMCTS(tokens_per_node=3, seed=1), Budget(iterations=60)
    )
    handle.wait(60)
    ended = [n for n in handle.tree.nodes[1:] if n.token_ids[-1] == EOS]
    assert ended
    assert all(n.status == "terminal" and not n.children for n in ended)


def test_values_outside_the_posteriors_range_are_refused_and_change_nothing():
    search = ABMCTS(posterior=BetaPosterior(), parallel=1)
    state = search.init(FakeEngine(eos=ENDLESS).prompt([7]))
    (trial,) = search.ask(state, 1)
    branch = state.tree.root.branch.fork()[0].extend([1])
    with pytest.raises(InvalidArgument, match=r"1\.5.*BetaPosterior"):
        search.tell(state, [Outcome(trial.id, branch, (1,), (-1.0,), "length", 1.5)])
    assert trial.id in state.pending
    assert len(state.tree) == 1


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ABMCTS(posterior="gauss"), "posterior"),
        (lambda: ABMCTS(refine=""), "refine"),
        (lambda: ABMCTS(expansion="top_k"), "expansion"),
        (lambda: GaussianPosterior(kappa=0), "kappa"),
        (lambda: GaussianPosterior(scale=-1), "scale"),
        (lambda: BetaPosterior(alpha=0), "alpha"),
    ],
)
def test_a_bad_option_is_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=named):
        make()
