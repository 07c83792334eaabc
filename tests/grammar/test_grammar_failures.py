"""What goes wrong with one branch's grammar concerns that branch only."""

from __future__ import annotations

import math
import threading

import pytest
from faulty_engine import FaultyEngine

from dendrite_engine import SamplingParams
from dendrite_engine.config import GrammarLimits
from dendrite_engine.errors import DeadEnd, GrammarError, InvalidGrammar
from dendrite_engine.grammar import CONSTRAINTS, Choice, JsonSchema, Lark, Regex

TEXT = "some prompt "
PARAMS = SamplingParams(temperature=1.0, max_tokens=8)
QUICK = GrammarLimits(mask_seconds=0.05, compile_seconds=0.2)


@pytest.fixture(autouse=True)
def _faulty(monkeypatch):
    """The faulty engine is known while a test runs, and nothing of it hangs on behind."""
    CONSTRAINTS.register("faulty", "faulty_engine:FaultyEngine")
    FaultyEngine.released = threading.Event()
    yield
    FaultyEngine.released.set()
    FaultyEngine.fault = "error"
    CONSTRAINTS._entries.pop("faulty")


def _family(engine):
    """Two free branches, two with a good grammar and, in between, one with the bad one."""
    root = engine.prompt(TEXT)
    free = root.fork(2)
    good = [branch.constrain(Regex("[a-z]+"), engine="faulty") for branch in root.fork(2)]
    (bad,) = root.fork(1)
    return bad.constrain(Regex("b[a-z]+"), engine="faulty"), [free[0], good[0], good[1], free[1]]


@pytest.mark.parametrize("device", ["cpu", "cuda-twin"])
@pytest.mark.parametrize(
    ("fault", "reason", "said"),
    [
        ("error", "grammar_error", "fuel exhausted"),
        ("empty", "dead_end", "allows no token"),
        ("raise", "grammar_error", "wrong mask size"),
        ("panic", "grammar_error", "num_parents"),
        ("accept panic", "grammar_error", "while reading"),
        ("forced panic", "grammar_error", "while looking ahead"),
        ("hang", "grammar_error", "within 0.05 s"),
    ],
)
def test_a_matcher_that_fails_ends_its_branch_only(make_engine, fault, reason, said, device):
    def run(fault: str):
        FaultyEngine.fault = fault
        options = {"deterministic": True, "grammar_limits": QUICK, "dtype": "float32"}
        engine = make_engine("llama-wide", device=device, **options)
        bad, others = _family(engine)
        first, second, *rest = others
        results = engine.complete([first, second, bad, *rest], PARAMS)
        kept = [(r.token_ids, r.logprobs, r.finish_reason) for r in results if r.branch is not bad]
        return engine, kept, results[2]

    _, expected, _ = run("none")
    engine, found, result = run(fault)
    bad = result.branch
    assert found == expected, "siblings are bitwise unaffected"
    assert result.finish_reason == reason
    assert said in str(result.error)
    assert isinstance(result.error, GrammarError)
    assert f"branch {bad.id}" in str(result.error)
    FaultyEngine.released.set()
    assert bad.constrain(None).rollback(1) == 0
    assert engine.complete([bad], PARAMS)[0].finish_reason == "length"


def test_the_branch_that_failed_keeps_the_tokens_it_was_given(make_engine):
    engine = make_engine()
    bad, _ = _family(engine)
    held = bad.num_tokens
    (result,) = engine.complete([bad], PARAMS)
    assert (result.finish_reason, len(result.token_ids)) == ("grammar_error", 2)
    assert bad.token_ids[held:] == result.token_ids
    assert result.text.startswith("b")
    errors = [event for event in engine.trace if event.kind == "error"]
    assert "fuel exhausted" in errors[-1].data["error"]


def test_a_grammar_that_logit_bias_leaves_nothing_of_is_a_dead_end(make_engine):
    engine = make_engine()
    root = engine.prompt(TEXT)
    bias = {engine.tokenizer.encode(char)[0]: -math.inf for char in "bd"}
    dead, other = (root.fork()[0].constrain(g) for g in (Regex("a[bd]c"), Regex("a[bdx]c")))
    results = engine.complete([dead, other], PARAMS.replace(logit_bias=bias))
    assert (results[0].finish_reason, results[0].text) == ("dead_end", "a")
    assert isinstance(results[0].error, DeadEnd)
    assert (results[1].finish_reason, results[1].text) == ("stop", "axc")


def test_logits_that_are_not_finite_are_not_blamed_on_the_grammar(make_engine):
    engine = make_engine("mistral", debug=False)
    branch = engine.prompt(TEXT).constrain(Regex("[a-z]+"))
    branch.extend("q")
    token = engine.tokenizer.encode("q")[0]
    embedding = engine._parts.runner.model.embedding
    good = embedding[token].clone()
    embedding[token] = math.nan
    (result,) = engine.complete([branch], PARAMS)
    embedding[token] = good
    assert (result.finish_reason, result.token_ids) == ("numeric_error", [])


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        (Regex("(a"), "regex"),
        (Regex("(?=a)b"), "regex"),
        (Lark("start: nobody"), "unknown name"),
        (Lark("start: start"), "no text satisfies it"),
        (JsonSchema({"type": "strang"}), "json"),
        (JsonSchema("{"), "no JSON"),
        (JsonSchema(False), "json"),
        (JsonSchema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "json"),
    ],
    ids=str,
)
def test_a_grammar_that_is_refused_leaves_nothing_behind(make_engine, grammar, said):
    engine = make_engine()
    branch = engine.prompt(TEXT).constrain(Choice(["ab", "cd"]))
    before, cached = engine.core.dump(), engine.grammars.cached_bytes
    with pytest.raises(InvalidGrammar, match=said):
        branch.constrain(grammar)
    assert engine.core.dump() == before
    assert engine.grammars.cached_bytes == cached
    assert branch.grammar == Choice(["ab", "cd"])
    assert engine.complete([branch], PARAMS)[0].text in ("ab", "cd")


@pytest.mark.parametrize(
    ("fault", "said"),
    [("slow compile", "not compiled after"), ("compile panic", "the compiler is broken")],
)
def test_a_compiler_that_hangs_or_breaks_is_a_refusal(make_engine, fault, said):
    engine = make_engine(grammar_limits=QUICK)
    FaultyEngine.fault = fault
    branch = engine.prompt(TEXT)
    with pytest.raises(InvalidGrammar, match=said):
        branch.constrain(Regex("[a-z]+"), engine="faulty")
    assert branch.grammar is None
    FaultyEngine.released.set()
    FaultyEngine.fault = "none"
    assert branch.constrain(Regex("[a-z]+"), engine="faulty").grammar is not None


def test_compilers_that_hang_do_not_pile_up(make_engine):
    engine = make_engine(grammar_limits=GrammarLimits(compile_seconds=0.02))
    FaultyEngine.fault = "slow compile"
    branch, said = engine.prompt(TEXT), []
    for i in range(6):
        with pytest.raises(InvalidGrammar) as refused:
            branch.constrain(Regex(f"a{{{i}}}"), engine="faulty")
        said.append(str(refused.value))
    assert sum("not compiled after" in text for text in said) == 4
    assert "still being compiled" in said[-1]


def test_forced_tokens_of_a_lane_that_is_cancelled_are_taken_back(make_engine):
    engine = make_engine()
    branch = engine.prompt(TEXT).constrain(Regex("[ab]" + "c" * 30 + "d"))
    held, seen = branch.num_tokens, []

    def cancel(event):
        seen.append(event)
        if event.token_id is not None:
            job.cancel()

    ready, long = threading.Event(), PARAMS.replace(max_tokens=99)
    job = engine.submit([branch], long, on_event=lambda event: (ready.wait(), cancel(event)))
    ready.set()
    (result,) = job.result()
    assert result.finish_reason in ("cancelled", "stop")
    assert branch.token_ids[held:] == result.token_ids
    assert branch.logprobs[held:] == result.logprobs
    (rest,) = engine.complete([branch], long)
    assert rest.finish_reason == "stop"
    assert len(result.text + rest.text) == 32
