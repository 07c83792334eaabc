"""The plan of the step after the one in flight, before anybody knows its tokens.

Where every branch of a step computes one token, the next step is known but for the token ids: each
branch that goes on gets one more slot, in the page that it writes or in a page that is free now. So
its pass can be launched while the tokens are still being drawn on the device. It changes nothing in
the tree. When the tokens have come, the real plan is made; where a branch's row in it has the slot
and the position that were foreseen, the row that was computed is the row that was asked for.

A pass that nobody asked for harms nobody: it writes K and V of slots that hold nothing, behind the
last token of a page that the branch owned, or in a free page. Whoever is given such a slot later
writes it in a later pass, before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dendrite_engine.attention.base import Plan


@dataclass(slots=True)
class AheadPlan:
    """A plan (see attention.base.Plan) whose token ids are places among the tokens being drawn.

    Attributes:
        token_ids: -1 - i for the token that branch i of the step in flight is about to get.
        rows: row of each branch of the step in flight, i64 [n]; -1: it does not go on.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    copies: np.ndarray
    logits_row: np.ndarray
    item_indptr: np.ndarray
    node_pos: np.ndarray
    node_len: np.ndarray
    node_row_begin: np.ndarray
    node_row_end: np.ndarray
    node_page_indptr: np.ndarray
    page_indices: np.ndarray
    rows: np.ndarray
    num_tokens: int = field(init=False)
    num_items: int = field(init=False)
    num_nodes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.num_items = len(self.positions)
        self.num_nodes = len(self.node_pos)

    def commit(self) -> None:
        """It is no plan of the core: there is nothing to record."""

    def cancel(self) -> None:
        """See `commit`."""

    def agrees(self, plan: Plan, places: np.ndarray) -> bool:
        """Whether the rows of the real plan were foreseen.

        Args:
            plan: of the step after the one in flight, one branch for each of `places`.
            places: of its branches among those of the step in flight, i64 [m].
        """
        rows, wanted = self.rows[places], plan.logits_row
        if plan.num_tokens != len(places) or len(plan.copies) or not len(places):
            return False
        if np.count_nonzero(rows < 0) or np.count_nonzero(wanted < 0):
            return False
        return bool(
            np.array_equal(self.slots[rows], plan.slots[wanted])
            and np.array_equal(self.positions[rows], plan.positions[wanted])
        )


def pages_needed(plan: Plan, rows: np.ndarray, page_size: int) -> int:
    """Pages that the branches of these rows i64 [m] of a plan take with their next token."""
    return int(np.count_nonzero((plan.positions[rows] + 1) % page_size == 0))


def foresee(
    plan: Plan, of_branch: np.ndarray, goes_on: np.ndarray, free_pages: np.ndarray, page_size: int
) -> AheadPlan | None:
    """The next step's plan, or None where it can't be told.

    Args:
        plan: of the step in flight, with one row for each of its n branches.
        of_branch: row of each branch, in the order in which they are given their tokens, [n].
        goes_on: which branches compute one more token, bool [n].
        free_pages: those that will be taken next, in this order, i32; at least `pages_needed`.
        page_size: slots of a page.
    """
    if plan.num_tokens != len(of_branch) or np.count_nonzero(of_branch < 0):
        return None
    tails = _tail_nodes(plan)
    if tails is None or np.count_nonzero(plan.slots < 0) or not goes_on.any():
        return None
    kept = np.zeros(plan.num_tokens, bool)
    kept[of_branch[goes_on]] = True
    before = np.concatenate(([0], np.cumsum(kept)))  # kept rows before each row
    starts_page = (plan.positions + 1) % page_size == 0
    slots = plan.slots + 1
    fresh = of_branch[goes_on & starts_page[of_branch]]  # rows that take a page, in branch order
    pages = free_pages[: len(fresh)]
    slots[fresh] = pages * page_size
    node_len = plan.node_len.copy()
    node_len[tails[~starts_page]] += 1
    count = int(before[-1])
    new_rows = before[fresh].astype(np.int32)
    indptr = plan.node_page_indptr
    places = np.full(plan.num_tokens, -1, np.int32)
    places[of_branch] = -1 - np.arange(len(of_branch), dtype=np.int32)
    return AheadPlan(
        token_ids=places[kept],
        positions=plan.positions[kept] + 1,
        slots=slots[kept],
        copies=np.zeros((0, 3), np.int32),
        logits_row=before[of_branch[goes_on]].astype(np.int32),
        item_indptr=np.arange(count + 1, dtype=np.int32),
        node_pos=np.concatenate((plan.node_pos, plan.positions[fresh] + 1)),
        node_len=np.concatenate((node_len, np.ones(len(fresh), np.int32))),
        node_row_begin=np.concatenate((before[plan.node_row_begin].astype(np.int32), new_rows)),
        node_row_end=np.concatenate((before[plan.node_row_end].astype(np.int32), new_rows + 1)),
        node_page_indptr=np.concatenate(
            (indptr, indptr[-1] + 1 + np.arange(len(fresh), dtype=np.int32))
        ),
        page_indices=np.concatenate((plan.page_indices, pages)),
        rows=np.where(goes_on, before[of_branch], -1),
    )


def _tail_nodes(plan: Plan) -> np.ndarray | None:
    """The node that ends with each row's own token and that no other row reads, i64 [T]."""
    begin = plan.node_row_begin
    alone = plan.node_row_end - begin == 1
    ends = plan.node_pos + plan.node_len
    nodes = np.flatnonzero(alone)
    nodes = nodes[ends[nodes] == plan.positions[begin[nodes]] + 1]
    if len(nodes) != plan.num_tokens:
        return None
    tails = np.full(plan.num_tokens, -1, np.int64)
    tails[begin[nodes]] = nodes
    return None if np.count_nonzero(tails < 0) else tails
