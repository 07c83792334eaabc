"""Diverse beam search equals a plain transcription of its paper, on a Markov chain."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from search_fakes import EOS, FakeEngine

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import BeamSearch, DiverseBeam, start_search

ENDLESS = -1e9


def run(engine, root, **options):
    result = start_search(engine, root, DiverseBeam(**options)).wait(60)
    engine.check_integrity()
    return result


def plain_diverse_beam(engine, prompt, width, groups, diversity, length):
    """Texts of every group, for chains that never end: all continuations ranked, no look-ups."""
    per_group = width // groups
    beams = [[(0.0, ())] for _ in range(groups)]
    for _ in range(length):
        chosen = Counter()
        for group in range(groups):
            rows = []
            for total, text in beams[group]:
                logprobs = engine.logprobs_after([*prompt, *text])
                for token, logprob in enumerate(logprobs):
                    value = total + logprob
                    rows.append((value - diversity * chosen[token], value, (*text, token)))
            rows.sort(key=lambda row: -row[0])
            beams[group] = [(value, text) for _, value, text in rows[:per_group]]
            chosen.update(text[-1] for _, text in beams[group])
    return sorted((row for group in beams for row in group), key=lambda row: -row[0])


@pytest.mark.parametrize(("width", "groups"), [(2, 2), (4, 2), (6, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("diversity", [0.0, 0.3, 2.0, 50.0])
def test_the_hypotheses_of_all_groups_equal_those_of_a_plain_transcription(
    width, groups, diversity
):
    for seed in range(4):
        engine = FakeEngine(9, seed=seed, eos=ENDLESS)
        expected = plain_diverse_beam(engine, [1, 2], width, groups, diversity, 6)
        result = run(
            engine,
            engine.prompt([1, 2]),
            width=width,
            groups=groups,
            diversity=diversity,
            max_tokens=6,
            length_penalty=0.0,
        )
        assert sorted(found.token_ids for found in result.found) == sorted(t for _, t in expected)
        assert [found.value for found in result.found] == pytest.approx([v for v, _ in expected])
        assert result.value == pytest.approx(expected[0][0])


def test_one_group_is_beam_search():
    for seed in range(6):
        engine = FakeEngine(9, seed=seed, eos=1.5)
        root = engine.prompt([1, 2])
        plain = start_search(engine, root, BeamSearch(width=3, max_tokens=12)).wait(60)
        result = run(engine, root, width=3, groups=1, diversity=9.0, max_tokens=12)
        assert [f.token_ids for f in result.found] == [f.token_ids for f in plain.found]


def test_the_first_group_is_the_beam_search_of_its_width():
    engine = FakeEngine(9, seed=3, eos=1.0)
    root = engine.prompt([1, 2])
    plain = start_search(engine, root, BeamSearch(width=2, max_tokens=12)).wait(60)
    result = run(engine, root, width=6, groups=3, diversity=0.7, max_tokens=12)
    texts = {found.token_ids for found in result.found}
    assert {found.token_ids for found in plain.found} <= texts


def test_a_strong_penalty_makes_all_first_tokens_differ():
    engine = FakeEngine(9, eos=ENDLESS)
    result = run(engine, engine.prompt([1, 2]), width=4, groups=4, diversity=100.0, max_tokens=5)
    assert len({found.token_ids[0] for found in result.found}) == 4
    close = run(engine, engine.prompt([1, 2]), width=4, groups=4, diversity=0.0, max_tokens=5)
    assert len({found.token_ids for found in close.found}) == 1, "without it all groups agree"


def test_all_groups_share_each_forward_and_losers_go():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    result = run(engine, root, width=4, groups=2, max_tokens=8)
    assert [rows for name, rows in engine.log if name == "top_tokens"] == [1] + [4] * 7
    assert engine.branches == [root, result.best]


def test_groups_that_have_ended_are_not_looked_at():
    engine = FakeEngine(9, eos=3.5)
    root = engine.prompt([1, 2])
    result = run(engine, root, width=4, groups=2, diversity=3.0, max_tokens=30, early_stopping=True)
    assert result.reason == "finished"
    assert len(result.found) == 4
    assert any(EOS in found.token_ids for found in result.found)
    looks = [rows for name, rows in engine.log if name == "top_tokens"]
    assert 2 in looks, "one group went on alone"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups": 0}, "groups"),
        ({"width": 4, "groups": 3}, "groups=3 must divide width=4"),
        ({"diversity": -0.1}, "diversity"),
        ({"diversity": math.nan}, "diversity"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, named):
    with pytest.raises(InvalidArgument, match=named):
        DiverseBeam(**options)
