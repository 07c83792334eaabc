"""The beam benchmark on a tiny model: both sides find the same text, ours in shared pages."""

from __future__ import annotations

import json

import pytest

from dendrite_engine.errors import InvalidArgument
from dendrite_lab import bench


def test_both_sides_find_the_same_text_and_pages_are_shared(tiny_model):
    model = str(tiny_model("llama"))
    argv = ["--model", model, "--cases", "3x40", "--tokens", "6", "--repeats", "2"]
    report = bench.run("beam", argv)
    json.dumps(report)
    (row,) = report["rows"]
    assert row["same_text"] == "2/2"
    assert row["seconds"]["n"] == row["hf_seconds"]["n"] == 2
    assert 0 < row["pages"] < row["pages_if_copied"] == 9


def test_counts_that_make_no_sense_are_refused():
    for words, named in (
        (["--tokens", "0"], "--tokens"),
        (["--repeats", "0"], "--repeats"),
        (["--cases", "4"], "4"),
    ):
        with pytest.raises(InvalidArgument, match=named):
            bench.run("beam", words)
