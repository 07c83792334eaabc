"""Contract of a page format: how a page stores K and V."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PageShape:
    """Sizes of a page pool.

    Attributes:
        num_layers, num_pages, kv_heads, head_dim: as in the model and the pool.
        page_size: tokens per page.
    """

    num_layers: int
    num_pages: int
    kv_heads: int
    head_dim: int
    page_size: int


class PageFormat(ABC):
    """A value type that answers size questions and allocates the tensors of a pool."""

    name: str

    @abstractmethod
    def bytes_per_token(self, shape: PageShape) -> int:
        """Bytes of K and V of one token in all layers, side data included."""

    def bytes_per_page(self, shape: PageShape) -> int:
        """Bytes of K and V of one page in all layers."""
        return self.bytes_per_token(shape) * shape.page_size

    @abstractmethod
    def allocate(self, shape: PageShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised K and V tensors; the first dimensions are [num_layers, num_pages, ...]."""
