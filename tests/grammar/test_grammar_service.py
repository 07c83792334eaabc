"""Compiling: values, cache, limits, and the filler of masks."""

from __future__ import annotations

import json

import pytest
from toy_vocabulary import ToyVocabulary

from dendrite_engine.config import EngineConfig, GrammarLimits
from dendrite_engine.errors import InvalidArgument, InvalidGrammar, UnknownName
from dendrite_engine.grammar import Choice, JsonSchema, Lark, Regex, grammar_from_dict
from dendrite_engine.grammar.service import GrammarService, max_properties

GRAMMARS = [
    JsonSchema({"type": "integer"}),
    JsonSchema('{"type": "string"}', separators=(",", ":"), lenient=True),
    JsonSchema(True, whitespace=True),
    Regex("a+"),
    Lark('start: "a"'),
    Choice(["b", "a", "b", "é"]),
]


def _rules(n: int) -> str:
    """A grammar of n rules that nothing makes shorter."""
    rules = [f'r{i}: "a" r{i} "b" | "{i}"' for i in range(n)]
    return "\n".join(["start: " + " ".join(f'"{i}" r{i}' for i in range(n)), *rules])


def _service(**limits) -> GrammarService:
    return GrammarService(ToyVocabulary(), GrammarLimits(**limits))


@pytest.mark.parametrize("grammar", GRAMMARS, ids=str)
def test_grammars_are_values_that_survive_storage(grammar):
    stored = json.loads(json.dumps(grammar.to_dict()))
    assert grammar_from_dict(stored) == grammar
    assert hash(grammar_from_dict(stored)) == hash(grammar)


@pytest.mark.parametrize(
    "stored", [None, {}, {"kind": "regex"}, {"kind": "peg", "source": "a"}, {"kind": "choice",
    "source": "["}, {"kind": "regex", "source": 3}],
)  # fmt: skip
def test_stored_grammars_that_are_broken_are_refused(stored):
    with pytest.raises(InvalidGrammar):
        grammar_from_dict(stored)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Choice([]), lambda: Choice("abc"), lambda: Choice(["a", ""]),
        lambda: Choice(["a", 3]), lambda: Regex(""), lambda: Regex(None), lambda: Lark("\ud800"),
        lambda: JsonSchema([]), lambda: JsonSchema({"enum": {1, 2}}),
        lambda: JsonSchema({"maximum": float("nan")}),
        lambda: JsonSchema({}, separators=("x", ":")), lambda: JsonSchema({}, separators=","),
    ],
)  # fmt: skip
def test_what_is_no_grammar_can_not_be_made(make):
    with pytest.raises(InvalidGrammar):
        make()


def test_a_grammar_is_compiled_once():
    service = _service()
    first = service.compile(Regex("a+b"))
    assert service.compile(Regex("a+b")) is first
    assert service.compile(Regex("a+b"), "reference") is not first
    assert service.compile(JsonSchema(True)) is not service.compile(JsonSchema(True, lenient=True))
    assert service.num_cached == 4


def test_the_cache_drops_what_was_used_longest_ago_beyond_its_bytes():
    service = _service(cache_bytes="2MiB")
    first = service.compile(Regex("a0"))
    for i in range(1, 40):
        service.compile(Regex(f"a{i}"))
        assert service.compile(Regex("a0")) is first, "it was used just now"
        assert service.cached_bytes <= 2 << 20
    assert 5 < service.num_cached < 20
    service.compile(Choice([f"option {i}" for i in range(4000)]))  # larger than the cache
    assert service.compile(Regex("a0")) is first


@pytest.mark.parametrize(
    ("grammar", "limits", "said"),
    [
        (Regex("a" * 2000), {"source_bytes": 1000}, "2000 bytes: more than the limit of 1000"),
        (
            JsonSchema({"properties": {f"k{i}": {} for i in range(30)}}), {"properties": 20},
            "30 properties, more than the limit of 20",
        ),
        (Regex("(a?){60}a{60}[^b]{70}"), {"lexer_fuel": 50}, "too big .limit.*: 50"),
        (Lark(_rules(99)), {"symbols": 99}, "."),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value)[:30],
)  # fmt: skip
def test_limits_are_named_by_the_refusal(grammar, limits, said):
    service = _service(**limits)
    with pytest.raises(InvalidGrammar, match=said):
        service.compile(grammar)
    assert service.num_cached == 0


def test_a_limit_that_is_not_reached_refuses_nothing():
    service = _service(source_bytes=2000, properties=30)
    service.compile(Regex("a" * 2000))
    service.compile(JsonSchema({"properties": {f"k{i}": {} for i in range(30)}}))
    assert max_properties([{"a": {"b": 1, "c": 2}}, 7]) == 2


@pytest.mark.parametrize(
    "limits",
    [
        {"compile_seconds": 0}, {"mask_seconds": -1}, {"cache_bytes": "many"}, {"symbols": 0},
        {"threads": 0}, {"source_bytes": 0}, {"step_items": 1.5},
    ],
)  # fmt: skip
def test_limits_out_of_range_are_refused(limits):
    with pytest.raises(InvalidArgument):
        GrammarLimits(**limits)


def test_the_configuration_takes_limits_only():
    with pytest.raises(InvalidArgument, match="GrammarLimits"):
        EngineConfig(grammar_limits={"compile_seconds": 1})


def test_an_unknown_constraint_engine_lists_the_known_ones(make_engine):
    branch = make_engine().prompt("text")
    with pytest.raises(UnknownName, match="llguidance, reference"):
        branch.constrain(Regex("a"), engine="xgrammar")
    assert branch.grammar is None


def test_the_report_and_the_counters_show_what_runs(make_engine):
    engine = make_engine()
    assert engine.report()["grammar"].startswith("none yet")
    branch = engine.prompt("text").constrain(Regex("[a-z]{9}"))
    engine.complete([branch])
    stats = engine.stats()
    assert engine.report()["grammar"].startswith("llguidance: ")
    assert stats.grammars_cached == 1
    assert stats.mask_us_p50 > 0
    assert stats.mask_wait_us_p50 >= 0
