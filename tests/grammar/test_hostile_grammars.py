"""Grammars made to hurt: each is refused or finished within a second, and harms no sibling."""

from __future__ import annotations

import random
import time

import pytest
from hostile_grammars import hostile_grammars

from dendrite_engine import SamplingParams
from dendrite_engine.errors import DendriteError

CASES = list(hostile_grammars())
LIMIT_S = 1.0
PARAMS = SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True)
EXPECTED_ENDS = {"stop", "eos", "length", "dead_end", "grammar_error"}


def test_there_are_hundreds_of_them_in_many_families():
    assert len(CASES) >= 200
    assert len({name.rstrip("0123456789") for name, _ in CASES}) >= 90


@pytest.fixture(scope="module")
def shared(tiny_model):
    """One engine for all, a root, and the tokens of a branch that runs alone."""
    from dendrite_engine import Engine

    engine = Engine.from_pretrained(tiny_model("llama"), num_pages=256, deterministic=True)
    root = engine.prompt("the siblings of hostile grammars go on ")
    yield engine, root, _sibling(engine, root, None)
    engine.prune_all()
    engine.check_integrity()
    assert engine.stats().pages_live == 0
    engine.close()


def _sibling(engine, root, grammar):
    """Tokens and log-probabilities of a free branch, beside one with a grammar if there is one."""
    free, guided = root.fork(2)
    free._key = 99  # the same draws each time
    branches = [free]
    try:
        if grammar is not None:
            guided.constrain(grammar)
            branches.append(guided)
        first, *others = engine.complete(branches, PARAMS)
        for other in others:
            assert other.finish_reason in EXPECTED_ENDS
            assert (other.error is None) == (other.finish_reason in ("stop", "eos", "length"))
        return first.token_ids, first.logprobs
    finally:
        free.prune()
        guided.prune()


def _attempt(make, engine, root, expected) -> float:
    """Seconds from the grammar's making to the end of its branch, or to its refusal."""
    started = time.perf_counter()
    try:
        found = _sibling(engine, root, make())
    except DendriteError:
        found = None
    seconds = time.perf_counter() - started
    assert found in (None, expected), "a sibling got other tokens"
    return seconds


@pytest.mark.parametrize(("name", "make"), CASES, ids=[name for name, _ in CASES])
def test_a_hostile_grammar_is_refused_or_finished_within_a_second(shared, name, make):
    """The fastest of three attempts counts: what hangs, hangs each time."""
    engine, root, expected = shared
    for _ in range(3):
        seconds = _attempt(make, engine, root, expected)
        if seconds <= LIMIT_S:
            break
    assert seconds <= LIMIT_S, f"{name} took {seconds:.2f} s"
    assert _sibling(engine, root, None) == expected


def test_random_bytes_are_refused_or_obeyed(shared):
    engine, root, expected = shared
    rng = random.Random(7)
    from dendrite_engine.grammar import JsonSchema, Lark, Regex

    signs = '()[]{}|*+?.\\^$"/:,~&%<>-ab1 \n'
    for kind in (Regex, Lark, JsonSchema):
        for _ in range(60):
            text = "".join(rng.choice(signs) for _ in range(rng.randint(1, 40)))
            source = f"start: {text}" if kind is Lark else text
            assert _attempt(lambda s=source, k=kind: k(s), engine, root, expected) < 5 * LIMIT_S
