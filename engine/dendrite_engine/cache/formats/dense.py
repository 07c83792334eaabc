"""Unquantised pages in the layout that the CPU kernels read."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.base import DenseStore, PageFormat, PageShape


class DenseFp32(PageFormat):
    """float32, K transposed inside a page so that the scores of its slots are one vector.

    K is [layers, pages, kv_heads, head_dim, page_size], V is [layers, pages, kv_heads, page_size,
    head_dim]: one (layer, page, kv head) is one contiguous tile of each.
    """

    name = "fp32"

    def bytes_per_token(self, shape: PageShape) -> int:
        """K and V of all layers: 2 * layers * kv_heads * head_dim * 4 bytes."""
        return 2 * shape.num_layers * shape.kv_heads * shape.head_dim * 4

    def allocate(self, shape: PageShape) -> DenseStore:
        """K and V; memory is committed by the operating system as pages are first written."""
        lead = (shape.num_layers, shape.num_pages, shape.kv_heads)
        return DenseStore(
            torch.empty(*lead, shape.head_dim, shape.page_size),
            torch.empty(*lead, shape.page_size, shape.head_dim),
        )
