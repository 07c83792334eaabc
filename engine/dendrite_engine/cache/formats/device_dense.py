"""Unquantised pages in the layout that the device kernels read."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.base import DenseStore, PageFormat, PageShape


class DeviceDense(PageFormat):
    """K and V both token-major: [layers, pages, kv_heads, page_size, head_dim].

    Attributes:
        dtype: of a stored number; the same as the compute dtype.
    """

    dtype: torch.dtype

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def bytes_per_token(self, shape: PageShape) -> int:
        """K and V of all layers: 2 * layers * kv_heads * head_dim numbers."""
        return 2 * shape.num_layers * shape.kv_heads * shape.head_dim * self.dtype.itemsize

    def allocate(self, shape: PageShape) -> DenseStore:
        """K and V on the device, all zero: kernels rely on every V being finite."""
        sizes = (
            shape.num_layers, shape.num_pages, shape.kv_heads, shape.page_size, shape.head_dim,
        )  # fmt: skip
        return DenseStore(
            torch.zeros(sizes, dtype=self.dtype, device=self.device),
            torch.zeros(sizes, dtype=self.dtype, device=self.device),
        )


class Fp32(DeviceDense):
    """float32."""

    name = "fp32"
    dtype = torch.float32


class Bf16(DeviceDense):
    """bfloat16."""

    name = "bf16"
    dtype = torch.bfloat16


class Fp16(DeviceDense):
    """IEEE half precision."""

    name = "fp16"
    dtype = torch.float16
