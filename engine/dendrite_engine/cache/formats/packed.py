"""Pages of codes: any vector format for K, any for V, another pair for some layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dendrite_engine.cache.formats.base import PageFormat, PageShape
from dendrite_engine.cache.formats.first_pages import FirstPages
from dendrite_engine.cache.formats.vector import VectorFormat
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels import hadamard
from dendrite_engine.kernels.packed import GROUP, PackedPages

if TYPE_CHECKING:
    from dendrite_engine.cache.formats.device_packed import DevicePackedStore

SEED = 0x2504_19874  # of every rotation; part of the format, so that stored pages stay readable

MAX_HEAD_DIM = 512


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """How one layer stores K and V."""

    key: VectorFormat
    value: VectorFormat

    @property
    def name(self) -> str:
        """The format's name, or "key/value" where they differ."""
        same = self.key.name == self.value.name
        return self.key.name if same else f"{self.key.name}/{self.value.name}"

    def head_bytes(self, shape: PageShape) -> int:
        """Bytes of one kv head in a page, K and V."""
        dim = shape.head_dim
        return (self.key.vector_bytes(dim) + self.value.vector_bytes(dim)) * shape.page_size


class PackedFormat(PageFormat):
    """A table of layer formats.

    Args:
        name: for reports.
        layers: one entry per layer.
        key_mean: fp32 [num_layers, kv_heads, head_dim], subtracted from K before it is stored, or
            None. Softmax does not see it: it adds the same to every score of a query.
        first: format of the pages with position 0, or None.
        first_share: one first page for so many pages.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[LayerFormat],
        key_mean: torch.Tensor | None = None,
        first: LayerFormat | None = None,
        first_share: int = 16,
    ) -> None:
        self.name = name
        self.layers = tuple(layers)
        self.key_mean = key_mean
        self.first, self.first_share = first, first_share

    def check(self, shape: PageShape) -> None:
        """Raise InvalidArgument where the model or the page size does not fit."""
        if shape.page_size % GROUP:
            raise InvalidArgument(
                f"kv_format {self.name!r} needs pages of a multiple of {GROUP} tokens, got "
                f"page_size={shape.page_size}"
            )
        if shape.head_dim > MAX_HEAD_DIM:
            raise InvalidArgument(
                f"kv_format {self.name!r} holds heads of up to {MAX_HEAD_DIM}, got {shape.head_dim}"
            )
        if self.first is not None and (self.first.key.is_rotated or self.first.value.is_rotated):
            raise InvalidArgument(
                f"kv_first_page {self.first.name!r} is coarser than first pages are for: take "
                "bf16, fp16, fp32 or an 8-bit format"
            )
        for layer in self.layers if self.first is None else (*self.layers, self.first):
            layer.key.check(shape.head_dim)
            layer.value.check(shape.head_dim)
        wanted = (shape.num_layers, shape.kv_heads, shape.head_dim)
        if self.key_mean is not None and tuple(self.key_mean.shape) != wanted:
            raise InvalidArgument(
                f"the K mean is {list(self.key_mean.shape)}, this model needs {list(wanted)}: "
                "calibrate it again"
            )

    def bytes_per_token(self, shape: PageShape) -> int:
        """Codes and scales of all layers."""
        return self.bytes_per_page(shape) // shape.page_size

    def bytes_per_page(self, shape: PageShape) -> int:
        """Codes and scales of one page, all layers, without its share of the first pages."""
        return shape.kv_heads * sum(layer.head_bytes(shape) for layer in self.layers)

    def first_page_bytes(self, shape: PageShape) -> int:
        """Bytes of one first page, all layers; 0 without."""
        if self.first is None:
            return 0
        return shape.kv_heads * len(self.layers) * self.first.head_bytes(shape)

    def first_pages(self, num_pages: int) -> int:
        """First pages beside `num_pages` pages."""
        return 0 if self.first is None else min(num_pages, max(8, num_pages // self.first_share))

    def pool_bytes(self, shape: PageShape) -> int:
        """Bytes of a pool, first pages included."""
        first = self.first_pages(shape.num_pages) * self.first_page_bytes(shape)
        return shape.num_pages * self.bytes_per_page(shape) + first

    def allocate(self, shape: PageShape) -> PackedStore | DevicePackedStore:
        """One array of bytes; memory is committed as pages are first written."""
        self.check(shape)
        return PackedStore(self, shape)


class PackedStore:
    """The bytes of a pool, and each layer's views of them.

    Attributes:
        data: u8 [num_pages, page_bytes]; a page is one run of bytes, all layers.
        layers: K and V of each layer.
        first: the first pages, or None.
    """

    def __init__(self, page_format: PackedFormat, shape: PageShape) -> None:
        size = page_format.bytes_per_page(shape)
        self.data = torch.empty(shape.num_pages, size, dtype=torch.uint8)
        self.first: FirstPages | None = None
        if page_format.first is not None:
            self.first = FirstPages(
                page_format.first_pages(shape.num_pages), shape.num_pages,
                page_format.first_page_bytes(shape), shape.page_size,
            )  # fmt: skip
        self._format, self._shape = page_format, shape
        self.layers: list[tuple[PackedPages, PackedPages]] = []
        begin = 0
        for index, layer in enumerate(page_format.layers):
            self.layers.append((self._side(index, begin, True), self._side(index, begin, False)))
            begin += layer.head_bytes(shape) * shape.kv_heads

    def _side(self, index: int, begin: int, is_key: bool) -> PackedPages:
        layer, shape, mean = self._format.layers[index], self._shape, self._format.key_mean
        side = layer.key if is_key else layer.value
        mean = mean[index].contiguous() if is_key and mean is not None else None
        signs = rotation_signs(side, index, 0 if is_key else 1, shape)
        first = self._first_side(index, is_key)
        table = None if self.first is None else self.first.index
        return _view(self.data, layer, shape, begin, is_key, signs, mean, first, table)

    def _first_side(self, index: int, is_key: bool) -> PackedPages | None:
        layer, shape = self._format.first, self._shape
        if layer is None or self.first is None:
            return None
        begin = index * layer.head_bytes(shape) * shape.kv_heads
        return _view(self.first.data, layer, shape, begin, is_key)


def _view(
    data: torch.Tensor,
    layer: LayerFormat,
    shape: PageShape,
    begin: int,
    is_key: bool,
    signs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    first: PackedPages | None = None,
    first_index: torch.Tensor | None = None,
) -> PackedPages:
    """K or V of the layer whose bytes begin at `begin` in each page."""
    dim, size = shape.head_dim, shape.page_size
    side = layer.key if is_key else layer.value
    value_codes = begin + size * dim * layer.key.bits // 8
    key_scales = value_codes + size * dim * layer.value.bits // 8
    value_scales = key_scales + size * layer.key.scale_items(dim) * layer.key.scale_width
    return PackedPages(
        data, side, layer.head_bytes(shape), begin if is_key else value_codes,
        key_scales if is_key else value_scales, is_key, size, shape.kv_heads, dim, signs, mean,
        first, first_index,
    )  # fmt: skip


def rotation_signs(
    side: VectorFormat, layer: int, index: int, shape: PageShape
) -> torch.Tensor | None:
    """Signs of K (index 0) or V (1) of a layer, fp32 [kv_heads, head_dim]; None unless rotated."""
    if not side.is_rotated:
        return None
    return hadamard.random_signs(SEED, layer, index, shape.kv_heads, shape.head_dim)
