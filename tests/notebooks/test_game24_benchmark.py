"""The benchmarks `game24` and `search-overhead`: the game's rules, and small runs."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest

from dendrite_engine.errors import InvalidArgument
from dendrite_lab.bench import game24, game24_search, search_overhead


def reachable(numbers):
    """Everything that can be made of these numbers, by brute force over ordered pairs."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for a, b in itertools.permutations(range(len(numbers)), 2):
        rest = [n for i, n in enumerate(numbers) if i not in (a, b)]
        x, y = numbers[a], numbers[b]
        results = [x + y, x - y, x * y] + ([x / y] if y else [])
        for result in results:
            found |= reachable([*rest, result])
    return found


@pytest.mark.parametrize("numbers", [(1, 1, 1, 1), (3, 3, 8, 8), (1, 5, 5, 5), (13, 13, 13, 1)])
def test_steps_without_negative_numbers_reach_24_where_any_steps_do(numbers):
    exact = [Fraction(n) for n in numbers]
    assert game24.can_reach(tuple(sorted(exact))) == (24 in reachable(exact))


def test_the_list_of_puzzles_is_made_by_its_seed_and_all_can_be_solved():
    listed = game24.puzzles(50, 0)
    assert listed == game24.puzzles(50, 0)
    assert listed[:12] == game24.puzzles(12, 0)
    assert listed != game24.puzzles(50, 1)
    assert len(set(listed)) == 50
    assert all(game24.can_reach(tuple(map(Fraction, puzzle))) for puzzle in listed)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("8+4=12\n6-4=2\n12*2=24\n", True),
        ("8+4=12\n6-4=2\n12*2=24\n\n1 1 1 1\n", True),  # what comes after does not count
        ("8+4=12\n6-4=2\n", False),  # not done
        ("8+4=13\n6-4=2\n12*2=24\n", False),  # wrong sum
        ("8*4=32\n8*4=32\n", False),  # numbers used twice
        ("8+4=12\n4-6=-2\n", False),
        ("24\n", False),
        ("", False),
    ],
)
def test_the_verifier_accepts_legal_steps_to_24_only(text, right):
    assert game24.solved((4, 4, 6, 8), text) == right


def test_legal_moves_are_lines_that_the_verifier_accepts():
    moves = game24.legal_moves((4, 4, 6, 8), "8+4=12\n")
    assert len(moves) == len(set(moves))
    for move in moves:
        assert len(game24.left_after((4, 4, 6, 8), "8+4=12\n" + move)) == 2
    assert game24.legal_moves((4, 4, 6, 8), "nonsense\n") == []
    assert game24.legal_moves((4, 4, 6, 8), "8+4=12\n6-4=2\n12*2=24\n") == []


@pytest.mark.model
def test_a_search_over_text_ranks_moves_as_the_one_on_branches_does(default_model):
    from dendrite_engine import Engine
    from dendrite_engine.search.driver import Runner
    from dendrite_engine.search.likelihood import RunScorer
    from dendrite_engine.search.tree import Tree
    from dendrite_lab.bench.workload import hugging_face

    with Engine.from_pretrained(default_model, num_pages=256) as engine:
        root = engine.prompt(game24.prompt((4, 4, 6, 8)))
        runs = [tuple(engine.tokenizer.encode(t)) for t in game24.legal_moves((4, 4, 6, 8), "")[:6]]
        node = Tree(root).root
        runner = Runner(engine, root)
        ours = RunScorer(runner.keeper, runner._complete).rank([(node, runs)])[0]
        text = game24_search.TextScorer(hugging_face(engine.model_path)).rank([(node, runs)])[0]
        assert [c.token_ids for c in ours] == [c.token_ids for c in text]
        for one, other in zip(ours, text, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
        assert engine.branches == [root]


def test_the_overhead_of_a_small_run_is_a_share_and_all_thoughts_are_made(tiny_model):
    argv = ["--model", str(tiny_model("llama")), "--prefix", "40", "--simulations", "12"]
    argv += ["--parallel", "4", "--thought-tokens", "3", "--repeats", "1", "--hf-repeats", "0"]
    mcts, thoughts = search_overhead.run(argv)["rows"]
    assert 0 < mcts["outside_percent"]["median"] < 100
    assert mcts["tokens"] == 12 * 8
    assert thoughts["generations"] == 30


def test_all_methods_play_the_same_puzzles(tiny_model):
    argv = ["--model", str(tiny_model("llama")), "--puzzles", "2", "--samples", "2"]
    report = game24_search.run([*argv, "--reprefill", "0"])
    rows = {row["method"]: row for row in report["rows"]}
    assert list(rows) == [
        "greedy", "greedy, legal moves", "best of N", "tree of thought",
        "the same, model not asked",
    ]  # fmt: skip
    assert all(row["puzzles"] == 2 for row in rows.values())
    assert rows["tree of thought"]["solved"] == 2
    assert all(text["solved"] for text in report["texts"])


@pytest.mark.parametrize("argv", [["--puzzles", "0"], ["--parallel", "0"], ["--reprefill", "-1"]])
def test_options_that_make_no_sense_are_refused(argv):
    with pytest.raises(InvalidArgument, match=argv[0]):
        game24_search.run(argv)


def test_a_clock_of_forward_passes_needs_simulations():
    with pytest.raises(InvalidArgument, match="--simulations"):
        search_overhead.run(["--simulations", "0"])
