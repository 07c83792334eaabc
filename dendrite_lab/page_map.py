"""Which branch holds which page: the table behind `plots.memory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dendrite_engine.errors import StaleBranch

_MAX_NAMED = 12  # branches named in one hover text


@dataclass(frozen=True, eq=False)
class PageMap:
    """Pages of branches, rows in tree order.

    Attributes:
        branches: branch id of each row.
        branches_total: live branches, those without a row included.
        holders: [rows, columns] how many branches hold the page read there; NaN past a path's end.
        labels: [rows, columns] page ids as text.
        sharers: [rows, columns] names of the branches that hold the page.
        live, shared, free, total: pages of the pool.
    """

    branches: list[int]
    branches_total: int
    holders: NDArray[np.float64]
    labels: list[list[str]]
    sharers: list[list[str]]
    live: int
    shared: int
    free: int
    total: int


def read_page_map(engine: Any, max_branches: int) -> PageMap:
    """The page map of all live branches; rows for the first `max_branches` of them.

    Reads while other threads may prune: a branch that goes meanwhile is left out. O(pages held).
    """
    paths: dict[int, list[int]] = {}
    held_by: dict[int, list[int]] = {}
    for branch in tree_order(engine.branches):
        try:
            segments = engine.core.segments(branch.handle)
        except StaleBranch:
            continue  # pruned between listing and reading
        paths[branch.id] = pages_read(segments, engine.core.page_size)
        for page in {page for segment in segments for page in segment[4]}:
            held_by.setdefault(page, []).append(branch.id)
    rows = list(paths)[:max_branches]
    width = max((len(paths[row]) for row in rows), default=0)
    holders = np.full((len(rows), width), np.nan)
    labels = [[""] * width for _ in rows]
    sharers = [[""] * width for _ in rows]
    names = {page: _names(ids) for page, ids in held_by.items()}
    for i, row in enumerate(rows):
        for j, page in enumerate(paths[row]):
            holders[i, j] = len(held_by[page])
            labels[i][j], sharers[i][j] = str(page), names[page]
    stats = engine.stats()
    return PageMap(
        rows, len(paths), holders, labels, sharers,
        stats.pages_live, stats.pages_shared, stats.pages_free, stats.pages_total,
    )  # fmt: skip


def pages_read(segments: list[Any], page_size: int) -> list[int]:
    """Page ids that a branch reads along its path, root first.

    Where it wrote into a copy of a shared partial page, it reads the copy in the original's place;
    the original is held all the same, by the segment above.
    """
    places: dict[int, int] = {}
    for _, start, _, _, pages in segments:
        for offset, page in enumerate(pages):
            places[start // page_size + offset] = page
    return [places[place] for place in sorted(places)]


def tree_order(branches: list[Any]) -> list[Any]:
    """Branches with each one's children right after it, oldest first."""
    live = {branch.id for branch in branches}
    below: dict[int, list[Any]] = {}
    for branch in branches:
        parent = branch.parent
        while parent is not None and parent.id not in live:
            parent = parent.parent
        below.setdefault(0 if parent is None else parent.id, []).append(branch)
    order: list[Any] = []
    stack = below.get(0, [])[::-1]
    while stack:
        branch = stack.pop()
        order.append(branch)
        stack.extend(reversed(below.get(branch.id, [])))
    return order


def _names(ids: list[int]) -> str:
    shown = " ".join(f"#{branch}" for branch in ids[:_MAX_NAMED])
    return shown if len(ids) <= _MAX_NAMED else f"{shown} and {len(ids) - _MAX_NAMED} more"
