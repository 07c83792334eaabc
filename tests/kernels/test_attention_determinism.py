"""A row's attention is the same bits whatever else is in the batch."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tree_cases import Segment, TreeCase, attend, random_segments

from dendrite_engine import kernels

CASES = {
    "random tree": lambda: TreeCase(random_segments(11)),
    "many branches": lambda: TreeCase(
        [Segment(None, 0, 600, 1)] + [Segment(0, 600, 1 + n % 37, 1) for n in range(40)],
        heads=9, kv_heads=3, head_dim=64,
    ),
    "prefill": lambda: TreeCase([Segment(None, 0, 700, 300)], heads=3, kv_heads=1, head_dim=72),
    "nested": lambda: TreeCase(
        [Segment(None, 0, 90, 4), Segment(0, 90, 300, 30), Segment(1, 390, 5, 5),
         Segment(1, 390, 140, 2), Segment(0, 90, 1, 1)],
        heads=8, kv_heads=2, head_dim=40, page_size=8,
    ),
}  # fmt: skip


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]()


@pytest.fixture(params=[0, 100])
def window(request):
    return request.param


def test_a_row_alone_equals_the_row_in_its_batch(native, case, window):
    together = attend(native, case, window=window)
    for row in range(0, len(case.q), 3):
        alone = attend(native, case, case.plan.only_row(row), case.q[row : row + 1], window)
        assert torch.equal(alone[0], together[row])


def test_a_row_with_its_own_flat_page_list_equals_the_row_in_the_tree(native, case, window):
    assert torch.equal(
        attend(native, case, case.plan.flat(), window=window), attend(native, case, window=window)
    )


def test_cutting_nodes_into_single_pages_changes_nothing(native, case, window):
    assert torch.equal(
        attend(native, case, case.plan.cut(case.page_size), window=window),
        attend(native, case, window=window),
    )


def test_the_thread_count_changes_nothing(isa, case, window):
    results = [
        attend(kernels.load("native", isa=isa, threads=threads), case, window=window)
        for threads in (1, 2, 3, 64)
    ]
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_threads_that_share_one_implementation_do_not_disturb_each_other(native):
    cases = [make() for make in CASES.values()]
    expected = [attend(native, case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: attend(native, cases[i % 4]), range(24)))
    assert all(torch.equal(result, expected[i % 4]) for i, result in enumerate(results))


def test_reusing_scratch_between_different_batches_changes_nothing(native):
    cases = [make() for make in CASES.values()]
    first = [attend(native, case) for case in cases]
    again = [attend(native, case) for case in reversed(cases)]
    for before, after in zip(first, reversed(again), strict=True):
        assert torch.equal(before, after)
