"""The `search` benchmark: its scores, and a small run with a random model."""

from __future__ import annotations

import pytest

from dendrite_engine.errors import InvalidArgument
from dendrite_lab.bench import search
from dendrite_lab.bench.search_tasks import TASKS, alliteration, sentence_with


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("My mum made me a muffin", 0.5),
        ("my MY My mum", 0.2),  # a word counts once
        ("'Marvellous', (mused) Max.", 0.3),  # punctuation is no letter
        ("m m m", 0.0),  # letters are no words
        ("a b c d e f g h i j mum", 0.0),  # only the first ten words count
    ],
)
def test_alliteration_counts_different_words_with_the_initial(text, score):
    assert alliteration("m", text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("A dog", 0.45),
        ("Dogs in the snow", 0.9),  # inflected, but no sentence yet
        ("Dogs in the snow.", 1.0),
        ("A hotdog.", 0.0),  # inside a word
    ],
)
def test_a_sentence_is_scored_by_the_words_it_has(text, score):
    assert sentence_with("dog snow", text) == pytest.approx(score)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_twelve_instances_whose_texts_fill_whole_nodes(name):
    task = TASKS[name]
    assert len(set(task.instances)) == 12
    assert task.max_depth * task.tokens_per_node == task.sampling.max_tokens
    assert all(task.prompt(instance) for instance in task.instances)


def test_methods_are_compared_at_the_same_budget(tiny_model):
    argv = ["--model", str(tiny_model("llama")), "--tasks", "twister", "--instances", "1"]
    argv += ["--tokens", "60", "--width", "3"]
    report = search.run(argv)
    by_method = {row["method"]: row for row in report["rows"]}
    assert list(by_method) == ["greedy", "best of N", "MCTS"]
    assert by_method["greedy"]["tokens"]["max"] <= 20
    assert by_method["MCTS"]["tokens"]["max"] <= 60
    assert 60 <= by_method["best of N"]["tokens"]["max"] <= 80  # it may overrun a little
    assert report["benchmark"] == "search"
    assert {text["instance"] for text in report["texts"]} == {"b"}
    again = search.run(argv)
    assert [text["text"] for text in again["texts"]] == [text["text"] for text in report["texts"]]


@pytest.mark.parametrize(
    "argv", [["--instances", "0"], ["--seeds", "0"], ["--tokens", "10"]], ids=lambda argv: argv[0]
)
def test_options_that_make_no_sense_are_refused(argv):
    with pytest.raises(InvalidArgument, match=argv[0]):
        search.run(argv)


def test_the_stored_report_is_the_one_of_this_benchmark_and_others_are_refused():
    from dendrite_engine.errors import InvalidArgument
    from dendrite_lab.bench import stored

    assert stored("search")["benchmark"] == "search"
    with pytest.raises(InvalidArgument, match="no stored report of the benchmark 'nothing'"):
        stored("nothing")
