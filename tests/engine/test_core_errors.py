"""Bad arguments of the control plane: the same typed error from both cores, nothing changed."""

from __future__ import annotations

import numpy as np
import pytest
from core_pair import CorePair, outcome

from dendrite_engine.cache import make_core
from dendrite_engine.errors import EmptyPrompt, IntegrityError, InvalidArgument, StaleBranch


@pytest.fixture
def pair():
    pair = CorePair(16, 4)
    pair.make("create", [1, 2, 3, 4, 5])
    pair.compute_all()
    return pair


BAD_TOKENS = [
    [1, -1],
    [[1, 2], [3, 4]],
    [1.5],
    [2**40],
    "text",
    None,
    7,
    [True],
    [[1], [2, 3]],
    np.array([2**31], dtype=np.int64),
    np.array([2**63], dtype=np.uint64),
]


@pytest.mark.parametrize("tokens", BAD_TOKENS, ids=repr)
def test_bad_tokens_are_refused_and_named(pair, tokens):
    for call in (("create", tokens), ("append", pair.live[0], tokens), ("match_prefix", tokens)):
        kind, (error, text, _) = pair.call(*call)
        assert (kind, error) == ("raised", InvalidArgument)
        assert "tokens" in text


def test_an_empty_prompt_is_refused_as_such(pair):
    kind, (error, _, _) = pair.call("create", [])
    assert (kind, error) == ("raised", EmptyPrompt)


@pytest.mark.parametrize("array", [[3, 4], (3, 4), np.array([3, 4]), np.arange(6)[3:5]], ids=repr)
def test_any_integer_sequence_is_taken(pair, array):
    pair.call("append", pair.live[0], array)
    assert pair.native.tokens(pair.live[0], 5).tolist() == [3, 4]


def test_strided_and_unsigned_arrays_are_taken(pair):
    pair.call("append", pair.live[0], np.arange(8, dtype=np.uint16)[::2])
    assert pair.native.tokens(pair.live[0], 5).tolist() == [0, 2, 4, 6]
    pair.check()


@pytest.mark.parametrize("branch", [0, -1, 1, 7 << 32, (1 << 32) + 9, 2**62])
@pytest.mark.parametrize(
    "call",
    [
        ("fork",),
        ("fork_many", 2),
        ("fork_at", 1),
        ("append", [1]),
        ("rollback", 1),
        ("prune",),
        ("num_tokens",),
        ("num_computed",),
        ("tokens",),
        ("logprobs",),
        ("segments",),
    ],
    ids=lambda call: call[0],
)
def test_an_unknown_handle_is_stale_in_every_call(pair, call, branch):
    kind, (error, text, _) = pair.call(call[0], branch, *call[1:])
    assert (kind, error) == ("raised", StaleBranch)
    assert str(branch) in text


@pytest.mark.parametrize("method", ["plan", "page_tables"])
def test_a_stale_handle_in_a_batch_is_named(pair, method):
    args = [[pair.live[0], 99]] + ([[1, 1]] if method == "plan" else [])
    kind, (error, text, _) = pair.call(method, *args)
    assert (kind, error) == ("raised", StaleBranch)
    assert "99" in text


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("fork_many", (-1,)),
        ("fork_many", (0,)),
        ("fork_many", (2**20 + 1,)),
        ("fork_at", (0,)),
        ("fork_at", (-3,)),
        ("fork_at", (6,)),
        ("rollback", (0,)),
        ("rollback", (-1,)),
        ("rollback", (5,)),
        ("tokens", (-1,)),
        ("tokens", (6,)),
        ("logprobs", (6,)),
        ("append", ([1, 2], [0.5])),
        ("append", ([1], [[0.5]])),
        ("append", ([1], ["x"])),
    ],
)
def test_numbers_out_of_range_are_refused(pair, method, args):
    kind, (error, _, _) = pair.call(method, pair.live[0], *args)
    assert (kind, error) == ("raised", InvalidArgument)


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("evict", (-1,)),
        ("plan", ([1 << 32], [0])),
        ("plan", ([1 << 32], [-5])),
        ("plan", ([1 << 32], [1, 1])),
        ("append_batch", ([1 << 32], [1, 2], [0.0, 0.0])),
        ("append_batch", ([1 << 32], [1], [0.0, 0.0])),
        ("append_batch", ([1 << 32, 5], [1, -2], [0.0, 0.0])),
        ("append_batch", ([1 << 32], [1], None, [1, 2])),
        ("append_batch", ([1 << 32], [1], [0.0], [1 << 31])),
        ("append_batch", ([1 << 32], [1], [0.0], [0.5])),
        ("pending", ([1.5],)),
        ("describe", ([[1]],)),
    ],
)
def test_batches_of_wrong_shape_or_range_are_refused(pair, method, args):
    kind, (error, _, _) = pair.call(method, *args)
    assert (kind, error) == ("raised", InvalidArgument)


@pytest.mark.parametrize(
    ("pages", "size"), [(0, 16), (-1, 16), (4, 0), (4, 3), (4, 512), (2**31, 1)]
)
def test_pools_of_impossible_size_are_refused(pages, size):
    results = [
        outcome(make_core, pages, size, True, False, name) for name in ("native", "reference")
    ]
    assert results[0] == results[1]
    assert results[0][1][0] is InvalidArgument


def test_stale_handles_are_rows_of_minus_one_where_a_view_polls(pair):
    assert pair.native.pending([pair.live[0], 99]).tolist() == [0, -1]
    assert all(column[1] == -1 for column in pair.native.describe([pair.live[0], 99]).values())


def test_a_closed_plan_refuses_to_commit_again_and_ignores_cancel(pair):
    plan = pair.plan(pair.live, [1])
    plan.close("commit")
    assert plan.close("commit")[1][0] is InvalidArgument
    assert plan.close("cancel") == ("returned", None)


def test_debug_events_need_debug_mode():
    for name in ("native", "reference"):
        core = make_core(4, 4, True, False, name)
        for method in ("debug_events", "debug_unsealed"):
            assert outcome(getattr(core, method))[1][0] is InvalidArgument


def test_debug_events_name_taken_freed_sealed_and_unsealed_pages(pair):
    pair = CorePair(8, 4)
    (branch,) = pair.make("create", [1, 2, 3, 4, 5])
    pair.native.plan([branch], [9]).commit()
    assert pair.native.debug_events() == ([0, 1], [], [0])
    pair.native.rollback(branch, 2)
    pair.native.append(branch, [9])
    assert pair.native.debug_events() == ([], [1], [])
    assert pair.native.debug_unsealed() == [0]


LIES = {
    "a page reference too many": lambda tree: tree.pool.refs.__setitem__(0, 9),
    "a free page twice": lambda tree: tree.pool.free.append(tree.pool.free[-1]),
    "a live page on the free list": lambda tree: tree.pool.free.append(0),
    "a lost page": lambda tree: tree.pool.free.pop(),
    "a holder nobody counts": lambda tree: setattr(tree.segments[1], "handles", 0),
    "tokens that were never computed": lambda tree: setattr(tree.segments[1], "computed", 99),
    "a page missing": lambda tree: tree.segments[1].pages.pop(),
    "a live page marked cached": lambda tree: tree.index.make_cached(0),
    "a key of other tokens": lambda tree: setattr(tree.index.nodes[0], "tokens", (9, 9, 9, 9)),
}


@pytest.mark.parametrize("lie", LIES)
def test_the_recount_finds_every_kind_of_lie(pair, lie):
    pair.twin.check_integrity()
    LIES[lie](pair.twin._tree)
    with pytest.raises(IntegrityError):
        pair.twin.check_integrity()
