"""First pages: the page that holds position 0 of a sequence, kept in a finer format.

Attention rests on the first tokens (a sink: Xiao et al., arXiv 2309.17453), whose K is unlike all
others, so an error there moves every weight. These pages lie in a small pool of their own; a table
says which page id has which of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from dendrite_engine.errors import OutOfPages


class FirstPages:
    """Bytes of first pages, and which page id they belong to.

    Args:
        capacity: first pages in the pool.
        num_pages: page ids there are.
        page_bytes: bytes of one first page, all layers.
        page_size: tokens per page.

    Attributes:
        data: u8 [capacity, page_bytes].
        index: i32 [num_pages], place of each page id in data; -1: an ordinary page.
    """

    def __init__(self, capacity: int, num_pages: int, page_bytes: int, page_size: int) -> None:
        self.data = torch.empty(capacity, page_bytes, dtype=torch.uint8)
        self.index = torch.full((num_pages,), -1, dtype=torch.int32)
        self._table = self.index.numpy()
        self._free = list(range(capacity))[::-1]
        self._page_size = page_size

    def prepare(self, plan: Any, page_state: Callable[[], np.ndarray] | None) -> None:
        """Give a place to each first page that this plan writes or copies, before it runs.

        Args:
            plan: its positions, slots and copies.
            page_state: state of each page id, 0 for free; asked for when places run short.

        Raises:
            OutOfPages: more first pages are held than there is room for.
        """
        stored = plan.slots >= 0
        pages, first = plan.slots[stored] // self._page_size, plan.positions[stored]
        first = first < self._page_size
        self._release(np.unique(pages[~first]))
        copies = np.asarray(plan.copies)
        begun = copies[self._table[copies[:, 0]] >= 0, :2] if len(copies) else copies[:, :2]
        wanted = np.union1d(np.unique(pages[first]), begun[:, 1])
        missing = wanted[self._table[wanted] < 0]
        if len(missing) > len(self._free):
            self._sweep(page_state, wanted)
        if len(missing) > len(self._free):
            self._refuse(len(missing))
        for page in missing.tolist():
            place = self._free.pop()
            self._table[page] = place
            self.data[place] = 255  # reads as NaN until it is written
        for source, target in begun.tolist():
            self.data[self._table[target]] = self.data[self._table[source]]

    def rows(self, page_ids: torch.Tensor) -> torch.Tensor:
        """Places of those of these pages that are first pages."""
        places = self.index[page_ids]
        return places[places >= 0].long()

    def _release(self, pages: np.ndarray) -> None:
        held = pages[self._table[pages] >= 0]
        self._free += self._table[held].tolist()
        self._table[held] = -1

    def _sweep(self, page_state: Callable[[], np.ndarray] | None, wanted: np.ndarray) -> None:
        """Take back the places of pages that nobody holds any more."""
        if page_state is not None:
            free = np.flatnonzero(page_state() == 0)
            self._release(np.setdiff1d(free, wanted))

    def _refuse(self, need: int) -> None:
        capacity = len(self.data)
        raise OutOfPages(
            need,
            len(self._free),
            0,
            capacity - len(self._free),
            capacity,
            "These are first pages (kv_first_page): prune branches, or take kv_first_page=None",
        )
