"""What goes wrong while guesses are verified: full pools, broken proposers, branches that go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from proposers import Scripted, broken, noise, oracle

from dendrite_engine import DraftModel, Engine, PromptLookup, SamplingParams
from dendrite_engine.errors import InvalidArgument, StaleBranch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from step_fakes import defer, run_in_step

TEXT = "one two three, one two four; one two three, one two "
FREE = SamplingParams(temperature=0.8, max_tokens=40, ignore_eos=True)


def tokens_of(engine, speculate, params=FREE, branches=4):
    forks = engine.prompt(TEXT).fork(branches)
    done = engine.complete(forks, params, speculate=speculate)
    engine.check_integrity()
    return [(c.token_ids, c.finish_reason, type(c.error)) for c in done]


@pytest.mark.parametrize("num_pages", [16, 17, 18, 20, 24])
def test_a_pool_that_is_full_is_decoded_plainly(make_engine, num_pages):
    """Four branches of 92 tokens need 15 pages; the drafts of all of them would need 4 or more."""
    expected = tokens_of(make_engine(), None)
    engine = make_engine(num_pages=num_pages, prefix_cache=False)
    speculate = Scripted(noise(3, 250))
    assert tokens_of(engine, speculate) == expected
    counts = engine.stats().speculation.total
    assert num_pages > 18 or counts.no_room > 0
    engine.prune_all()
    assert engine.stats().pages_free == num_pages


def test_a_pool_that_ends_the_branch_ends_it_at_the_same_token(make_engine):
    ends = []
    for speculate in (None, PromptLookup(shortest=1, adaptive=False), Scripted(noise(4, 250))):
        engine = make_engine(num_pages=6, prefix_cache=False)
        ends.append(tokens_of(engine, speculate, FREE.replace(max_tokens=90), branches=1))
    assert ends[0] == ends[1] == ends[2]
    assert ends[0][0][1] == "out_of_pages"


def test_no_page_stays_behind(make_engine):
    engine = make_engine(prefix_cache=False)
    tokens_of(engine, Scripted(noise(7, 250)))
    stats = engine.stats()
    assert stats.speculation.total.proposed > 100
    assert (stats.forks, stats.prunes, stats.branches) == (4, 0, 5)
    for branch in engine.branches:
        branch.prune()
    assert engine.stats().pages_free == engine.stats().pages_total


def test_a_proposer_that_raises_is_not_asked_again_and_decoding_goes_on(make_engine):
    expected = tokens_of(make_engine(), None)
    engine = make_engine()
    assert tokens_of(engine, Scripted(broken)) == expected
    errors = [e.data["error"] for e in engine.trace.since(0) if e.kind == "error"]
    assert len(errors) == 1
    assert "no guess for" in errors[0]


@pytest.mark.parametrize("path", [[-1], [10**6], [5, 10**6, 7], [], [2**40]])
def test_guesses_that_are_no_tokens_are_ignored(make_engine, path):
    expected = tokens_of(make_engine(), None)
    assert tokens_of(make_engine(), Scripted(lambda request: [path])) == expected


def test_a_branch_pruned_in_flight_ends_stale_and_gives_its_draft_back(make_engine):
    engine = make_engine(prefix_cache=False)
    sampler = defer(engine)
    root = engine.prompt(TEXT)
    a, b = root.fork(2)
    run_in_step(sampler, 5, a.prune)
    job = engine.submit([a, b], FREE, speculate=Scripted(noise(8, 250)))
    first, second = job.result()
    assert first.finish_reason == "stale"
    assert isinstance(first.error, StaleBranch)
    assert second.finish_reason == "length"
    root.prune(subtree=True)
    assert engine.stats().pages_free == engine.stats().pages_total


def test_a_fork_made_in_flight_holds_no_guess(make_engine):
    engine = make_engine()
    sampler = defer(engine)
    root = engine.prompt(TEXT)
    (branch,) = root.fork()
    held: list[tuple[list[int], list[int]]] = []

    def fork() -> None:
        (child,) = branch.fork()
        held.append((branch.token_ids, child.token_ids))

    run_in_step(sampler, 6, fork)
    (done,) = engine.complete([branch], FREE, speculate=Scripted(noise(9, 250)))
    whole = root.token_ids + done.token_ids
    assert held
    assert all(own == other == whole[: len(own)] for own, other in held)


def test_a_step_that_fails_leaves_no_draft(make_engine):
    engine = make_engine(prefix_cache=False)
    root = engine.prompt(TEXT)
    run = engine._parts.runner.run
    calls = iter(range(100))

    def failing(plan, drawn=None):
        if next(calls) == 3:
            raise RuntimeError("the pass failed")
        return run(plan, drawn)

    engine._parts.runner.run = failing
    with pytest.raises(RuntimeError, match="the pass failed"):
        engine.complete(root.fork(2), FREE, speculate=Scripted(noise(10, 250)))
    engine.check_integrity()
    assert not engine._loop.speculator._open
    engine.complete(root.fork(), FREE, speculate=PromptLookup())
    engine.prune_all()
    assert engine.stats().pages_free == engine.stats().pages_total


def test_logits_that_are_not_finite_end_the_branch_at_the_same_token(make_engine):
    def poisoned(engine):
        run = engine._parts.runner.run

        def with_nan(plan, drawn=None):
            logits, rows = run(plan, drawn)
            logits = logits.clone()
            wanted = sorted(set(plan.logits_row[plan.logits_row >= 0].tolist()))
            logits[[i for i, row in enumerate(wanted) if plan.positions[row] == 70]] = torch.nan
            return logits, rows

        engine._parts.runner.run = with_nan
        return engine

    expected = tokens_of(poisoned(make_engine()), None, branches=2)
    assert expected[0][1] == "numeric_error"
    healthy = make_engine()
    tokens_of(healthy, None)
    texts = [branch.token_ids for branch in healthy.branches]
    engine = poisoned(make_engine())
    assert tokens_of(engine, Scripted(oracle(texts)), branches=2) == expected
    assert engine.stats().speculation.total.accepted > 10


def test_leaving_the_loop_ends_the_guessing(make_engine):
    engine = make_engine()
    (branch,) = engine.prompt(TEXT).fork()
    speculate = Scripted(noise(11, 250))
    for _ in engine.generate(branch, FREE.replace(max_tokens=500), speculate=speculate):
        if branch.num_tokens > len(TEXT) + 5:
            break
    engine.complete([engine.prompt("next")], FREE)
    assert len(speculate.forgotten) == 1
    assert not branch.is_generating


class TestRefusals:
    def test_something_else_than_a_speculation(self, make_engine):
        engine = make_engine()
        with pytest.raises(InvalidArgument, match="speculate must be"):
            engine.submit(engine.prompt("x"), FREE, speculate=5)

    def test_the_engine_as_its_own_draft_model(self, make_engine):
        engine = make_engine()
        with pytest.raises(InvalidArgument, match="a second one"):
            engine.submit(engine.prompt("x"), FREE, speculate=DraftModel(engine))

    def test_a_draft_model_with_another_tokenizer(self, make_engine):
        engine, draft = make_engine(), make_engine()
        draft.tokenizer.fingerprint = "other"
        with pytest.raises(InvalidArgument, match="another tokenizer"):
            engine.submit(engine.prompt("x"), FREE, speculate=DraftModel(draft))
        assert not engine.branches[0].is_generating

    def test_a_draft_model_that_was_closed(self, make_engine, tiny_model):
        engine, draft = make_engine(), Engine.from_pretrained(tiny_model("llama"), num_pages=8)
        draft.close()
        with pytest.raises(InvalidArgument, match="closed"):
            engine.submit(engine.prompt("x"), FREE, speculate=DraftModel(draft))

    @pytest.mark.parametrize(
        "settings", [{"tokens": 0}, {"width": 0}, {"shortest": 5}, {"longest": 99}, {"tokens": 1.5}]
    )
    def test_settings_out_of_range(self, settings):
        with pytest.raises(InvalidArgument, match="PromptLookup"):
            PromptLookup(**settings)


def test_a_draft_engine_that_closes_or_fills_up_does_not_end_the_job(make_engine, tiny_model):
    expected = tokens_of(make_engine(), None)
    small = make_engine("qwen3", num_pages=5)
    engine = make_engine()
    assert tokens_of(engine, DraftModel(small, adaptive=False)) == expected
    draft = Engine.from_pretrained(tiny_model("qwen3"), num_pages=64)
    settings = DraftModel(draft)
    job_engine = make_engine()
    forks = job_engine.prompt(TEXT).fork(4)
    stream = job_engine.generate(forks, FREE, speculate=settings)
    next(stream)
    draft.close()
    list(stream)
    assert [b.token_ids[len(TEXT) :] for b in forks] == [tokens for tokens, _, _ in expected]


def test_a_branch_of_one_token_is_decoded_plainly(make_engine):
    engine = make_engine()
    branch = engine.prompt([65])
    speculate = Scripted(noise(12, 250))
    (done,) = engine.complete([branch], FREE, speculate=speculate)
    other = make_engine().prompt([65])
    assert other.engine.complete([other], FREE)[0].token_ids == done.token_ids
