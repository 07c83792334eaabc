"""Best-of-N picks the maximum, votes go to the majority, and end as soon as they are decided."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import (
    BestOfN,
    Budget,
    Outcome,
    SelfConsistency,
    WeightedVote,
    start_search,
)
from dendrite_engine.search.self_consistency import lead_probability

ENDLESS = -1e9


@pytest.fixture
def engine():
    return FakeEngine(9, eos=ENDLESS)


def odd_value(branches):
    """A value that no log-probability predicts."""
    return [(sum(i * t for i, t in enumerate(b.token_ids)) % 97) / 97 for b in branches]


def run(engine, root, search, evaluator=None, budget=None, **options):
    result = start_search(engine, root, search, budget, evaluator=evaluator, **options).wait(60)
    engine.check_integrity()
    return result


def tell_texts(search, engine, root, texts, values=None):
    """Tell a search that its trials gave these texts, one at a time, until it ends."""
    state = search.init(root)
    told = []
    for i, tokens in enumerate(texts):
        trials = search.ask(state, 1)
        if not trials:
            break
        branch = root.fork()[0]
        branch.extend(tokens)
        value = None if values is None else values[i]
        outcome = Outcome(trials[0].id, branch, tuple(tokens), (-1.0,) * len(tokens), "eos", value)
        search.tell(state, [outcome])
        for unwanted in state.tree.take_unwanted():
            unwanted.prune()
        told.append(tokens)
    return state, told


# -- best-of-N ----------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [1, 3, 8, 64])
def test_best_of_n_picks_the_maximum_of_the_values_and_samples_the_same_texts(engine, parallel):
    root = engine.prompt([1, 2, 3])
    seen = {}

    def spy(branches):
        values = odd_value(branches)
        seen.update(zip((tuple(b.token_ids[3:]) for b in branches), values, strict=True))
        return values

    search = BestOfN(n=20, max_tokens=5, parallel=parallel, seed=7)
    result = run(engine, root, search, spy)
    assert result.iterations == 20
    assert result.value == max(seen.values())
    assert seen[result.token_ids] == max(seen.values())
    assert [f.value for f in result.found] == sorted((f.value for f in result.found), reverse=True)
    assert {f.token_ids for f in result.found} == set(seen)
    other = run(engine, root, BestOfN(n=20, max_tokens=5, parallel=5, seed=7), spy)
    assert other.token_ids == result.token_ids


def test_more_texts_begin_with_the_same_texts(engine):
    root = engine.prompt([1, 2])
    few = run(engine, root, BestOfN(n=4, max_tokens=6, seed=1), odd_value)
    many = run(engine, root, BestOfN(n=12, max_tokens=6, seed=1, parallel=5), odd_value)
    assert {f.token_ids for f in few.found} <= {f.token_ids for f in many.found}
    assert many.value >= few.value


def test_losers_are_pruned_as_soon_as_they_are_beaten(engine):
    root = engine.prompt([1, 2, 3])
    most = []

    def watch(event):
        if event.kind == "budget":
            most.append(len(engine.branches))

    result = run(engine, root, BestOfN(n=30, max_tokens=4, parallel=3), odd_value, on_event=watch)
    assert max(most) == 2, "after every batch the root and the best text are left"
    assert engine.branches == [root, result.best]


def test_a_kept_tree_keeps_every_text(engine):
    root = engine.prompt([1, 2, 3])
    result = run(engine, root, BestOfN(n=6, max_tokens=4, keep_tree=True), odd_value)
    assert len(engine.branches) == 7
    assert all(found.node.branch.is_alive for found in result.found)
    result.prune()
    assert engine.branches == [root]


def test_a_target_ends_best_of_n_with_its_batch(engine):
    root = engine.prompt([1])
    result = run(engine, root, BestOfN(n=400, max_tokens=4, parallel=4, target=0.7), odd_value)
    assert result.reason == "target"
    assert result.value >= 0.7
    assert result.iterations < 400
    assert result.iterations % 4 == 0


def test_ties_go_to_the_older_text(engine):
    root = engine.prompt([1])
    result = run(engine, root, BestOfN(n=9, max_tokens=3), lambda b: [0.5] * len(b))
    assert result.node.id == 1


def test_a_text_taken_out_by_a_person_does_not_win(engine):
    root = engine.prompt([1, 2, 3])
    search = BestOfN(n=12, max_tokens=4, parallel=4, keep_tree=True, seed=0)
    plain = run(engine, root, search, odd_value)
    plain.prune()
    handle = start_search(engine, root, search, evaluator=odd_value, paused=True)
    handle.step(2)
    assert handle.wait_paused(60)
    handle.prune(handle.best)
    handle.resume()
    result = handle.wait(60)
    values = sorted((f.value for f in result.found), reverse=True)
    assert len(values) == 11
    assert result.value == values[0]


# -- votes --------------------------------------------------------------------------------------

ANSWERS = {"extract": r"w(\d+)$"}  # the last word of a text of the fake engine


def majority(answers):
    """The commonest answer, ties to the one given first: a plain count."""
    counts = Counter(answers)
    return max(counts, key=lambda a: (counts[a], -answers.index(a)))


def test_self_consistency_returns_the_majority_of_all_texts(engine):
    for seed in range(20):
        root = engine.prompt([1, 2, 3])
        search = SelfConsistency(
            n=25, max_tokens=3, parallel=25, seed=seed, stop_when_decided=False, keep_tree=True,
            **ANSWERS,
        )  # fmt: skip
        handle = start_search(engine, root, search)
        result = handle.wait(60)
        answers = [str(node.token_ids[-1]) for node in handle.tree.nodes[1:]]
        assert len(answers) == 25
        assert str(result.token_ids[-1]) == majority(answers)
        counts = Counter(answers)
        assert result.value == pytest.approx(max(counts.values()) / 25)
        assert [f.value for f in result.found] == pytest.approx(
            [counts[str(f.token_ids[-1])] / 25 for f in result.found]
        )
        result.prune()


def test_a_vote_ends_when_and_only_when_no_text_to_come_can_change_it():
    """Against brute force: every way in which the texts to come may vote."""
    n, kinds = 5, (1, 2, 3)
    search = SelfConsistency(n=n, **ANSWERS)
    stopped_early = 0
    for texts in itertools.product(kinds, repeat=n):
        engine = FakeEngine(9)
        state, told = tell_texts(search, engine, engine.prompt([1]), [[t] for t in texts])
        answers = [tokens[0] for tokens in told]
        assert state.tree.tokens(search.best(state)) == [majority(list(texts))]
        for length in range(1, len(answers) + 1):
            outcomes = {
                majority([*answers[:length], *rest])
                for rest in itertools.product((*kinds, 4), repeat=n - length)
            }
            assert (len(outcomes) == 1) == (length == len(answers)), (texts, length)
        assert state.reason == ("decided" if len(answers) < n else "finished")
        stopped_early += len(answers) < n
    assert stopped_early > 100


def test_a_weighted_vote_ends_when_and_only_when_no_text_to_come_can_change_it():
    def winner(votes):
        totals = {}
        for answer, value in votes:
            totals[answer] = totals.get(answer, 0.0) + value
        order = [answer for answer, _ in votes]
        return max(totals, key=lambda a: (totals[a], -order.index(a)))

    n, ballots = 4, [(1, 1.0), (1, 0.25), (2, 1.0), (2, 0.5)]
    search = WeightedVote(n=n, **ANSWERS)
    for votes in itertools.product(ballots, repeat=n):
        engine = FakeEngine(9)
        state, told = tell_texts(
            search, engine, engine.prompt([1]), [[a] for a, _ in votes], [v for _, v in votes]
        )
        assert state.tree.tokens(search.best(state)) == [winner(votes)]
        for length in range(1, len(told) + 1):
            outcomes = {
                winner([*votes[:length], *rest])
                for rest in itertools.product([(1, 1.0), (2, 1.0), (3, 1.0)], repeat=n - length)
            }
            assert (len(outcomes) == 1) == (length == len(told)), (votes, length)


def test_answers_that_can_not_win_any_more_are_pruned(engine):
    root = engine.prompt([1])
    search = SelfConsistency(n=9, **ANSWERS)
    state, _ = tell_texts(search, engine, root, [[2], [3], [3], [3], [3]])
    assert state.reason is None, "answer 2 can't win, but one nobody gave yet could tie with 3"
    alive = {tuple(branch.token_ids[1:]) for branch in engine.branches}
    assert alive == {(), (2,), (3,)}
    state, _ = tell_texts(search, engine, root, [[2], [3], [3], [3], [3], [4], [3]])
    assert state.reason == "decided"


def test_texts_without_an_answer_do_not_vote(engine):
    root = engine.prompt([1])
    search = SelfConsistency(n=5, extract=lambda text: text if text == "w5" else None)
    state, _ = tell_texts(search, engine, root, [[2], [3], [5], [2], [3]])
    assert state.tree.tokens(search.best(state)) == [5]
    state, _ = tell_texts(search, engine, root, [[2], [3], [2], [2], [3]])
    assert state.tree.tokens(search.best(state)) == [2], "no answers at all: the first text"
    assert search.found(state) == []
    assert state.reason == "finished"


def test_the_last_match_counts_and_its_group_where_it_has_one(engine):
    root = engine.prompt([1])
    state, _ = tell_texts(SelfConsistency(n=1), engine, root, [[3, 4, 8]])
    assert list(state.ballots) == ["8"]
    state, _ = tell_texts(SelfConsistency(n=1, extract=r"w3 w(\d)"), engine, root, [[3, 4, 8]])
    assert list(state.ballots) == ["4"]
    state, _ = tell_texts(SelfConsistency(n=1, extract=r"w3 w\d"), engine, root, [[3, 4, 8]])
    assert list(state.ballots) == ["w3 w4"]


def test_the_text_valued_highest_speaks_for_its_answer(engine):
    root = engine.prompt([1])
    texts, values = [[2, 5], [3, 5], [4, 5], [2, 6]], [0.2, 0.9, 0.4, 1.0]
    search = WeightedVote(n=4, stop_when_decided=False, **ANSWERS)
    state, _ = tell_texts(search, engine, root, texts, values)
    assert state.tree.tokens(search.best(state)) == [3, 5]
    assert search.rank(state, search.best(state)) == pytest.approx(1.5 / 2.5)
    with pytest.raises(InvalidArgument, match=r"gave 1\.5"):
        tell_texts(search, engine, root, texts, [1.5] * 4)


def test_a_vote_taken_out_by_a_person_no_longer_counts(engine):
    root = engine.prompt([1])
    search = SelfConsistency(n=6, stop_when_decided=False, keep_tree=True, **ANSWERS)
    state, _ = tell_texts(search, engine, root, [[2], [2], [3], [3], [2]])
    search.drop(state, state.tree.nodes[1])
    search.drop(state, state.tree.nodes[2])
    assert {a: b.votes for a, b in state.ballots.items()} == {"3": 2, "2": 1}
    assert state.tree.tokens(search.best(state)) == [3]


def test_confidence_ends_a_vote_that_is_likely_enough(engine):
    for first, second in itertools.product(range(6), repeat=2):
        steps = 20_000
        inside = math.comb(first + second, first) * (first + second + 1)
        integral = sum(
            x**first * (1 - x) ** second
            for x in ((i + 0.5) / steps for i in range(steps // 2, steps))
        )
        assert lead_probability(first, second) == pytest.approx(inside * integral / steps, abs=1e-4)
    root = engine.prompt([1])
    search = SelfConsistency(n=40, confidence=0.95, **ANSWERS)
    state, told = tell_texts(search, engine, root, [[2]] * 40)
    assert len(told) == 4, "1 - 1/2**5 is the first that is above 0.95"
    assert state.reason == "decided"


def test_a_budget_that_runs_out_gives_the_leading_answer(engine):
    root = engine.prompt([1, 2])
    search = SelfConsistency(n=50, max_tokens=3, parallel=4, **ANSWERS)
    result = run(engine, root, search, budget=Budget(tokens=20))
    assert result.reason == "tokens"
    assert result.tokens <= 20
    assert result.best.token_ids == [1, 2, *result.token_ids]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: BestOfN(n=0), "n must"),
        (lambda: BestOfN(parallel=0), "parallel"),
        (lambda: BestOfN(max_tokens=0), "max_tokens"),
        (lambda: BestOfN(target=math.inf), "target"),
        (lambda: BestOfN(stop=("",)), "stop"),
        (lambda: BestOfN(n=2, sampling=SamplingParams(temperature=0)), "temperature=0"),
        (lambda: SelfConsistency(extract="("), "extract"),
        (lambda: SelfConsistency(extract=3), "extract"),
        (lambda: SelfConsistency(confidence=0.5), "confidence"),
        (lambda: SelfConsistency(confidence=1.1), "confidence"),
        (lambda: WeightedVote(stop_when_decided=1), "stop_when_decided"),
    ],
)
def test_a_bad_option_is_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=named):
        make()
