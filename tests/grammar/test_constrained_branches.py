"""Branch.constrain: what branches generate, and what forks, rollbacks and texts make of it."""

from __future__ import annotations

import json
import re
import threading

import numpy as np
import pytest

from dendrite_engine import SamplingParams
from dendrite_engine.errors import GrammarError, InvalidArgument, InvalidGrammar, StaleBranch
from dendrite_engine.grammar import Choice, JsonSchema, Lark, Regex, grammar_from_dict
from tiny_models import VOCAB

TEXT = "a prompt of some length, longer than one page of tokens: "
GREEDY = SamplingParams(max_tokens=24)
DRAWN = SamplingParams(temperature=1.0, max_tokens=40)
PERSON = JsonSchema(
    {
        "type": "object",
        "properties": {
            "name": {"enum": ["ada", "alan", "grace"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
DATE = Regex("[0-9]{4}-[01][0-9]-[0-3][0-9]")
EOS = VOCAB - 1


def _root(engine, grammar, text=TEXT):
    return engine.prompt(text).constrain(grammar)


def _texts(engine, branches, params=DRAWN):
    results = engine.complete(branches, params)
    assert [result.error for result in results] == [None] * len(results)
    return [result.text for result in results], [result.finish_reason for result in results]


@pytest.mark.parametrize(
    "pattern", ["[a-f]{3,7}", "(yes|no)( and (yes|no)){0,2}", "x*y", "[^q]{5}"]
)
def test_every_sample_matches_its_expression(make_engine, pattern):
    engine = make_engine()
    texts, reasons = _texts(engine, _root(engine, Regex(pattern)).fork(16))
    for text, reason in zip(texts, reasons, strict=True):
        if reason != "length":
            assert re.fullmatch(pattern, text.replace("\ufffd", "?"))
    assert set(reasons) <= {"stop", "eos", "length"}
    assert reasons.count("length") < 16


@pytest.mark.parametrize("device", ["cpu", "cuda-twin"])
@pytest.mark.parametrize("grammar", [DATE, Choice(["alpha", "alphabet", "beta"])], ids=str)
def test_both_constraint_engines_give_the_same_tokens(make_engine, grammar, device):
    kind = "llama" if device == "cpu" else "llama-wide"
    engine = make_engine(kind, device=device, dtype="float32")
    root = engine.prompt(TEXT)
    found = {}
    for name in ("llguidance", "reference"):
        branch = root.fork()[0].constrain(grammar, engine=name)
        branch._key = 77  # the same draws for both
        (result,) = engine.complete([branch], DRAWN)
        assert result.finish_reason in ("stop", "eos")
        found[name] = (result.token_ids, result.logprobs)
    assert found["llguidance"][0] == found["reference"][0]
    assert found["llguidance"][1] == pytest.approx(found["reference"][1], abs=1e-4)


def test_passes_launched_ahead_wait_for_the_masks_before_they_are_sampled(make_engine):
    """On the device path the next pass runs before anybody knows the token that it computes."""
    found = {}
    for device in ("cpu", "cuda-twin"):
        engine = make_engine("llama-wide", device=device, dtype="float32", debug=False)
        root = engine.prompt(TEXT)
        branches = root.fork(5)
        for branch in branches[:3]:
            branch.constrain(Regex("([a-z]|[0-9]){30}"))
        results = engine.complete(branches, DRAWN.replace(ignore_eos=True))
        found[device] = [(r.token_ids, r.finish_reason) for r in results]
        if device != "cpu":
            passes = engine._loop._forward
            assert passes.num_ahead - passes.num_in_vain > 20
    assert found["cpu"] == found["cuda-twin"]
    assert [reason for _, reason in found["cpu"]] == ["stop"] * 3 + ["length"] * 2


def test_json_is_complete_and_valid(make_engine):
    engine = make_engine()
    texts, reasons = _texts(engine, _root(engine, PERSON).fork(8))
    assert reasons == ["stop"] * 8
    for text in texts:
        person = json.loads(text)
        assert set(person) == {"name", "age"}
        assert person["name"] in ("ada", "alan", "grace")
        assert 0 <= person["age"] <= 120


def test_a_context_free_grammar_is_obeyed(make_engine):
    engine = make_engine()
    grammar = Lark('start: "(" start ")" | "x"')
    texts, reasons = _texts(engine, _root(engine, grammar).fork(8), DRAWN.replace(max_tokens=200))
    for text, reason in zip(texts, reasons, strict=True):
        depth = text.count("(")
        assert reason == "length" or text == "(" * depth + "x" + ")" * depth


def test_siblings_without_a_grammar_get_the_tokens_they_would_get_alone(make_engine):
    engine = make_engine(deterministic=True)
    free = engine.prompt(TEXT).fork(2)
    (alone, other) = engine.complete(free, DRAWN)
    again = [engine.prompt(TEXT) for _ in range(2)]
    for branch, twin in zip(again, free, strict=True):
        branch._key = twin.path_key
    guided = _root(engine, PERSON).fork(5)
    results = engine.complete([guided[0], again[0], *guided[1:], again[1]], DRAWN)
    for result, expected in ((results[1], alone), (results[-1], other)):
        assert result.token_ids == expected.token_ids
        assert result.logprobs == expected.logprobs


# -- ends -------------------------------------------------------------------------------------


def test_a_grammar_that_is_complete_ends_its_branch_without_another_token(make_engine):
    engine = make_engine()
    branch = _root(engine, Choice(["ab", "cd"]))
    (result,) = engine.complete([branch], DRAWN)
    assert (result.finish_reason, len(result.token_ids)) == ("stop", 2)
    assert branch.is_complete
    assert branch.accepting
    (again,) = engine.complete([branch], DRAWN)
    assert (again.finish_reason, again.token_ids, again.error) == ("stop", [], None)


def test_the_end_of_turn_ends_a_text_that_could_go_on(make_engine):
    engine = make_engine()
    branches = _root(engine, Regex("a*")).fork(6)
    bias = SamplingParams(temperature=1.0, max_tokens=30, logit_bias={EOS: 3.0})
    results = engine.complete(branches, bias)
    assert {result.finish_reason for result in results} == {"eos"}
    assert all(branch.accepting and branch.is_complete for branch in branches)
    assert all(set(result.text) <= {"a"} for result in results)


def test_an_ignored_end_of_turn_still_completes_the_grammar(make_engine):
    engine = make_engine()
    params = SamplingParams(max_tokens=30, logit_bias={EOS: 50.0}, ignore_eos=True)
    (result,) = engine.complete([_root(engine, Regex("a*"))], params)
    assert (result.finish_reason, result.token_ids) == ("stop", [EOS])


def test_max_tokens_cuts_a_text_and_the_branch_goes_on_from_there(make_engine):
    engine = make_engine()
    branch = _root(engine, PERSON)
    parts = []
    for _ in range(60):
        (result,) = engine.complete([branch], DRAWN.replace(max_tokens=3))
        parts.append(result.text)
        assert len(result.token_ids) <= 3
        if result.finish_reason != "length":
            break
        assert not branch.accepting
    assert result.finish_reason == "stop"
    assert json.loads("".join(parts))["name"] in ("ada", "alan", "grace")


def test_a_stop_text_ends_the_branch_inside_the_grammar(make_engine):
    engine = make_engine()
    (result,) = engine.complete([_root(engine, PERSON)], DRAWN.replace(stop=["age"]))
    assert result.finish_reason == "stop"
    assert result.text.endswith("age")


# -- forks, rollbacks, text -------------------------------------------------------------------


@pytest.mark.parametrize("grammar", [PERSON, DATE, Lark('start: ("ab" | "c")+ "."')], ids=str)
def test_a_fork_anywhere_goes_on_as_the_same_tokens_run_alone(make_engine, grammar):
    engine = make_engine(deterministic=True)
    trunk = _root(engine, grammar)
    start = trunk.num_tokens
    engine.complete([trunk], DRAWN.replace(max_tokens=12))
    positions = range(start, trunk.num_tokens + 1)
    forks = [trunk.fork(at=at)[0] for at in positions]
    forked = engine.complete(forks, GREEDY)
    alone = make_engine(deterministic=True, prefix_cache=False)
    for at, result in zip(positions, forked, strict=True):
        branch = alone.prompt(trunk.token_ids[:at]).constrain(grammar, at=start)
        (linear,) = alone.complete([branch], GREEDY)
        assert (result.token_ids, result.logprobs) == (linear.token_ids, linear.logprobs), at
        assert result.finish_reason == linear.finish_reason


def test_forks_share_the_matcher_until_their_first_token(make_engine, monkeypatch):
    from dendrite_engine.grammar.llguidance import LlgMatcher

    copies = []
    real = LlgMatcher.fork
    monkeypatch.setattr(LlgMatcher, "fork", lambda self: copies.append(1) or real(self))
    engine = make_engine()
    root = _root(engine, DATE)
    copies.clear()
    forks = root.fork(40)
    deep = forks[0].fork(5)[0].fork(5)
    assert copies == []
    engine.complete([forks[1], forks[2], deep[0]], GREEDY)
    assert len(copies) == 3


@pytest.mark.parametrize("grammar", [PERSON, DATE], ids=str)
def test_rolling_back_any_number_of_tokens_and_going_on_gives_the_same_text(make_engine, grammar):
    engine = make_engine()
    branch = _root(engine, grammar)
    start = branch.num_tokens
    (whole,) = engine.complete([branch], GREEDY)
    for back in range(1, len(whole.token_ids) + 1):
        branch.rollback(back)
        assert not branch.is_complete
        left = GREEDY.replace(max_tokens=back)
        (rest,) = engine.complete([branch], left)
        assert branch.token_ids[start:] == whole.token_ids
        assert rest.token_ids == whole.token_ids[-back:]


def test_a_branch_cut_before_its_grammar_starts_keeps_it_from_the_cut(make_engine):
    engine = make_engine()
    branch = _root(engine, Choice(["ab", "cd"]))
    start = branch.num_tokens
    early = branch.fork(at=start - 5)[0]
    assert early.grammar_start == start - 5
    branch.extend("a")
    branch.rollback(4)
    assert branch.grammar_start == start - 3
    for result in engine.complete([early, branch], GREEDY):
        assert result.text in ("ab", "cd")


def test_appended_text_is_read_by_the_grammar(make_engine):
    engine = make_engine()
    branch = _root(engine, Choice(["apple pie", "apple tart", "bread"]))
    branch.extend("apple ")
    assert set(branch.allowed_tokens().tolist()) == {
        engine.tokenizer.encode(char)[0] for char in "pt"
    }
    (result,) = engine.complete([branch], GREEDY)
    assert result.text in ("pie", "tart")


def test_text_that_the_grammar_forbids_is_not_appended(make_engine):
    engine = make_engine()
    branch = _root(engine, Choice(["apple", "bread"]))
    held = branch.token_ids
    with pytest.raises(GrammarError, match=f"position {len(held) + 2}"):
        branch.extend("apxle")
    assert branch.token_ids == held
    (result,) = engine.complete([branch], GREEDY)
    assert result.text in ("apple", "bread")


def test_forks_of_a_generating_branch_obey_its_grammar(make_engine):
    engine = make_engine()
    branch = _root(engine, Regex("[a-z]{30}"))
    forks, lock = [], threading.Lock()

    def fork(event):
        with lock:
            forks.append(event.branch.fork()[0])

    engine.submit([branch], DRAWN, on_event=fork).result()
    start = branch.grammar_start
    engine.complete([b for b in forks if not b.is_complete], DRAWN)
    for fork_ in forks:
        assert re.fullmatch("[a-z]{30}", engine.tokenizer.decode(fork_.token_ids[start:]))


def test_lifting_a_grammar_frees_the_branch_and_not_its_forks(make_engine):
    engine = make_engine()
    branch = _root(engine, Choice(["ab"]))
    child = branch.fork()[0]
    assert branch.constrain(None).grammar is None
    results = engine.complete([branch, child], SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(results[0].token_ids) == 5
    assert results[1].text == "ab"


def test_a_new_grammar_replaces_the_old_one_from_here_on(make_engine):
    engine = make_engine()
    branch = _root(engine, Choice(["ab"]))
    engine.complete([branch], GREEDY)
    branch.constrain(Choice(["cd"]))
    assert engine.complete([branch], GREEDY)[0].text == "cd"
    assert branch.text.endswith("abcd")


# -- what can be asked ------------------------------------------------------------------------


def test_allowed_tokens_alternatives_and_top_tokens_agree(make_engine):
    engine = make_engine()
    branch = _root(engine, Regex("(ab|cde|x)yz"))
    allowed = branch.allowed_tokens()
    assert [engine.tokenizer.piece(int(t)) for t in allowed] == ["a", "c", "x"]
    assert allowed.dtype == np.int32
    (top,) = engine.top_tokens([branch], 50)
    assert {t.token_id for t in top} == set(allowed.tolist())
    assert [t.logprob for t in top] == sorted((t.logprob for t in top), reverse=True)
    free = {t.token_id: t.logprob for t in engine.top_tokens([engine.prompt(TEXT)], VOCAB)[0]}
    for token in top:
        assert token.logprob == pytest.approx(free[token.token_id], abs=1e-5)
    texts = [engine.tokenizer.decode(ids) for ids in branch.alternatives()]
    assert [text[0] for text in texts] == ["a", "c", "x"]
    assert all(any(w.startswith(t) for w in ("abyz", "cdeyz", "xyz")) for t in texts)


def test_alternatives_of_a_choice_are_the_options_that_are_left(make_engine):
    engine = make_engine()
    branch = _root(engine, Choice(["red", "ready", "blue"]))
    decode = engine.tokenizer.decode
    assert [decode(ids) for ids in branch.alternatives()] == ["red", "ready", "blue"]
    branch.extend("re")
    assert [decode(ids) for ids in branch.alternatives()] == ["d", "ady"]
    for ids in branch.alternatives():
        branch.fork()[0].extend(ids)
    with pytest.raises(InvalidArgument, match="2, more than the limit of 1"):
        branch.alternatives(limit=1)
    branch.extend("d")
    assert branch.alternatives() == []


def test_a_branch_without_a_grammar_says_so(make_engine):
    engine = make_engine()
    branch = engine.prompt(TEXT)
    assert (branch.grammar, branch.grammar_start, branch.accepting) == (None, None, True)
    assert not branch.is_complete
    for ask in (branch.allowed_tokens, branch.alternatives):
        with pytest.raises(InvalidArgument, match="has no grammar"):
            ask()


def test_a_stored_grammar_restores_the_state_of_a_branch(make_engine):
    engine = make_engine()
    branch = _root(engine, PERSON)
    engine.complete([branch], DRAWN.replace(max_tokens=14))
    stored = json.loads(json.dumps([branch.grammar.to_dict(), branch.grammar_start]))
    other = make_engine()
    copy = other.prompt(branch.token_ids).constrain(grammar_from_dict(stored[0]), at=stored[1])
    assert copy.allowed_tokens().tolist() == branch.allowed_tokens().tolist()
    results = [e.complete([b], GREEDY)[0].token_ids for e, b in ((engine, branch), (other, copy))]
    assert results[0] == results[1]


@pytest.mark.parametrize("at", [0, -1, 10_000, True, "3"])
def test_a_start_outside_the_branch_is_refused(make_engine, at):
    branch = make_engine().prompt(TEXT)
    with pytest.raises(InvalidArgument, match="at must be a position"):
        branch.constrain(DATE, at=at)


def test_tokens_that_are_there_have_to_satisfy_the_grammar(make_engine):
    branch = make_engine().prompt(TEXT)
    with pytest.raises(GrammarError, match="position 3"):
        branch.constrain(Regex("p*"), at=3)
    assert branch.grammar is None


@pytest.mark.parametrize("grammar", ["[a-z]", {"type": "object"}, 7, Regex])
def test_only_grammars_can_be_attached(make_engine, grammar):
    branch = make_engine().prompt(TEXT)
    with pytest.raises(InvalidGrammar, match="JsonSchema, Regex, Lark or Choice"):
        branch.constrain(grammar)
    assert branch.grammar is None


def test_pruned_and_generating_branches_refuse_a_grammar(make_engine):
    engine = make_engine()
    branch = engine.prompt(TEXT)
    asked = []

    def constrain(event):
        try:
            event.branch.constrain(DATE)
        except InvalidArgument as error:
            asked.append(str(error))

    engine.submit([branch], GREEDY, on_event=constrain).result()
    assert asked
    assert "is generating" in asked[0]
    branch.prune()
    with pytest.raises(StaleBranch):
        branch.constrain(DATE)
    with pytest.raises(StaleBranch):
        branch.allowed_tokens()
