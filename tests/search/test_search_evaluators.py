"""Evaluators: their values, their bounds, and one branch's failure staying its own."""

from __future__ import annotations

import math

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import InvalidArgument, SearchError
from dendrite_engine.search import (
    MCTS,
    Budget,
    combine,
    keyword_coverage,
    mean_logprob,
    start_search,
    sum_logprob,
    verifier,
)
from dendrite_engine.search.evaluators import EvaluatorGuard, bind


@pytest.fixture
def engine():
    return FakeEngine(9, eos=-1e9)


@pytest.fixture
def branches(engine):
    """Three branches below a root of three tokens, with logprobs -1, -2, ... and a forced token."""
    root = engine.prompt([1, 2, 3])
    forks = root.fork(3)
    for i, branch in enumerate(forks):
        for j in range(i + 1):
            branch.append(4 + j, -float(j + 1))
        branch.extend([8])
    return root, forks


def test_logprob_evaluators_count_generated_tokens_after_the_root(branches):
    root, forks = branches
    root._logprobs[-1] = -50.0  # a token generated before the search began does not count
    for fork in forks:
        fork._logprobs[2] = -50.0
    assert bind(sum_logprob(), root)(forks) == [-1.0, -3.0, -6.0]
    assert bind(mean_logprob(squash=False), root)(forks) == [-1.0, -1.5, -2.0]
    assert bind(mean_logprob(), root)(forks) == pytest.approx([math.exp(x) for x in (-1, -1.5, -2)])
    assert bind(sum_logprob(squash=True), root)(forks)[1] == pytest.approx(math.exp(-3))


def test_a_branch_without_generated_tokens_has_the_neutral_value(engine):
    root = engine.prompt([1, 2])
    assert bind(mean_logprob(), root)([root]) == [1.0]
    assert bind(sum_logprob(), root)([root]) == [0.0]


def test_keyword_coverage_is_the_share_of_words_written_by_the_search(branches):
    root, forks = branches
    assert bind(keyword_coverage(["w4", "W5", "w6"]), root)(forks) == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )
    assert bind(keyword_coverage(["w1", "w4"]), root)(forks) == [0.5] * 3, (
        "the prompt does not count"
    )
    assert bind(keyword_coverage(["W5"], ignore_case=False), root)(forks) == [0.0] * 3


def test_a_verifier_sees_the_text_that_the_search_wrote(branches):
    root, forks = branches
    texts = []
    evaluate = bind(verifier(lambda text: texts.append(text) or "w5" in text), root)
    assert evaluate(forks) == [0.0, 1.0, 1.0]
    assert texts == ["w4 w8", "w4 w5 w8", "w4 w5 w6 w8"]


def test_combined_values_stay_in_bounds_and_weights_count(branches):
    root, forks = branches
    one, zero = verifier(lambda text: 1.0), verifier(lambda text: 0.0)
    assert bind(combine(one, zero), root)(forks) == [0.5] * 3
    assert bind(combine(one, zero, weights=(3, 1)), root)(forks) == [0.75] * 3
    assert bind(combine(one, zero, how="min"), root)(forks) == [0.0] * 3
    half = verifier(lambda text: 0.5)
    assert bind(combine(half, half, weights=(1, 2), how="product"), root)(forks) == [0.125] * 3
    assert bind(combine(mean_logprob()), root)(forks) == bind(mean_logprob(), root)(forks)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: keyword_coverage([]), "words"),
        (lambda: keyword_coverage("word"), "words"),
        (lambda: keyword_coverage([""]), "words"),
        (lambda: keyword_coverage(["a"], ignore_case=1), "ignore_case"),
        (lambda: verifier("text"), "fn"),
        (lambda: mean_logprob(squash="no"), "squash"),
        (lambda: combine(), "evaluators"),
        (lambda: combine(3), "evaluators"),
        (lambda: combine(mean_logprob(), weights=(1, 2)), "weights"),
        (lambda: combine(mean_logprob(), weights=(0,)), "weights"),
        (lambda: combine(mean_logprob(), weights=(math.nan,)), "weights"),
        (lambda: combine(mean_logprob(), how="max"), "how"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=named):
        make()


# -- the guard ----------------------------------------------------------------------------------


def test_a_branch_that_raises_gets_the_worst_value_and_the_others_their_own(branches):
    _, forks = branches

    def evaluate(batch):
        if any(b is forks[1] for b in batch):
            raise ZeroDivisionError("bad branch")
        return [b.num_tokens / 10 for b in batch]

    valued = EvaluatorGuard(evaluate)(forks)
    assert [v.value for v in valued] == [0.5, 0.5, 0.7]
    assert [v.error for v in valued] == [
        None,
        "evaluator raised ZeroDivisionError: bad branch",
        None,
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_replaced_by_the_worst_seen(branches, bad):
    _, forks = branches
    guard = EvaluatorGuard(lambda batch: [0.25, bad, 0.75][: len(batch)])
    assert [v.value for v in guard(forks)] == [0.25, 0.25, 0.75]
    assert guard(forks)[1].error == f"evaluator returned {bad}"
    assert EvaluatorGuard(lambda batch: [bad])(forks[:1])[0].value == 0.0


def test_an_evaluator_that_never_answered_is_broken(branches):
    _, forks = branches
    calls = []

    def evaluate(batch):
        calls.append(len(batch))
        raise RuntimeError("always")

    with pytest.raises(RuntimeError, match="always"):
        EvaluatorGuard(evaluate)(forks)
    assert calls == [3, 1, 1, 1]


def test_an_evaluator_that_keeps_failing_is_broken_in_the_end(branches):
    _, forks = branches
    working = True

    def evaluate(batch):
        if not working:
            raise RuntimeError("service went away")
        return [0.5] * len(batch)

    guard = EvaluatorGuard(evaluate)
    guard(forks)
    working = False
    for _ in range(2):
        assert [v.value for v in guard(forks)] == [0.5] * 3
    with pytest.raises(RuntimeError, match="went away"):
        guard(forks)


@pytest.mark.parametrize("answer", [None, 1.0, [0.5], [0.5] * 4, ["a", "b", "c"], [[1], [2], [3]]])
def test_an_answer_of_the_wrong_shape_is_an_error_of_the_evaluator(branches, answer):
    _, forks = branches
    with pytest.raises(SearchError, match="evaluator"):
        EvaluatorGuard(lambda batch: answer)(forks)


# -- inside a search ----------------------------------------------------------------------------


def test_a_search_goes_on_past_a_branch_whose_evaluation_fails(engine):
    root = engine.prompt([1, 2, 3])
    calls = []

    def evaluate(batch):
        calls.append(len(batch))
        if any(b.token_ids[-1] == 4 for b in batch):
            raise ValueError("can't judge w4")
        return [0.5 + b.token_ids[-1] / 20 for b in batch]

    result = start_search(
        engine,
        root,
        MCTS(tokens_per_node=1, width=6, parallel=3),
        Budget(iterations=60),
        evaluator=evaluate,
    ).wait(60)
    assert result.iterations == 60
    errors = [e.data["error"] for e in engine.trace if e.kind == "error"]
    assert errors
    assert all("can't judge w4" in error for error in errors)
    assert max(calls) == 3
    result.prune()
    assert engine.branches == [root]


def test_nan_values_are_traced_and_do_not_poison_the_tree(engine):
    root = engine.prompt([1, 2, 3])
    handle = start_search(
        engine,
        root,
        MCTS(tokens_per_node=1, width=4),
        Budget(iterations=40),
        evaluator=lambda bs: [math.nan if b.token_ids[-1] == 5 else 0.6 for b in bs],
    )
    handle.wait(60)
    stats = handle.stats()
    assert all(math.isfinite(v) for v in stats.value)
    assert any(e.kind == "error" and "nan" in e.data["error"] for e in engine.trace)


def test_values_below_zero_work_with_minmax(engine):
    root = engine.prompt([1, 2, 3])
    options = MCTS(tokens_per_node=2, normalise="minmax")
    result = start_search(
        engine, root, options, Budget(iterations=40), evaluator=sum_logprob()
    ).wait(60)
    assert result.value < 0
    with pytest.raises(InvalidArgument, match=r"normalise='minmax'"):
        start_search(
            engine, root, MCTS(tokens_per_node=2), Budget(iterations=40), evaluator=sum_logprob()
        ).wait(60)
    result.prune()
    assert engine.branches == [root], "the failed search pruned its branches too"


def test_an_evaluator_may_use_the_engine(engine):
    root = engine.prompt([1, 2, 3])

    def by_greedy_continuation(batch):
        forks = [b.fork()[0] for b in batch]
        top = engine.top_tokens(forks, 1)
        for fork in forks:
            fork.prune()
        return [math.exp(row[0].logprob) for row in top]

    start_search(engine, root, "mcts", Budget(iterations=8), evaluator=by_greedy_continuation).wait(
        60
    ).prune()
    assert engine.branches == [root]
