"""Bugs that other engines had in their KV bookkeeping (K1-K11), and the corners of this one."""

from __future__ import annotations

import pytest
from core_pair import CorePair

from dendrite_engine.errors import InvalidArgument, OutOfPages, StaleBranch

PAGE = 4


@pytest.fixture
def pair():
    """Native core and twin with 32 pages of 4 tokens; both are recounted at the end."""
    pair = CorePair(32, PAGE)
    yield pair
    pair.check()


def root(pair: CorePair, tokens: int, *, computed: bool = True) -> int:
    (branch,) = pair.make("create", list(range(100, 100 + tokens)))
    if computed:
        pair.compute_all()
    return branch


def free_pages(pair: CorePair) -> int:
    return pair.native.stats()["pages_free"]


# --- K1: a page freed twice ---


def test_pruning_twice_is_stale_and_frees_nothing_again(pair):
    branch = root(pair, 9)
    pair.prune(branch)
    kind, (error, _, _) = pair.call("prune", branch)
    assert (kind, error) == ("raised", StaleBranch)
    assert len(set(pair.native.dump()["free_list"])) == free_pages(pair)


def test_pruning_the_parent_while_eight_children_live_frees_each_page_once(pair):
    branch = root(pair, 10)
    children = pair.make("fork_many", branch, 8)
    pair.call("append_batch", children, list(range(8)), [0.0] * 8)
    pair.prune(branch)
    pair.check()
    pair.compute_all()
    for child in children:
        pair.prune(child)
        pair.check()
    assert pair.native.stats()["pages_live"] == 0


# --- K2: a page goes back while a step still writes it ---


def test_pages_pruned_in_flight_are_not_marked_computed_for_their_next_owner(pair):
    first = root(pair, 10, computed=False)
    plan = pair.plan([first], [64])
    pair.prune(first)
    second = root(pair, 10, computed=False)
    plan.close("commit")
    pair.check()
    assert pair.native.num_computed(second) == 0
    assert pair.native.match_prefix(list(range(100, 110))) == 0
    pair.compute_all()


def test_tokens_rolled_back_and_rewritten_in_flight_are_computed_again(pair):
    branch = root(pair, 10, computed=False)
    plan = pair.plan([branch], [64])
    pair.call("rollback", branch, 4)
    pair.call("append", branch, [7, 7, 7])
    plan.close("commit")
    assert pair.native.num_computed(branch) == 6
    pair.compute_all()


# --- K3: progress while frees are pending ---


def test_a_full_pool_of_cached_pages_never_blocks_an_append(pair):
    for start in range(8):
        pair.make("create", [start] * (4 * PAGE))
        pair.compute_all()
        pair.prune(pair.live[-1])
    assert free_pages(pair) == 0
    branch = root(pair, 1)
    for _ in range(20):
        kind, status = pair.call("append_batch", [branch], [5], [0.0])
        assert (kind, status.tolist()) == ("returned", [0])
    assert pair.native.stats()["evictions"] > 0


# --- K4: a prefix hit on pages that are not written yet ---


def test_a_prompt_is_not_shared_before_it_is_computed(pair):
    root(pair, 12, computed=False)
    plan = pair.plan(pair.live, [64])
    kind, (second, cached) = pair.call("create", list(range(100, 112)))
    pair.live.append(second)
    assert (kind, cached) == ("returned", 0)
    plan.close("commit")
    pair.check()
    assert len(pair.native.dump()["index"]) == 3
    pair.compute_all()
    assert len(pair.native.dump()["index"]) == 3, "equal pages must not enter the index twice"


@pytest.mark.parametrize("position", range(1, 11))
def test_a_fork_inside_a_flight_is_computed_by_the_same_commit(pair, position):
    branch = root(pair, 10, computed=False)
    plan = pair.plan([branch], [7])
    (fork,) = pair.make("fork_at", branch, position)
    plan.close("commit")
    assert pair.native.num_computed(fork) == min(position, 7)
    assert pair.native.num_computed(branch) == 7
    pair.check()


# --- K5: the partial page of a fork comes back under a stale key ---


def test_a_partial_page_is_found_only_after_it_is_full_and_by_its_own_tokens(pair):
    branch = root(pair, 6)
    (fork,) = pair.make("fork", branch)
    pair.call("append", branch, [1, 1], None, True)
    pair.call("append", fork, [2, 2], None, True)
    pair.compute_all()
    prompt = [100, 101, 102, 103, 104, 105]
    assert pair.native.match_prefix([*prompt, 9, 9, 9]) == PAGE
    for tail in (1, 2):
        assert pair.native.match_prefix([*prompt, tail, tail, 9]) == 2 * PAGE


def test_a_rollback_into_an_indexed_page_takes_it_and_all_below_out_of_the_index(pair):
    branch = root(pair, 4 * PAGE)
    pair.call("rollback", branch, 2 * PAGE + 2)
    assert pair.native.match_prefix(list(range(100, 116))) == PAGE
    pair.call("append", branch, [1] * 7)
    pair.check()
    pair.compute_all()
    assert pair.native.match_prefix(list(range(100, 116))) == PAGE


def test_a_rollback_into_a_shared_page_leaves_the_index_alone(pair):
    branch = root(pair, 3 * PAGE)
    (other,) = pair.make("fork", branch)
    pair.call("rollback", branch, PAGE + 1)
    pair.call("append", branch, [1, 1])
    pair.compute_all()
    assert pair.native.match_prefix([*range(100, 112), 0]) == 3 * PAGE
    assert pair.native.tokens(other).tolist() == list(range(100, 112))


# --- K6: whole prompt cached, length a multiple of the page ---


@pytest.mark.parametrize("pages", [1, 2, 3])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_at_least_one_token_of_a_wholly_cached_prompt_is_computed(pair, pages, extra):
    length = pages * PAGE + extra
    pair.prune(root(pair, 4 * PAGE))
    kind, (branch, cached) = pair.call("create", list(range(100, 100 + length)))
    pair.live.append(branch)
    assert (kind, cached) == ("returned", (length - 1) // PAGE * PAGE)
    plan = pair.plan([branch], [64])
    assert plan.native.num_tokens == length - cached
    assert plan.native.logits_row.tolist() == [length - cached - 1]
    plan.close("commit")


@pytest.mark.parametrize("position", [3, 4, 5, 7, 8, 9])
def test_forks_around_a_page_boundary_keep_both_sides_readable(pair, position):
    branch = root(pair, 10)
    (fork,) = pair.make("fork_at", branch, position)
    for writer in (fork, branch, fork):
        pair.call("append", writer, [writer & 7, 1])
        pair.check()
        pair.compute_all()


# --- K7: stale tails of page tables ---


def test_a_page_table_covers_exactly_the_tokens_of_a_branch(pair):
    long, short = root(pair, 17), root(pair, 2)
    indptr, indices, last = pair.native.page_tables([long, short, long])
    assert indptr.tolist() == [0, 5, 6, 11]
    assert last.tolist() == [1, 2, 1]
    assert len(indices) == 11


# --- K8: eviction of a page that is in use again ---


def test_a_page_found_in_the_cache_is_not_evicted_under_its_new_owner(pair):
    pair.prune(root(pair, 4 * PAGE))
    (again,) = pair.make("create", list(range(100, 100 + 4 * PAGE)))
    kind, evicted = pair.call("evict", 32)
    assert (kind, evicted) == ("returned", 1)  # only the last page, which a hit never uses
    pair.compute_all()
    (twin,) = pair.make("create", list(range(100, 100 + 4 * PAGE)))
    pair.compute_all()
    pair.prune(again)
    pair.call("evict", 32)
    pair.check()
    assert pair.native.num_computed(twin) == 4 * PAGE


def test_a_prompt_that_needs_its_own_cached_pages_does_not_evict_them():
    pair = CorePair(4, PAGE)
    pair.prune(root(pair, 2 * PAGE))
    kind, (error, _, numbers) = pair.call("create", list(range(100, 100 + 5 * PAGE)))
    assert (kind, error, numbers) == ("raised", OutOfPages, [3, 2, 0, 2, 4])
    (again,) = pair.make("create", list(range(100, 100 + 4 * PAGE)))
    pair.check()
    assert pair.native.num_computed(again) == 2 * PAGE


# --- K11: conservation when something is cancelled in any state ---


@pytest.mark.parametrize("state", ["created", "planned", "computed", "forked", "copy pending"])
def test_pruning_in_any_state_gives_every_page_back(pair, state):
    branch = root(pair, 10, computed=state in ("computed", "forked", "copy pending"))
    plan = pair.plan([branch], [3]) if state == "planned" else None
    if state in ("forked", "copy pending"):
        (fork,) = pair.make("fork", branch)
        if state == "copy pending":
            pair.call("append", fork, [1])
            plan = pair.plan([branch, fork], [64, 64])
    for live in list(pair.live):
        pair.prune(live)
        pair.check()
    if plan is not None:
        plan.close("commit")
    pair.check()
    pair.call("evict", 32)
    assert free_pages(pair) == 32


def test_an_append_that_does_not_fit_changes_nothing_and_says_the_numbers():
    pair = CorePair(4, PAGE)
    branch = root(pair, 10)
    kind, (error, text, numbers) = pair.call("append", branch, [1] * 7)
    assert (kind, error, numbers) == ("raised", OutOfPages, [2, 1, 0, 3, 4])
    assert "2 needed, 1 free + 0 cached of a budget of 4" in text
    kind, _ = pair.call("append", branch, [1] * 6)
    assert kind == "returned"


def test_siblings_of_a_row_that_gets_no_page_go_on():
    pair = CorePair(4, PAGE)
    branch = root(pair, 7)
    forks = pair.make("fork_many", branch, 3)
    pair.prune(branch)
    kind, status = pair.call("append_batch", [*forks, 77], [1, 2, 3, 4], [0.0] * 4)
    assert (kind, status.tolist()) == ("returned", [0, 0, 1, 2])
    pair.compute_all()


def test_a_branch_that_changed_since_its_token_was_chosen_does_not_get_it(pair):
    branch = root(pair, 7)
    forks = pair.make("fork_many", branch, 5)
    pair.prune(forks[3])
    pair.call("append", forks[1], [1])
    pair.call("rollback", forks[2], 1)
    kind, status = pair.call("append_batch", forks, [5, 6, 7, 8, 9], None, [7, 7, 7, 7, 7])
    assert (kind, status.tolist()) == ("returned", [0, 3, 3, 2, 0])
    assert [pair.native.num_tokens(f) for f in (forks[0], *forks[1:3], forks[4])] == [8, 8, 6, 8]
    pair.compute_all()


def test_a_branch_named_twice_in_a_batch_gets_the_first_token_only(pair):
    branch = root(pair, 3)
    _, status = pair.call("append_batch", [branch, branch], [5, 6], [-1.0, -2.0], [3, 3])
    assert status.tolist() == [0, 3]
    assert pair.native.tokens(branch, 3).tolist() == [5]


def test_the_length_is_checked_before_the_pages():
    pair = CorePair(2, PAGE)
    branch = root(pair, 2 * PAGE)
    _, status = pair.call("append_batch", [branch, branch], [1, 1], None, [7, 8])
    assert status.tolist() == [3, 1]


def test_out_of_handles_and_positions_are_refused(pair):
    branch = root(pair, 5)
    for call in [("fork_many", branch, 0), ("fork_at", branch, 6), ("rollback", branch, 5)]:
        kind, (error, _, _) = pair.call(*call)
        assert (kind, error) == ("raised", InvalidArgument)
