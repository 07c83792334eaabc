"""Trees of tree_cases.py in packed pages, filled by the twin of the store."""

from __future__ import annotations

import copy

import torch
from tree_cases import TreeCase

from dendrite_engine.cache.formats.base import PageShape
from dendrite_engine.cache.formats.choice import layer_format
from dendrite_engine.cache.formats.packed import PackedFormat, PackedStore
from dendrite_engine.kernels import packed_reference

NAMES = ("fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "mxfp8", "tq4", "tq3", "tq2")
PAIRS = ("k8v4", "k4v2", "tq4/fp32", "fp32/tq3", "mxfp8/tq2", "fp8_e5m2/bf16")


def make_store(
    name: str, *, num_pages=4, kv_heads=2, head_dim=64, page_size=16, mean=None, first=None
):
    """A pool whose every byte is 255: whatever is read before it is written is NaN."""
    shape = PageShape(1, num_pages, kv_heads, head_dim, page_size)
    begun = None if first is None else layer_format(first)
    store = PackedFormat(name, [layer_format(name)], mean, begun).allocate(shape)
    store.data.fill_(255)
    if store.first is not None:
        store.first.data.fill_(255)
    return store


class PackedCase:
    """A TreeCase with its K and V in packed pages; what no row may read is NaN in both."""

    def __init__(self, case: TreeCase, name: str, mean=None, first=None) -> None:
        self.case, self.plan, self.q = case, case.plan, case.q
        self.store: PackedStore = make_store(
            name, num_pages=len(case.k_pages), kv_heads=case.kv_heads, head_dim=case.head_dim,
            page_size=case.page_size, mean=mean, first=first,
        )  # fmt: skip
        if first is not None:
            begun = {pages[0] for pos, _, _, _, pages in self.plan.nodes() if pos == 0 and pages}
            for place, page in enumerate(sorted(begun)):
                self.store.first.index[page] = place
        self.k_pages, self.v_pages = self.store.layers[0]
        keys = case.k_pages.permute(0, 3, 1, 2)  # [pages, P, kv_heads, D]
        values = case.v_pages.permute(0, 2, 1, 3)
        page, offset = (~keys[:, :, 0, 0].isnan()).nonzero(as_tuple=True)
        packed_reference.store(self.k_pages, keys[page, offset], page, offset)
        packed_reference.store(self.v_pages, values[page, offset], page, offset)

    def restored(self) -> TreeCase:
        """The same case with dense pages of what the packed ones stand for."""
        ids = torch.arange(self.k_pages.num_pages)
        keys, values = self.k_pages.restored(ids), self.v_pages.restored(ids)
        case = copy.copy(self.case)
        case.k_pages = keys.transpose(2, 3).contiguous()
        case.v_pages = values.contiguous()
        return case
