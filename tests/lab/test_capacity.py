"""`dendrite-lab capacity`: exact counts of what fits."""

from __future__ import annotations

import json

import pytest

from dendrite_engine.errors import InvalidArgument, ModelError
from dendrite_engine.models.families import read_model_config
from dendrite_lab import cli
from dendrite_lab.capacity import KNOWN, Shape, capacity, format_text, read_shape


def tokens(found: dict) -> dict[str, int]:
    return {row["format"]: row["tokens"] for row in found["rows"]}


def test_qwen3_32b_holds_a_million_tokens_in_128_gib_but_not_in_128_gb():
    """bf16 weights; docs/capacity.md tells the story."""
    shape = read_shape("Qwen3-32B")
    assert shape.weights == 32_762_106_880
    binary, decimal = capacity(shape, 128 << 30), capacity(shape, 128 * 10**9)
    assert tokens(binary)["tq4"] == 1_064_064
    assert tokens(decimal)["tq4"] == 924_416
    assert tokens(binary)["bf16"] == 274_320
    assert tokens(capacity(shape, 128 * 10**9, "fp8"))["tq4"] > 1 << 20
    assert {row["format"]: row["bytes_per_token"] for row in binary["rows"]}["tq4"] == 67_584


def test_counts_are_whole_pages_that_fit_and_one_more_does_not():
    shape = read_shape("llama-3.1-8b")
    found = capacity(shape, 24 * 10**9, "q8_0")
    free = found["memory_bytes"] - found["weights_bytes"]
    for row in found["rows"]:
        assert row["tokens"] % 16 == 0
        assert row["tokens"] * row["bytes_per_token"] <= free
        assert (row["tokens"] + 16) * row["bytes_per_token"] > free


def test_weights_that_do_not_fit_leave_no_tokens():
    assert set(tokens(capacity(read_shape("qwen3-32b"), 10**9)).values()) == {0}


def test_the_shape_of_a_model_folder_is_read(tiny_model):
    shape = read_shape(str(tiny_model("llama")))
    assert shape.weights == read_model_config(tiny_model("llama")).num_parameters
    assert read_shape(str(tiny_model("llama") / "config.json")) == shape


def test_a_head_dim_that_a_format_can_not_hold_is_said():
    shape = Shape("odd", 2, 4, 2, 80, 320, 640, 1000, True)
    rows = {row["format"]: row for row in capacity(shape, 10**9)["rows"]}
    assert "power of two" in rows["tq4"]["error"]
    assert rows["fp8_e4m3"]["tokens"] > 0
    assert "power of two" in format_text(capacity(shape, 10**9))


def test_the_command_prints_a_table_or_json(capsys):
    assert cli.main(["capacity", "qwen3-8b", "--memory", "24GB", "--weights", "q4_0"]) == 0
    assert "510,112" in capsys.readouterr().out
    assert cli.main(["capacity", "qwen3-8b", "--memory", "24GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 8_190_726_144
    assert found["weights_bytes"] == 2 * found["parameters"]


def test_every_known_shape_has_a_head_dim_for_every_format():
    for name in KNOWN:
        assert min(tokens(capacity(read_shape(name), 1 << 40)).values()) > 0


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ModelError, match="neither a known shape"):
        read_shape("gpt-9")
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(str(tmp_path))
    with pytest.raises(InvalidArgument, match="weights must be one of"):
        capacity(read_shape("qwen3-8b"), 10**9, "int1")
