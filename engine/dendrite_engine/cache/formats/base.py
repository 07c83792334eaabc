"""Contract of a page format: how a page stores K and V."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine.cache.formats.device_packed import DevicePackedStore
    from dendrite_engine.cache.formats.packed import PackedStore


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


@dataclass(frozen=True, slots=True)
class DenseStore:
    """K and V of a pool of unquantised pages: tensors [num_layers, num_pages, ...]."""

    k: torch.Tensor
    v: torch.Tensor


class PageFormat(ABC):
    """A value type that answers size questions and allocates the tensors of a pool."""

    name: str

    @abstractmethod
    def bytes_per_token(self, shape: PageShape) -> int:
        """Bytes of K and V of one token in all layers, side data included."""

    def bytes_per_page(self, shape: PageShape) -> int:
        """Bytes of K and V of one page in all layers."""
        return self.bytes_per_token(shape) * shape.page_size

    def pool_bytes(self, shape: PageShape) -> int:
        """Bytes of a pool of `shape.num_pages` pages."""
        return self.bytes_per_page(shape) * shape.num_pages

    def ratio(self, shape: PageShape) -> float:
        """How many times less memory a token takes than with 16-bit numbers."""
        numbers = 2 * shape.num_layers * shape.kv_heads * shape.head_dim
        return 2 * numbers / self.bytes_per_token(shape)

    @abstractmethod
    def allocate(self, shape: PageShape) -> DenseStore | PackedStore | DevicePackedStore:
        """Memory for a pool, uninitialised on the CPU."""


def pool_shape(
    page_format: PageFormat, unit: PageShape, num_pages: int | None, budget: int
) -> PageShape:
    """Shape of a pool of `num_pages` pages, or with None of as many as `budget` bytes hold.

    Args:
        page_format: how a page stores K and V.
        unit: the shape of a pool of one page.
        num_pages: pages, or None.
        budget: bytes; not looked at when num_pages is given.

    Raises:
        InvalidArgument: the budget holds no page.
    """
    if num_pages is None:
        page_bytes = page_format.pool_bytes(unit)
        num_pages = _most_pages(page_format, unit, budget)
        if num_pages < 1:
            raise InvalidArgument(
                f"kv_budget of {budget} bytes holds no page: one page of this model takes "
                f"{page_bytes} bytes ({unit.page_size} tokens, {page_format.name})"
            )
    return replace(unit, num_pages=num_pages)


def _most_pages(page_format: PageFormat, unit: PageShape, budget: int) -> int:
    """The largest pool that fits; its bytes grow with its pages."""
    low, high = 0, budget // page_format.bytes_per_page(unit)
    while low < high:
        middle = (low + high + 1) // 2
        fits = page_format.pool_bytes(replace(unit, num_pages=middle)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
