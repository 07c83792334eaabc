"""Forks, copy-on-write, merges and in-flight plans of the control plane."""

from __future__ import annotations

import numpy as np
import pytest
from core_pair import CorePair

PAGE = 4


@pytest.fixture
def pair():
    pair = CorePair(64, PAGE)
    yield pair
    pair.check()


def root(pair: CorePair, tokens: int) -> int:
    (branch,) = pair.make("create", list(range(100, 100 + tokens)))
    pair.compute_all()
    return branch


def stat(pair: CorePair, name: str) -> int:
    return pair.native.stats()[name]


def test_a_fork_takes_no_page_and_makes_no_segment(pair):
    branch = root(pair, 10)
    before = (stat(pair, "pages_free"), stat(pair, "segments"))
    pair.make("fork_many", branch, 50)
    assert (stat(pair, "pages_free"), stat(pair, "segments")) == before


def test_the_first_writer_copies_the_partial_page_and_the_last_owner_writes_in_place(pair):
    branch = root(pair, 10)
    (fork,) = pair.make("fork", branch)
    pair.call("append", fork, [1])
    assert stat(pair, "cow_copies") == 1
    plan = pair.plan([fork], [1])
    ((source, target, slots),) = plan.native.copies.tolist()
    assert (source != target, slots) == (True, 2)
    plan.close("commit")
    pair.prune(fork)
    pair.call("append", branch, [2])
    assert stat(pair, "cow_copies") == 1
    pair.compute_all()


def test_a_fork_at_a_page_boundary_copies_nothing(pair):
    branch = root(pair, 8)
    (fork,) = pair.make("fork", branch)
    pair.call("append", fork, [1])
    pair.call("append", branch, [2])
    assert stat(pair, "cow_copies") == 0
    pair.compute_all()


def test_a_parent_that_writes_on_after_a_fork_leaves_the_child_its_tokens(pair):
    branch = root(pair, 10)
    (fork,) = pair.make("fork", branch)
    pair.call("append", branch, [1, 1, 1])
    assert pair.native.tokens(fork).tolist() == list(range(100, 110))
    pair.compute_all()


def test_a_rollback_past_the_fork_point_leaves_the_sibling_its_tokens(pair):
    branch = root(pair, 10)
    (fork,) = pair.make("fork", branch)
    pair.call("append", fork, [1, 1, 1])
    pair.compute_all()
    pair.call("rollback", fork, 7)
    pair.check()
    pair.call("append", fork, [2, 2])
    pair.compute_all()
    assert pair.native.tokens(branch).tolist() == list(range(100, 110))
    assert pair.native.tokens(fork).tolist() == [*range(100, 106), 2, 2]


def test_pruning_siblings_merges_what_is_left_into_one_segment(pair):
    branch = root(pair, 10)
    for i in range(6):
        (fork,) = pair.make("fork", branch)
        pair.call("append", fork, [i])
        pair.compute_all()
        pair.prune(branch)
        branch = fork
        pair.check()
        assert len(pair.native.segments(branch)) == 1


def test_a_merge_before_the_copy_ran_goes_on_in_the_parents_page(pair):
    branch = root(pair, 10)
    (fork,) = pair.make("fork", branch)
    pair.call("append", fork, [1])
    pair.prune(branch)
    assert stat(pair, "pages_live") == 3
    plan = pair.plan([fork], [8])
    assert plan.native.copies.tolist() == []
    plan.close("commit")


def test_a_merge_while_the_copy_is_in_flight_waits_for_its_commit(pair):
    branch = root(pair, 10)
    (fork,) = pair.make("fork", branch)
    pair.call("append", fork, [1])
    plan = pair.plan([fork], [8])
    pair.prune(branch)
    pair.check()
    assert len(pair.native.segments(fork)) == 2
    plan.close("commit")
    assert len(pair.native.segments(fork)) == 1
    assert stat(pair, "pages_live") == 3


def test_a_merge_after_a_cancelled_copy_takes_the_fresh_page_back(pair):
    branch = root(pair, 10)
    (fork,) = pair.make("fork", branch)
    pair.call("append", fork, [1])
    plan = pair.plan([fork], [8])
    pair.prune(branch)
    plan.close("cancel")
    pair.check()
    assert len(pair.native.segments(fork)) == 1
    assert stat(pair, "pages_live") == 3
    pair.compute_all()


def test_a_child_page_that_a_grandchild_will_copy_from_survives_a_merge(pair):
    (branch,) = pair.make("create", [1])
    a, b = pair.make("fork_many", branch, 2)
    pair.call("append", a, [2])
    (c,) = pair.make("fork", a)
    pair.call("append", c, [3])
    pair.prune(branch)
    pair.prune(b)
    pair.check()
    pair.compute_all()
    assert pair.native.tokens(c).tolist() == [1, 2, 3]


def test_a_sole_owner_does_not_write_into_a_page_that_a_cut_segment_lists_too(pair):
    branch = root(pair, 10)
    (fork,) = pair.make("fork_at", branch, 9)
    pair.call("append", branch, [1])
    assert stat(pair, "cow_copies") == 1
    pair.check()
    pair.call("append", fork, [2])
    pair.compute_all()
    assert pair.native.tokens(branch).tolist() == [*range(100, 110), 1]
    assert pair.native.tokens(fork).tolist() == [*range(100, 109), 2]


def test_a_prompt_that_hits_a_live_prefix_hangs_below_it(pair):
    branch = root(pair, 12)
    (second,) = pair.make("create", [*range(100, 108), 1, 2, 3])
    first_chain, second_chain = pair.native.segments(branch), pair.native.segments(second)
    assert first_chain[0][0] == second_chain[0][0]
    assert second_chain[0][2] == 8
    assert stat(pair, "pages_shared") == 2
    pair.compute_all()


def test_namespaces_do_not_see_each_others_prefixes(pair):
    pair.make("create", list(range(100, 112)), "mine")
    pair.compute_all()
    assert pair.native.match_prefix(list(range(100, 112)), "mine") == 8
    assert pair.native.match_prefix(list(range(100, 112)), "yours") == 0
    assert pair.native.match_prefix(list(range(100, 112))) == 0


def test_generated_pages_leave_the_cache_with_their_branch_and_prompt_pages_stay(pair):
    branch = root(pair, 4)
    pair.call("append", branch, [1] * 9)
    pair.compute_all()
    assert pair.native.match_prefix([100, 101, 102, 103, *[1] * 9]) == 12
    pair.prune(branch)
    assert stat(pair, "pages_cached") == 1


def test_eviction_takes_the_oldest_leaf_first(pair):
    for first in (1, 2):
        pair.make("create", [first] * 9)
        pair.compute_all()
    old, new = pair.live
    pair.prune(old)
    pair.prune(new)
    pair.call("evict", 2)
    assert pair.native.match_prefix([1] * 9) == 0
    assert pair.native.match_prefix([2] * 9) == 8


def test_uncomputed_tokens_that_branches_share_are_computed_once(pair):
    (branch,) = pair.make("create", list(range(100, 110)))
    forks = pair.make("fork_many", branch, 3)
    plan = pair.plan([branch, *forks], [2, 4, 20, 6])
    assert plan.native.num_items == 1
    assert plan.native.num_tokens == 10
    assert plan.native.logits_row.tolist() == [9] * 4
    plan.close("commit")


def test_whole_pages_are_read_once_for_all_branches_below(pair):
    branch = root(pair, 4 * PAGE)
    forks = pair.make("fork_many", branch, 8)
    pair.call("append_batch", forks, list(range(8)), [0.0] * 8)
    plan = pair.plan(forks, [1] * 8).native
    assert (plan.node_row_begin[0], plan.node_row_end[0], plan.node_len[0]) == (0, 8, 4 * PAGE)
    assert plan.num_nodes == 1 + 8


def test_a_plan_of_nothing_is_empty(pair):
    plan = pair.plan([], [])
    assert (plan.native.num_tokens, plan.native.copies.shape) == (0, (0, 3))
    plan.close("commit")


def test_plan_arrays_outlive_the_plan_and_the_core():
    pair = CorePair(8, PAGE)
    (branch,) = pair.make("create", [1, 2, 3])
    tokens = pair.native.plan([branch], [8]).token_ids
    del pair
    assert tokens.tolist() == [1, 2, 3]
    assert tokens.dtype == np.int32


def test_a_dropped_plan_is_cancelled(pair):
    branch = root(pair, 3)
    pair.call("append", branch, [1])
    for core in (pair.native, pair.twin):
        core.plan([branch], [8])
        assert core.dump()["flights"] == []


def test_a_merge_into_a_page_that_was_full_before_reports_it_as_rewritten():
    pair = CorePair(8, PAGE, prefix_cache=False)
    branch = root(pair, 8)
    (fork,) = pair.make("fork_at", branch, 6)
    pair.call("append", fork, [1])
    pair.memory.follow_events(pair.native)
    pair.prune(branch)
    assert len(pair.native.segments(fork)) == 1
    assert pair.native.debug_unsealed() == [1]


def test_a_merge_does_not_go_on_in_a_page_that_the_index_still_offers(pair):
    branch = root(pair, 2 * PAGE)
    (fork,) = pair.make("fork_at", branch, PAGE + 2)
    pair.call("append", fork, [1])
    pair.prune(branch)
    assert len(pair.native.segments(fork)) == 2
    (again,) = pair.make("create", [*range(100, 100 + 2 * PAGE), 5])
    assert pair.native.num_computed(again) == 2 * PAGE
    pair.compute_all()
    assert len(pair.native.segments(fork)) == 2  # the cut page is live below both
