"""llguidance against the plain Python twin: masks, ends, forks and rollbacks on random walks."""

from __future__ import annotations

import random

import numpy as np
import pytest
from toy_vocabulary import ToyVocabulary

from dendrite_engine.config import GrammarLimits
from dendrite_engine.errors import InvalidGrammar
from dendrite_engine.grammar import CONSTRAINTS, Choice, JsonSchema, Lark, Regex
from dendrite_engine.grammar.guide import allowed_ids

GRAMMARS = [
    Regex("(ab|a)c*"),
    Regex("[a-c]{2,4}"),
    Regex("x{0,9}(yes|no)+"),
    Regex(r"[0-9]+(\.[0-9]{1,2})?"),
    Regex("(a|b)*abb"),
    Regex("[^x]{1,3}"),
    Regex(".{2}"),
    Regex("a?b?c?(12|1|2)"),
    Regex("(0|00|000)1"),
    Regex("[a-z]+ (no|on)"),
    Choice(["yes", "no", "yes or no", "ye"]),
    Choice(["ab", "abc", "abcd", "b"]),
    Choice(["été", "ét", "日本"]),
]


@pytest.fixture(scope="module")
def vocabulary():
    return ToyVocabulary()


@pytest.fixture(scope="module")
def engines(vocabulary):
    return {
        name: CONSTRAINTS.get(name)(vocabulary, GrammarLimits()) for name in CONSTRAINTS.names()
    }


def _mask(engine, matcher) -> np.ndarray:
    out = np.full((3, engine.words), 123, np.int32)
    engine.fill([matcher.fork()], [1], out)
    assert (out[[0, 2]] == 123).all(), "rows that nobody asked for were written"
    return allowed_ids(out[1], engine.vocabulary.size)


def _is_forced(vocabulary, matcher) -> bool:
    """Whether llguidance narrows the mask to the tokenizer's own way to cut a forced text."""
    return bool(matcher.forced()) or bool(matcher.raw.compute_ff_bytes())


def _same(vocabulary, engines, fast, twin) -> set[int]:
    """Compare two matchers; returns what may come next."""
    assert fast.is_accepting == twin.is_accepting
    assert fast.is_finished == twin.is_finished
    if fast.is_finished:
        return set()
    ours = set(_mask(engines["llguidance"], fast).tolist())
    theirs = set(_mask(engines["reference"], twin).tolist())
    if _is_forced(vocabulary, fast):
        assert ours
        assert ours <= theirs
    else:
        assert ours == theirs
    return ours


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.source)
def test_masks_and_ends_are_those_of_the_twin_along_random_texts(vocabulary, engines, grammar):
    rng = random.Random(grammar.source)
    for _ in range(12):
        fast, twin = (engines[name].compile(grammar) for name in ("llguidance", "reference"))
        for _ in range(14):
            allowed = _same(vocabulary, engines, fast, twin)
            if fast.is_finished:
                break
            token = rng.choice(sorted(allowed))
            assert fast.accept([token]) == twin.accept([token]) == 1


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.source)
def test_tokens_that_the_mask_lacks_are_refused_and_change_nothing(vocabulary, engines, grammar):
    for name in ("llguidance", "reference"):
        matcher = engines[name].compile(grammar)
        before = _mask(engines[name], matcher)
        for token in sorted(set(range(vocabulary.size)) - set(before.tolist()))[::9]:
            if name == "llguidance" and _is_forced(vocabulary, matcher):
                break  # the mask is narrower than the grammar here
            assert matcher.accept([token]) == 0
        assert matcher.error == ""
        assert np.array_equal(_mask(engines[name], matcher), before)


@pytest.mark.parametrize("name", CONSTRAINTS.names())
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda g: g.source)
def test_forks_go_on_alone_and_rollbacks_come_back(vocabulary, engines, grammar, name):
    engine, rng = engines[name], random.Random(5)
    matcher, masks, read = engine.compile(grammar), [], []
    while len(read) < 9 and not matcher.is_finished:
        masks.append(_mask(engine, matcher))
        fork = matcher.fork()
        assert fork.accept([int(masks[-1][0])]) == 1
        token = int(rng.choice(masks[-1]))
        assert matcher.accept([token]) == 1
        read.append(token)
    for back in range(1, len(read) + 1):
        fork = matcher.fork()
        assert fork.rollback(back)
        assert np.array_equal(_mask(engine, fork), masks[len(read) - back])
        assert fork.accept(read[len(read) - back :]) == back
        assert fork.is_finished == matcher.is_finished


@pytest.mark.parametrize("name", CONSTRAINTS.names())
@pytest.mark.parametrize("pattern", ["ab", "a*b?"])
def test_the_end_of_a_turn_is_read_once_behind_a_complete_text(vocabulary, engines, name, pattern):
    matcher = engines[name].compile(Regex(pattern))
    text, eos = vocabulary.encode("ab"), list(vocabulary.eos_ids)
    assert matcher.accept(eos) == (pattern == "a*b?")
    matcher = engines[name].compile(Regex(pattern))
    assert matcher.accept([*text, *eos, *eos]) == len(text) + 1
    assert (matcher.is_finished, matcher.is_accepting, matcher.error) == (True, True, "")
    assert matcher.fork().accept(text) == 0
    fork = matcher.fork()
    assert fork.rollback(1)
    assert fork.accept(eos) == 1
    assert matcher.rollback(1 + len(text))
    assert not matcher.is_finished
    assert matcher.accept(text) == len(text)


@pytest.mark.parametrize("name", CONSTRAINTS.names())
def test_forced_tokens_are_allowed_and_spell_the_text_without_a_choice(vocabulary, engines, name):
    matcher = engines[name].compile(Regex("(a|b)xxxxyes12(c|d)"))
    assert matcher.accept([vocabulary.encode("a")[0]]) == 1
    run = matcher.forced()
    assert len(run) >= 2
    assert b"xxxxyes12".startswith(vocabulary.text(run))
    assert run == vocabulary.encode("xxxxyes12")[: len(run)], "cut as the tokenizer cuts it"
    for token in run:
        assert token in _mask(engines[name], matcher)
        assert matcher.accept([token]) == 1


def test_masks_of_several_matchers_are_those_of_each_alone(engines):
    engine = engines["llguidance"]
    matchers = [engine.compile(grammar) for grammar in GRAMMARS]
    out = np.zeros((len(matchers) + 2, engine.words), np.int32)
    rows = list(range(len(matchers), 0, -1))
    engine.fill([m.fork() for m in matchers], rows, out)
    for matcher, row in zip(matchers, rows, strict=True):
        assert np.array_equal(allowed_ids(out[row], engine.vocabulary.size), _mask(engine, matcher))
    assert not out[0].any()
    assert not out[-1].any()


@pytest.mark.parametrize("name", CONSTRAINTS.names())
@pytest.mark.parametrize("bad", [Regex("(a"), Regex("a**)"), Regex("[b-"), Regex("(?=a)b")])
def test_malformed_expressions_are_refused(engines, name, bad):
    with pytest.raises(InvalidGrammar):
        engines[name].compile(bad)


@pytest.mark.parametrize("grammar", [Lark('start: "a"'), JsonSchema(True)])
def test_the_twin_says_what_it_does_not_know(engines, grammar):
    with pytest.raises(InvalidGrammar, match=grammar.kind):
        engines["reference"].compile(grammar)


def test_a_tokenizer_that_llguidance_can_not_read_is_wrapped(vocabulary, engines):
    class Unreadable(ToyVocabulary):
        def to_json(self) -> str:
            return '{"model": "of a kind that nobody knows"}'

    wrapped = CONSTRAINTS.get("llguidance")(Unreadable(), GrammarLimits())
    assert "wrapped" in wrapped.reason
    for grammar in GRAMMARS:
        ours, theirs = wrapped.compile(grammar), engines["llguidance"].compile(grammar)
        assert np.array_equal(_mask(wrapped, ours), _mask(engines["llguidance"], theirs))
