"""The kv-attention benchmark on a CPU: pools of random codes, the comparison, the store."""

from __future__ import annotations

import pytest
import torch

from dendrite_engine.errors import InvalidArgument, UnknownName
from dendrite_lab import bench
from dendrite_lab.bench import gpu_kv_attention as kv
from dendrite_lab.bench.gpu_attention_case import Heads, make_case
from dendrite_lab.bench.gpu_trees import parse_tree, plan_tree

CPU = torch.device("cpu")
HEADS = Heads(4, 2, 64)
ARGV = [
    "--device", "cpu", "--dtype", "float32", "--heads", "4x2x64", "--repeats", "1",
    "--branches", "3", "--formats", "k8v4", "tq3", "--trees",
]  # fmt: skip


def planned(text="1,3; 20,5"):
    return plan_tree(parse_tree(text))


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", *kv.FORMATS])
def test_pools_hold_finite_numbers_of_ordinary_size(name):
    pool = kv.make_pool(name, planned(), HEADS, CPU)
    for side in pool.sides[0]:
        stored = side.stored(torch.arange(side.num_pages))
        assert torch.isfinite(stored).all()
        assert 0.01 < float(stored.abs().mean()) < 20
        assert stored.unique().numel() > 3


def test_every_format_is_timed_beside_the_unquantised_pages():
    report = bench.run("kv-attention", [*ARGV, "1,3; 20,5"])
    assert [row["format"] for row in report["rows"]] == ["unquantised", "k8v4", "tq3"]
    for row in report["rows"]:
        assert row["us"]["n"] == 1
        assert row["error"] < 1e-5
        assert row["times_unquantised"] > 0
    per_head = [row["bytes"] / (35 * 2) for row in report["rows"]]
    assert per_head == [2 * 64 * 4, 66 + 34, 2 * 26]
    assert [row["format"] for row in report["store"]] == ["unquantised", "k8v4", "tq3"]
    assert all(row["store_us"]["n"] == 1 for row in report["store"])


def test_a_wrong_result_has_no_time(monkeypatch):
    real = kv.gpu_ours.ours

    def wrong(case, *, packed=None, deterministic=False):
        made = real(case, packed=packed)
        if packed is None:
            return made
        return type(made)(lambda index: made.call(index) + 0.5, 1.0)

    monkeypatch.setattr(kv.gpu_ours, "ours", wrong)
    rows = bench.run("kv-attention", [*ARGV, "1,3; 20,5"])["rows"]
    assert rows[0]["us"]["n"] == 1
    for row in rows[1:]:
        assert row["us"] is row["times_unquantised"] is None
        assert row["trouble"].startswith("wrong: relative error")


def test_one_formats_trouble_leaves_the_others_their_numbers(monkeypatch):
    real = kv.gpu_ours.ours

    def broken(case, *, packed=None):
        if packed is not None and packed[0][0].codec.name == "tq3":
            raise RuntimeError("no kernel")
        return real(case, packed=packed)

    monkeypatch.setattr(kv.gpu_ours, "ours", broken)
    rows = bench.run("kv-attention", [*ARGV, "1,3; 20,5"])["rows"]
    assert rows[1]["us"]["n"] == 1
    assert rows[2]["trouble"] == "RuntimeError: no kernel"


def test_the_error_is_against_decoded_pages():
    case = make_case(planned(), HEADS, CPU, torch.float32)
    pool = kv.make_pool("tq4", case.planned, HEADS, CPU)
    out = kv.gpu_ours.ours(case, packed=pool.sides).call(0)
    assert kv.packed_error(case, pool, out) < 1e-5
    pool.sides[0][1].parts()[0].bitwise_xor_(0x11)
    assert kv.packed_error(case, pool, out) > kv.WRONG


def test_the_share_of_a_step_counts_attention_and_weights():
    heads = Heads(32, 8, 128)
    row = {"format": "tq4", "store_us": {"median": 5.0}}
    attention = [
        {"format": "tq4", "us": {"median": 900.0}}, {"format": "tq4", "us": {"median": 50.0}},
        {"format": "tq3", "us": {"median": 1.0}}, {"format": "tq4", "us": None},
    ]  # fmt: skip
    weights_us = kv.layer_bytes(heads) / 3e6
    assert 140 < weights_us < 150  # 218 million numbers of Llama 3.1 8B
    assert kv.add_share(row, heads, attention)["share_of_step"] == round(5 / (55 + weights_us), 4)
    assert "share_of_step" not in kv.add_share(row, Heads(7, 7, 64), attention)
    assert "share_of_step" not in kv.add_share(row, heads, attention[3:])


def test_arguments_that_can_not_work_are_refused():
    with pytest.raises(InvalidArgument, match="--branches must be at least 1"):
        kv.run(["--branches", "0"])
    with pytest.raises(UnknownName, match="unknown page format 'int1'"):
        kv.run(["--formats", "int1"])
