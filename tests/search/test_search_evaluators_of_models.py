"""Evaluators that compute: asking a model, rollouts, caches, and what they cost."""

from __future__ import annotations

import asyncio
import math
import threading

import pytest
from search_fakes import EOS, FakeEngine, unit

from dendrite_engine.errors import InvalidArgument, OutOfPages, SearchError
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import (
    MCTS,
    BestOfN,
    Budget,
    cached,
    combine,
    first_of,
    mean_logprob,
    reward,
    reward_model,
    rollout,
    self_evaluation,
    start_search,
    sum_logprob,
    verifier,
)
from dendrite_engine.search.evaluators import EvaluatorGuard, bind, tokens_computed

ASK = (7, 7)


@pytest.fixture
def engine():
    return FakeEngine(9, eos=-1e9)


@pytest.fixture
def root(engine):
    return engine.prompt([1, 2, 3])


@pytest.fixture
def forks(root):
    made = root.fork(3)
    for i, branch in enumerate(made):
        branch.extend([4 + i, 5])
    return made


def opinion(engine, tokens, good=(5,), bad=(6,)):
    logprobs = engine.logprobs_after(tokens)
    yes, no = (sum(math.exp(logprobs[t]) for t in ids) for ids in (good, bad))
    return yes / (yes + no)


# -- asking -------------------------------------------------------------------------------------


def test_self_evaluation_is_the_share_of_good_answers_to_the_prompt(engine, root, forks):
    engine._logits = lambda tokens: [3 * unit(sum(tokens), t) for t in range(9)]
    evaluate = bind(self_evaluation(ASK, good=["w5", "w1"], bad=["w6"]), root)
    expected = [opinion(engine, [*b.token_ids, *ASK], (5, 1)) for b in forks]
    assert evaluate(forks) == pytest.approx(expected)
    assert len(set(expected)) == 3


def test_self_evaluation_forks_once_forwards_once_and_leaves_nothing(engine, root, forks):
    evaluate = bind(self_evaluation(ASK, good=["w5"], bad=["w6"]), root)
    engine.log.clear()
    live, pages = {b.id for b in engine.branches}, dict(engine.refs)
    evaluate(forks)
    assert [rows for name, rows in engine.log if name == "top_tokens"] == [3]
    assert [name for name, _ in engine.log].count("fork") == 3
    assert {b.id for b in engine.branches} == live
    assert engine.refs == pages
    assert all(b.num_tokens == 5 for b in forks)
    assert tokens_computed(evaluate) == 3 * len(ASK)
    evaluate(forks)
    assert tokens_computed(evaluate) == 3 * len(ASK), "cached: nothing is computed again"


def test_an_answer_that_is_neither_stays_with_its_branch(engine, root, forks):
    def logits(tokens):
        strange = 4 in tokens
        return [8.0 if t == (1 if strange else 5) else -8.0 * (t in (5, 6)) for t in range(9)]

    engine._logits = logits
    evaluate = bind(self_evaluation(ASK, good=["w5"], bad=["w6"], candidates=3), root)
    strange, *others = evaluate(forks)
    assert isinstance(strange, SearchError)
    assert "none of ('w5', 'w6') is among the 3 likeliest" in str(strange)
    assert others == [1.0, 1.0]


def test_pages_that_do_not_suffice_for_a_prompt_fail_that_branch_alone():
    engine = FakeEngine(9, eos=-1e9, num_pages=6)
    root = engine.prompt([1, 2, 3])
    forks = root.fork(3)
    for i, fork in enumerate(forks):
        fork.extend([4 + i])
    engine.num_pages = len(engine.refs) + 2
    evaluate = bind(self_evaluation((7, 7, 7, 7), good=["w5"], bad=["w6"]), root)
    answers = evaluate(forks)
    assert [type(a) for a in answers] == [float, float, OutOfPages]
    engine.check_integrity()
    assert len(engine.branches) == 4


def test_a_reward_model_reads_the_text_in_its_own_engine(root, forks):
    other = FakeEngine(9, seed=4, eos=-1e9)

    class Words:
        """An engine whose prompts are words."""

        model_config = other.model_config

        def prompt(self, text):
            return other.prompt([int(word[1:]) for word in text.split()])

        def top_tokens(self, branches, k):
            return other.top_tokens(branches, k)

        def stats(self):
            return type("Stats", (), {"prefix_hit_tokens": 0})()

    evaluate = bind(
        reward_model(
            Words(), good=["w5"], bad=["w6"], template=lambda p, t: f"{p} {t} w8", cost=0.5
        ),
        root,
    )
    expected = [opinion(other, [*branch.token_ids, 8]) for branch in forks]
    assert evaluate(forks) == pytest.approx(expected)
    assert other.branches == []
    assert tokens_computed(evaluate) == math.ceil(3 * 6 * 0.5)


def test_a_reward_function_sees_all_texts_of_a_batch_at_once(root, forks):
    calls = []

    def fn(texts):
        calls.append(texts)
        return range(len(texts))

    assert bind(reward(fn), root)(forks) == [0.0, 1.0, 2.0]
    assert bind(reward(fn, with_prompt=True), root)(forks[:1]) == [0.0]
    assert calls == [["w4 w5", "w5 w5", "w6 w5"], ["w1 w2 w3 w4 w5"]]


# -- rollouts -----------------------------------------------------------------------------------


def test_a_rollout_is_the_mean_value_of_the_continuations(engine, root, forks):
    ends = []

    def value(branches):
        ends.extend(tuple(b.token_ids) for b in branches)
        return [b.token_ids[-1] / 10 for b in branches]

    evaluate = bind(rollout(value, tokens=4, count=5, seed=3), root)
    live, pages = {b.id for b in engine.branches}, dict(engine.refs)
    values = evaluate(forks)
    assert len(ends) == 15
    for i, branch in enumerate(forks):
        mine = ends[5 * i : 5 * i + 5]
        assert all(end[:5] == tuple(branch.token_ids) and len(end) == 9 for end in mine)
        assert values[i] == pytest.approx(sum(end[-1] for end in mine) / 50)
        assert len(set(mine)) > 1
    assert tokens_computed(evaluate) == 60
    assert ({b.id for b in engine.branches}, engine.refs) == (live, pages)
    assert [rows for name, rows in engine.log if name == "submit"] == [15], "one job"


def test_a_rollout_of_a_text_depends_on_the_seed_and_not_on_its_branch(engine, root, forks):
    value = lambda branches: [b.token_ids[-1] / 10 for b in branches]  # noqa: E731
    first = bind(rollout(value, count=3, seed=1), root)(forks)
    twins = root.fork(3)
    for i, twin in enumerate(twins):
        twin.extend([4 + i, 5])
    assert bind(rollout(value, count=3, seed=1), root)(twins[::-1]) == first[::-1]
    assert bind(rollout(value, count=3, seed=2), root)(forks) != first


def test_a_text_that_has_ended_is_not_continued(engine, root, forks):
    forks[0].extend([EOS])
    seen = []

    def value(branches):
        seen.extend(b.num_tokens for b in branches)
        return [0.5] * len(branches)

    bind(rollout(value, tokens=4), root)(forks)
    assert seen == [6, 9, 9]


# -- caching, combining, waiting ----------------------------------------------------------------


def test_a_cached_evaluator_is_asked_once_for_a_text(root, forks):
    asked = []

    def value(branches):
        asked.append([tuple(b.token_ids) for b in branches])
        return [len(asked)] * len(branches)

    evaluate = bind(cached(value), root)
    assert evaluate(forks[:2]) == [1, 1]
    twin = root.fork()[0]
    twin.extend([4, 5])
    assert evaluate([forks[2], twin, forks[2]]) == [2, 1, 2]
    assert [len(batch) for batch in asked] == [2, 1]
    forks[0].extend([6])
    assert evaluate([forks[0]]) == [3], "a branch that grew is another text"
    assert bind(cached(value), root)([twin]) == [4], "each search has a cache of its own"


def test_a_cache_forgets_what_was_not_used_for_longest_and_keeps_no_failures(root, forks):
    asked = []

    def value(branches):
        asked.extend(branches)
        return [math.nan if b is forks[2] else 0.5 for b in branches]

    evaluate = bind(cached(value, size=1), root)
    for branch in (forks[0], forks[0], forks[1], forks[0], forks[2], forks[2]):
        evaluate([branch])
    assert asked == [forks[0], forks[1], forks[0], forks[2], forks[2]]


def test_the_first_evaluator_that_answers_is_taken_and_the_next_asked_only_then(root, forks):
    asked = []

    def unsure(text):
        if "w4" in text:
            raise ValueError("can't tell")
        return 0.25 if "w6" in text else math.nan

    def sure(branches):
        asked.append(list(branches))
        return [0.75] * len(branches)

    assert bind(first_of(verifier(unsure), sure), root)(forks) == [0.75, 0.75, 0.25]
    assert asked == [forks[:2]]
    assert bind(first_of(sure, verifier(unsure)), root)(forks) == [0.75] * 3
    nobody = bind(first_of(verifier(unsure)), root)(forks)
    assert isinstance(nobody[0], ValueError)


def test_a_sum_is_weighted_and_a_part_that_fails_fails_its_branch_alone(root, forks):
    def picky(text):
        if "w4" in text:
            raise ValueError("no")
        return 0.5

    evaluate = bind(
        combine(verifier(picky), lambda b: [2.0] * len(b), weights=(4, 1), how="sum"), root
    )
    failed, *others = evaluate(forks)
    assert isinstance(failed, ValueError)
    assert others == [4.0, 4.0]
    valued = EvaluatorGuard(evaluate)(forks)
    assert [v.value for v in valued] == [4.0, 4.0, 4.0]
    assert valued[0].error == "evaluator raised ValueError: no"


def test_async_evaluators_are_awaited_on_one_loop_also_where_a_loop_runs(root, forks):
    loops = set()

    async def value(branches):
        loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [b.token_ids[3] / 10 for b in branches]

    class Model:
        def bind(self, bound_to):
            assert bound_to is root
            return self

        async def __call__(self, branches):
            return await value(branches)

    async def inside():
        return bind(combine(Model(), value), root)(forks)

    evaluate = bind(value, root)
    assert evaluate(forks) == pytest.approx([0.4, 0.5, 0.6])
    assert evaluate(forks[:1]) == pytest.approx([0.4])
    assert len(loops) == 1
    assert asyncio.run(inside()) == pytest.approx([0.4, 0.5, 0.6])


def test_the_calls_of_an_async_verifier_run_together_and_fail_alone(root, forks):
    together = []

    async def check(text):
        together.append(text)
        while len(together) < 3:  # ends only if all of them are running
            await asyncio.sleep(0)
        if "w6" in text:
            raise ValueError("timeout")
        return True

    found = bind(verifier(check), root)(forks)
    assert found[:2] == [1.0, 1.0]
    assert isinstance(found[2], ValueError)


def test_the_thread_of_an_async_evaluator_ends_with_it(root, forks):
    async def value(branches):
        return [threading.current_thread().ident] * len(branches)

    evaluate = bind(value, root)
    (ident,) = {int(v) for v in evaluate(forks)}
    thread = next(t for t in threading.enumerate() if t.ident == ident)
    del evaluate
    thread.join(30)
    assert not thread.is_alive()


def test_an_async_reward_works_in_a_search(engine, root):
    async def fn(texts):
        await asyncio.sleep(0)
        return [len(set(text.split())) / 10 for text in texts]

    plain = reward(lambda texts: [len(set(text.split())) / 10 for text in texts])
    search = BestOfN(n=8, max_tokens=6, seed=1)
    results = [
        start_search(engine, root, search, evaluator=e).wait(60) for e in (reward(fn), plain)
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].value == results[1].value


# -- what it costs ------------------------------------------------------------------------------


def test_compute_counts_tokens_of_evaluators_and_ends_a_search(engine, root):
    evaluator = combine(self_evaluation(ASK, good=["w5"], bad=["w6"]), mean_logprob())
    search = MCTS(width=3, tokens_per_node=3, parallel=2, seed=1)
    result = start_search(
        engine, root, search, Budget(compute=60, iterations=1000), evaluator=evaluator
    ).wait(60)
    assert result.reason == "compute"
    per_batch = 2 * (3 + len(ASK))
    assert 60 - per_batch <= result.compute <= 60 + per_batch
    assert result.compute == result.tokens + len(ASK) * result.nodes, "each text was asked about"
    engine.check_integrity()
    result.prune()
    assert engine.branches == [root]


def test_compute_is_tokens_where_no_evaluator_computes(engine, root):
    result = start_search(engine, root, "mcts", Budget(iterations=12), width=3).wait(60)
    assert result.compute == result.tokens > 0


def test_a_rollout_evaluator_leaves_a_search_without_leaks(engine, root):
    evaluator = combine(rollout(mean_logprob(), tokens=5, count=2), sum_logprob(squash=True))
    result = start_search(
        engine, root, MCTS(width=2, tokens_per_node=3), Budget(iterations=20), evaluator=evaluator
    ).wait(60)
    assert result.compute == result.tokens + 20 * 2 * 5
    result.prune()
    assert engine.branches == [root]
    engine.check_integrity()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: self_evaluation(""), "prompt"),
        (lambda: self_evaluation("?", good=()), "good"),
        (lambda: self_evaluation("?", bad=("",)), "bad"),
        (lambda: self_evaluation("?", good=("a", "b"), bad=("b",)), "good and bad share"),
        (lambda: self_evaluation("?", candidates=0), "candidates"),
        (lambda: reward_model(None, good="+", bad="-", template="x"), "template"),
        (lambda: reward_model(None, good="+", bad="-", cost=-1), "cost"),
        (lambda: reward(3), "fn"),
        (lambda: reward(len, with_prompt=1), "with_prompt"),
        (lambda: rollout(mean_logprob(), tokens=0), "tokens"),
        (lambda: rollout(mean_logprob(), count=0), "count"),
        (lambda: rollout(mean_logprob(), seed=-1), "seed"),
        (lambda: rollout(3), "evaluator"),
        (lambda: rollout(mean_logprob(), count=2, sampling=SamplingParams()), "temperature"),
        (lambda: cached(3), "evaluator"),
        (lambda: cached(mean_logprob(), size=0), "size"),
        (lambda: first_of(), "evaluators"),
        (lambda: first_of(3), "evaluators"),
        (lambda: Budget(compute=0), r"budget\.compute"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=named):
        make()
