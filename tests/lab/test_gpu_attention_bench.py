"""The attention benchmark on a CPU: trees, rotation of copies, contestants, and the comparison."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_lab import bench
from dendrite_lab.bench import gpu_attention, gpu_flashinfer, gpu_timing
from dendrite_lab.bench.gpu_attention_case import (
    Contestant,
    Heads,
    _exact_row,
    make_case,
    relative_error,
)
from dendrite_lab.bench.gpu_trees import FASTTREE, SUITES, parse_tree, plan_tree

CPU = torch.device("cpu")


def words(text):
    """Arguments of a command line."""
    return text.split()


# -- trees ------------------------------------------------------------------------------------


def test_a_tree_is_read_level_by_level_and_spread_evenly():
    tree = parse_tree("1,2,6;  8,256,32")
    assert tree.name == "1,2,6; 8,256,32"
    assert tree.parents == (-1, 0, 0, 1, 1, 1, 2, 2, 2)
    assert tree.lengths == (8, 256, 256, 32, 32, 32, 32, 32, 32)
    assert tree.leaves == (3, 4, 5, 6, 7, 8)
    assert tree.contexts == (296,) * 6
    assert tree.unique_tokens == 8 + 512 + 192


def test_each_gives_every_level_the_same_length():
    assert parse_tree("1,2,4; 16 each") == parse_tree("1,2,4; 16 each")
    assert parse_tree("1,2,4; 16 each").lengths == (16,) * 7


@pytest.mark.parametrize("text", ["", "1,2", "1,2;3", "1,0;3,4", "a;b", "1;2;3"])
def test_a_text_that_is_no_tree_is_refused_with_an_example(text):
    with pytest.raises(InvalidArgument, match="for example"):
        parse_tree(text)


def test_fasttrees_trees_have_the_queries_of_the_issue():
    queries = [len(parse_tree(text).leaves) for text in FASTTREE]
    assert queries == [64, 256, 256, 64, 1024, 10, 1024, 1024]


def test_random_trees_depend_on_their_seed_alone():
    trees = [parse_tree(name) for name in SUITES["random"]]
    assert trees == [parse_tree(name) for name in SUITES["random"]]
    assert len(set(trees)) == len(trees)
    assert all(2 <= len(tree.leaves) <= 256 for tree in trees)


@pytest.mark.parametrize(
    "text", [*FASTTREE[:4], "1; 1", "1; 17", "2,2; 5,1", "1,3; 16,1", "1,3; 15,33", "random 3"]
)
def test_a_planned_tree_has_one_row_a_leaf_that_sees_its_whole_path(text):
    tree = parse_tree(text)
    plan = plan_tree(tree).plan
    assert plan.num_tokens == len(tree.leaves)
    assert sorted((plan.positions + 1).tolist()) == sorted(tree.contexts)
    reads = np.zeros(plan.num_tokens, np.int64)
    for node in range(plan.num_nodes):
        reads[plan.node_row_begin[node] : plan.node_row_end[node]] += plan.node_len[node]
    assert reads.tolist() == (plan.positions + 1).tolist()


def test_a_prompts_queries_are_its_last_tokens_and_see_what_is_before_them():
    tree = parse_tree("prompt 5 after 30")
    assert tree.contexts == (31, 32, 33, 34, 35)
    plan = plan_tree(tree).plan
    assert plan.positions.tolist() == [30, 31, 32, 33, 34]
    assert plan_tree(parse_tree("prompt 20 after 0")).plan.num_tokens == 20
    case = make_case(plan_tree(tree), Heads(4, 2, 16), CPU, torch.float32)
    assert set(gpu_flashinfer.contestants(case)) == {"prefill"}


# -- attention --------------------------------------------------------------------------------


def test_copies_outgrow_the_cache_within_reason():
    assert gpu_timing.copies_for(100, 0) == 1
    assert gpu_timing.copies_for(10 << 20, 50 << 20) == 15
    assert gpu_timing.copies_for(1 << 30, 50 << 20) == 1
    assert gpu_timing.copies_for(1, 50 << 20) == gpu_timing.MAX_COPIES


def test_heads_are_read_and_refused():
    assert Heads.parse("32x8x128") == Heads(32, 8, 128)
    with pytest.raises(InvalidArgument, match="32x8x128"):
        Heads.parse("32/8")


def dense(case):
    """A contestant that is right: fp32 over each row's path."""
    out = torch.stack([_exact_row(case, row) for row in range(case.q.shape[0])])
    return Contestant(lambda index: out, 1.0)


def test_a_wrong_result_has_no_time(monkeypatch):
    argv = words("--device cpu --dtype float32 --heads 4x2x16 --repeats 1 --trees")
    monkeypatch.setattr(gpu_attention.gpu_ours, "ours", lambda case, deterministic: dense(case))
    (row,) = bench.run("attention", [*argv, "1,3; 20,5"])["rows"]
    assert row["ours_us"]["n"] == 1
    assert row["error"] < 1e-6
    assert row["troubles"] == {}

    def wrong(case, deterministic):
        right = dense(case)
        return Contestant(lambda index: right.call(index) + 0.5, 1.0)

    monkeypatch.setattr(gpu_attention.gpu_ours, "ours", wrong)
    (row,) = bench.run("attention", [*argv, "1,3; 20,5"])["rows"]
    assert row["ours_us"] is None
    assert "wrong" in row["troubles"]["ours"]


def test_speed_ups_are_over_the_better_of_what_flashinfer_offers(monkeypatch):
    times = {"ours": 10.0, "flat": 50.0, "flat-tc": 40.0, "cascade": 90.0, "cascade-2": 30.0,
             "cascade-fa2": 20.0}  # fmt: skip

    def measured(case, make, repeats, outputs, name):
        return gpu_attention.Measured([times[name]] * 3, 100.0, 0.001)

    monkeypatch.setattr(gpu_attention, "_measure", measured)
    monkeypatch.setattr(gpu_flashinfer, "available", lambda: None)
    monkeypatch.setattr(gpu_flashinfer, "compile_all", lambda *_: 12.0)
    monkeypatch.setattr(
        gpu_flashinfer,
        "contestants",
        lambda case: {name: dense for name in times if name != "ours"},
    )
    argv = words("--device cpu --heads 4x2x16 --repeats 1 --trees")
    report = bench.run("attention", [*argv, FASTTREE[0], "1,3; 20,5"])
    for row in report["rows"]:
        assert (row["times_peer"], row["times_best"]) == (3.0, 2.0)
        assert row["flat_us"]["median"] == 40.0
    assert [entry["trees"] for entry in report["summary"]] == ["FastTree trees", "all trees"]
    assert report["summary"][0]["times_peer_mean"] == 3.0
    assert report["flashinfer_compile_s"] == 12.0


def test_cascades_are_offered_in_full_depth_and_with_the_best_two_levels():
    case = make_case(plan_tree(parse_tree("1,2,8; 16,256,16")), Heads(4, 2, 16), CPU, torch.float32)
    found = gpu_flashinfer.contestants(case)
    assert set(found) == {
        "flat", "flat-tc", "cascade", "cascade-2", "cascade-fa2", "cascade-fa2-2",
    }  # fmt: skip
    assert len(found["cascade"].keywords["tables"]) == 3
    two = found["cascade-2"].keywords["tables"]
    assert gpu_flashinfer.tokens_read(two, 16) == 2 * 272 + 8 * 16
    single = make_case(plan_tree(parse_tree("1; 40")), Heads(4, 2, 16), CPU, torch.float32)
    assert set(gpu_flashinfer.contestants(single)) == {"flat", "flat-tc"}


def test_the_sampled_error_sees_a_wrong_row():
    case = make_case(plan_tree(parse_tree("1,9; 33,2")), Heads(4, 2, 16), CPU, torch.float32)
    right = dense(case).call(0)
    assert relative_error(case, right) < 1e-6
    broken = right.clone()
    broken[-1] = 0
    assert relative_error(case, broken) > 0.1
    broken[-1] = float("nan")
    assert not relative_error(case, broken) <= gpu_attention.WRONG


def test_a_budget_of_seconds_leaves_cases_out_by_name(monkeypatch):
    monkeypatch.setattr(gpu_attention.gpu_ours, "ours", lambda case, deterministic: dense(case))
    argv = words("--device cpu --heads 4x2x16 --repeats 1 --budget-s 1e-9 --trees")
    report = bench.run("attention", [*argv, "1,3; 20,5"])
    assert report["rows"] == []
    assert report["skipped"] == ["1,3; 20,5 | 4/2 d=16"]
