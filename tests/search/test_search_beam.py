"""Beam search: equal to exhaustive search where it is wide, to `transformers` where it is not."""

from __future__ import annotations

import itertools
import math

import pytest
from search_fakes import EOS, FakeEngine

from dendrite_engine.errors import ContextTooLong, InvalidArgument
from dendrite_engine.search import BeamSearch, Budget, Runner, start_search

ENDLESS = -1e9


def run(engine, root, **options):
    result = start_search(engine, root, BeamSearch(**options)).wait(60)
    engine.check_integrity()
    return result


def exhaustive(engine, prompt, max_tokens, penalty):
    """Every complete text of at most `max_tokens` tokens, scored; the best one."""
    vocab = engine.model_config.vocab_size
    best = (-math.inf, ())
    for length in range(1, max_tokens + 1):
        for text in itertools.product(range(vocab), repeat=length):
            if EOS in text[:-1] or (text[-1] != EOS and length < max_tokens):
                continue
            total = 0.0
            for i, token in enumerate(text):
                total += engine.logprobs_after([*prompt, *text[:i]])[token]
            best = max(best, (total / length**penalty, text))
    return best


def hf_beam_search(engine, prompt, width, max_tokens, penalty, early_stopping):
    """`transformers` 5.23 `_beam_search` (batch of one), transcribed with lists for tensors."""
    keep = max(2, 1 + 1) * width
    vocab = engine.model_config.vocab_size
    running = [(0.0, ())] + [(-1e9, ())] * (width - 1)
    finished = [(-1e9, (), False)] * width
    for length in range(1, max_tokens + 1):
        rows = []
        for score, text in running:
            logprobs = engine.logprobs_after([*prompt, *text])
            rows += [(score + logprobs[t], (*text, t)) for t in range(vocab)]
        top = sorted(rows, key=lambda row: -row[0])[:keep]
        hits = [text[-1] == EOS or length >= max_tokens for _, text in top]
        next_rows = [(s + (-1e9 if hit else 0.0), t) for (s, t), hit in zip(top, hits, strict=True)]
        running = sorted(next_rows, key=lambda row: -row[0])[:width]
        full = all(done for _, _, done in finished)
        new = []
        for i, ((s, t), hit) in enumerate(zip(top, hits, strict=True)):
            score = s / length**penalty
            if full and early_stopping is True:
                score -= 1e9
            if not (hit and i < width):
                score -= 1e9
            new.append((score, t, hit and i < width))
        finished = sorted([*finished, *new], key=lambda row: -row[0])[:width]
        never = early_stopping == "never" and penalty > 0
        hypothetical = max_tokens if never else length
        best_running = running[0][0] / hypothetical**penalty
        worst = min(s for s, _, _ in finished)
        improvable = any(best_running > (worst if done else -1e9) for _, _, done in finished)
        open_beam = not (all(done for _, _, done in finished) and early_stopping is True)
        if not (improvable and open_beam and not all(hits)):
            break
    return finished[0][:2]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_equals_exhaustive_search(seed, penalty):
    engine = FakeEngine(4, seed=seed, eos=0.5)
    root = engine.prompt([1, 2])
    score, text = exhaustive(engine, [1, 2], 5, penalty)
    result = run(
        engine, root, width=300, max_tokens=5, length_penalty=penalty, early_stopping="never"
    )
    assert result.token_ids == text
    assert result.value == pytest.approx(score)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_tokens_equal_those_of_transformers(width, penalty, early_stopping):
    for seed in range(12):
        engine = FakeEngine(9, seed=seed, eos=(1.0, 2.0, 2.6)[seed % 3])
        prompt = [1 + seed % 5, 3]
        score, text = hf_beam_search(engine, prompt, width, 14, penalty, early_stopping)
        result = run(
            engine,
            engine.prompt(prompt),
            width=width,
            max_tokens=14,
            length_penalty=penalty,
            early_stopping=early_stopping,
        )
        assert result.token_ids == text, seed
        assert result.value == pytest.approx(score)


def test_one_beam_is_greedy_decoding():
    engine = FakeEngine(9, eos=ENDLESS)
    text, prompt = [], [4, 5]
    for _ in range(20):
        logprobs = engine.logprobs_after([*prompt, *text])
        text.append(max(range(9), key=logprobs.__getitem__))
    assert run(engine, engine.prompt(prompt), width=1, max_tokens=20).token_ids == tuple(text)


def test_a_step_is_one_forward_over_all_live_beams():
    engine = FakeEngine(9, eos=ENDLESS)
    run(engine, engine.prompt([1, 2]), width=4, max_tokens=10)
    looks = [rows for name, rows in engine.log if name == "top_tokens"]
    assert looks == [1] + [4] * 9
    assert not [entry for entry in engine.log if entry[0] == "submit"]


def test_losers_are_pruned_at_every_step():
    engine = FakeEngine(9, eos=1.5)
    root = engine.prompt([1, 2])
    search = BeamSearch(width=3, max_tokens=12)
    runner, state = Runner(engine, root), search.init(root)
    while not search.done(state):
        search.tell(state, runner.run(search.ask(state, search.plan(state).trials)))
        assert runner.settle(state) == []
        wanted = {n.branch_id for n in (*state.live, *state.finished)} | {root.id}
        if not search.done(state):
            assert {b.id for b in engine.branches} == wanted
            for node in state.live:
                assert node.branch.token_ids == [1, 2, *state.tree.tokens(node)]
        engine.check_integrity()


def test_a_beam_that_does_not_split_goes_on_in_its_own_branch():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    result = run(engine, root, width=1, max_tokens=30)
    assert result.best.id == 2, "one fork off the root, none after it"
    assert result.best.token_ids == [1, 2, *result.token_ids]


def test_the_best_branch_holds_the_text_and_nothing_else_is_left():
    engine = FakeEngine(9, eos=2.0)
    root = engine.prompt([1, 2])
    result = run(engine, root, width=4, max_tokens=20)
    assert result.reason == "finished"
    assert engine.branches == [root, result.best]
    assert result.best.token_ids == [1, 2, *result.token_ids]
    assert EOS not in map(int, (w[1:] for w in result.text.split()))
    result.prune()
    assert engine.branches == [root]


def test_a_narrow_search_may_change_its_width_between_steps():
    engine = FakeEngine(9, eos=ENDLESS)
    handle = start_search(
        engine, engine.prompt([1, 2]), BeamSearch(width=2, max_tokens=6), paused=True
    )
    handle.step(2)
    assert handle.wait_paused(60)
    handle.set(width=4)
    handle.resume()
    handle.wait(60)
    looks = [rows for name, rows in engine.log if name == "top_tokens"]
    assert looks == [1, 2, 2, 4, 4, 4]


def test_extra_stop_tokens_complete_a_hypothesis():
    engine = FakeEngine(5, eos=ENDLESS)
    result = run(engine, engine.prompt([1, 2]), width=3, max_tokens=40, stop_token_ids=(3,))
    assert result.token_ids[-1] == 3
    assert result.node.finish_reason == "eos"


def test_a_budget_that_runs_out_gives_the_best_live_beam():
    engine = FakeEngine(9, eos=ENDLESS)
    result = start_search(
        engine, engine.prompt([1, 2]), BeamSearch(width=4, max_tokens=50), Budget(tokens=30)
    ).wait(60)
    assert result.reason == "tokens"
    assert result.tokens == 29  # 1 + 7 * 4: one more step of 4 would not fit
    assert len(result.token_ids) == 8
    assert result.best.is_alive


def test_a_beam_stops_where_the_context_is_full():
    engine = FakeEngine(9, eos=ENDLESS, max_context=10)
    result = run(engine, engine.prompt([1, 2]), width=3, max_tokens=50)
    assert len(result.token_ids) == 8
    assert result.reason == "finished"
    with pytest.raises(ContextTooLong, match="10 tokens fill the context of 10"):
        run(engine, engine.prompt([1] * 10), width=3)


def test_running_out_of_pages_keeps_the_best_text_so_far():
    engine = FakeEngine(9, eos=ENDLESS, num_pages=9, page_size=4)
    root = engine.prompt([1, 2, 3, 4])
    result = run(engine, root, width=3, max_tokens=60)
    assert result.reason == "pages"
    assert result.token_ids
    assert result.best is not None
    assert result.best.token_ids == [1, 2, 3, 4, *result.token_ids]
    result.prune()
    assert engine.branches == [root]
    engine.check_integrity()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("width", 0),
        ("width", 1.5),
        ("length_penalty", math.inf),
        ("length_penalty", None),
        ("max_tokens", 0),
        ("early_stopping", "always"),
        ("early_stopping", 1),
        ("stop_token_ids", (-1,)),
    ],
)
def test_a_bad_option_is_refused_by_name(option, value):
    with pytest.raises(InvalidArgument, match=option):
        BeamSearch(**{option: value})
