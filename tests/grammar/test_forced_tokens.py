"""Runs that a grammar leaves no choice for: the tokens of masked decoding, in fewer passes."""

from __future__ import annotations

import numpy as np
import pytest

from dendrite_engine import SamplingParams
from dendrite_engine.grammar import JsonSchema, Regex
from dendrite_engine.guided import Guided

TEXT = "text before the grammar; "
RECORD = JsonSchema(
    {
        "type": "object",
        "properties": {
            "identifier": {"enum": ["first", "second"]},
            "description": {"type": "string", "maxLength": 4},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["identifier", "description", "count"],
        "additionalProperties": False,
    }
)
DRAWN = SamplingParams(temperature=1.0, max_tokens=90, logprobs=3)


def _events(engine, branches, params=DRAWN):
    """(token, logprob, alternatives, text, end) of every event, by branch in the order given."""
    found = {branch.id: [] for branch in branches}
    for event in engine.generate(branches, params):
        top = tuple((t.token_id, t.logprob) for t in event.top)
        entry = (event.token_id, event.logprob, top, event.text, event.finish_reason)
        found[event.branch.id].append(entry)
    return list(found.values())


def _run(make_engine, *, forcing: bool, device: str = "cpu", params=DRAWN, **options):
    kind = "llama" if device == "cpu" else "llama-wide"
    options = {"deterministic": True, "dtype": "float32", **options}
    engine = make_engine(kind, device=device, **options)
    root = engine.prompt(TEXT).constrain(RECORD)
    with pytest.MonkeyPatch.context() as patch:
        if not forcing:
            patch.setattr(Guided, "_run", lambda self, lane, left, held: [])
        free = engine.prompt("a free branch beside it").fork()[0]
        branches = [*root.fork(3), free]
        rows = [params] * 3 + [params.replace(ignore_eos=True, stop=())]
        events = _events(engine, branches, rows)
    for branch, told in zip(branches, events, strict=True):
        kept = branch.logprobs[-len([e for e in told if e[0] is not None]) :]
        assert kept == [e[1] for e in told if e[0] is not None]
    return engine, events


@pytest.mark.parametrize("device", ["cpu", "cuda-twin"])
def test_forced_tokens_are_reported_like_those_of_masked_decoding(make_engine, device):
    """Bitwise on the CPU path: tokens, log-probabilities, alternatives, text, ends."""
    forced, events = _run(make_engine, forcing=True, device=device)
    plain, expected = _run(make_engine, forcing=False, device=device)
    assert forced.stats().tokens_forced > 60
    assert plain.stats().tokens_forced == 0
    if device == "cpu":
        assert events == expected
    for ours, theirs in zip(events, expected, strict=True):
        assert [(e[0], e[3], e[4]) for e in ours] == [(e[0], e[3], e[4]) for e in theirs]
        values = [(e[1], *(v for _, v in e[2])) for e in ours]
        assert np.allclose(values, [(e[1], *(v for _, v in e[2])) for e in theirs], atol=1e-3)


def test_a_run_costs_one_forward_pass(make_engine):
    engine = make_engine()
    branch = engine.prompt(TEXT).constrain(Regex("[ab]" + "c" * 40 + "[de]"))
    before = engine.stats()
    (result,) = engine.complete([branch], DRAWN)
    after = engine.stats()
    assert len(result.token_ids) == 42
    assert after.steps - before.steps <= 3
    assert after.tokens_generated - before.tokens_generated == 42
    assert after.tokens_forced >= 38
    assert None not in branch.logprobs[-42:]


@pytest.mark.parametrize("most", [1, 2, 3, 7, 20, 41, 42])
def test_max_tokens_cuts_a_run(make_engine, most):
    engine = make_engine()
    root = engine.prompt(TEXT).constrain(Regex("[ab]" + "c" * 40 + "d"))
    (result,) = engine.complete(root.fork(), DRAWN.replace(max_tokens=most))
    assert len(result.token_ids) == len(result.logprobs) == most
    assert result.finish_reason == ("stop" if most == 42 else "length")


def test_the_context_cuts_a_run(make_engine):
    engine = make_engine(max_context=48)
    branch = engine.prompt(TEXT).constrain(Regex("[ab]" + "c" * 60))
    (result,) = engine.complete([branch], DRAWN)
    assert (result.finish_reason, branch.num_tokens) == ("context_full", 48)


@pytest.mark.parametrize(("stop", "ids"), [(("ccc",), ()), ((), ("c",))])
def test_a_stop_inside_a_run_ends_the_branch_there(make_engine, stop, ids):
    engine = make_engine()
    branch = engine.prompt(TEXT).constrain(Regex("[ab]" + "c" * 40))
    ids = [engine.tokenizer.encode(char)[0] for char in ids]
    (result,) = engine.complete([branch], DRAWN.replace(stop=stop, stop_token_ids=ids))
    assert result.finish_reason == "stop"
    assert result.text[1:] == ("ccc" if stop else "c")


def test_penalties_count_forced_tokens(make_engine):
    params = DRAWN.replace(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2)
    _, events = _run(make_engine, forcing=True, params=params)
    _, expected = _run(make_engine, forcing=False, params=params)
    assert events == expected


def test_runs_longer_than_a_step_are_computed_in_parts(make_engine):
    small = {"max_batch_tokens": 16, "prefill_chunk": 8}
    _, events = _run(make_engine, forcing=True, **small)
    _, expected = _run(make_engine, forcing=False)
    assert [[e[0] for e in row] for row in events] == [[e[0] for e in row] for row in expected]
    for ours, theirs in zip(events, expected, strict=True):
        assert np.allclose([e[1] for e in ours], [e[1] for e in theirs], atol=1e-4)


def test_without_pages_for_a_run_the_branch_goes_on_token_by_token(make_engine):
    engine = make_engine(num_pages=4, prefix_cache=False)
    branch = engine.prompt(TEXT).constrain(Regex("[ab]" + "c" * 90))
    (result,) = engine.complete([branch], DRAWN.replace(max_tokens=200))
    assert result.finish_reason == "out_of_pages"
    assert branch.num_tokens == 4 * 16
    engine.check_integrity()


def test_forks_made_while_a_run_is_on_its_way_hold_the_same_tokens(make_engine):
    engine = make_engine(deterministic=True)
    root = engine.prompt(TEXT).constrain(RECORD)
    branch, forks = root.fork()[0], []
    job = engine.submit([branch], DRAWN, on_event=lambda e: forks.append(e.branch.fork()[0]))
    (whole,) = job.result()
    start = root.num_tokens
    for fork in forks:
        held = fork.token_ids[start:]
        assert held == whole.token_ids[: len(held)]
    for result in engine.complete([f for f in forks if not f.is_complete], DRAWN):
        assert result.finish_reason == "stop"
    engine.check_integrity()
