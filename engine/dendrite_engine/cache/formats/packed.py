"""Pages of codes: any vector format for K, any for V, another pair for some layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dendrite_engine.cache.formats.base import PageFormat, PageShape
from dendrite_engine.cache.formats.vector import VectorFormat
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels import hadamard
from dendrite_engine.kernels.packed import GROUP, PackedPages

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
    """

    def __init__(
        self, name: str, layers: Sequence[LayerFormat], key_mean: torch.Tensor | None = None
    ) -> None:
        self.name = name
        self.layers = tuple(layers)
        self.key_mean = key_mean

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
        for layer in self.layers:
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
        """Codes and scales of one page, all layers."""
        return shape.kv_heads * sum(layer.head_bytes(shape) for layer in self.layers)

    def allocate(self, shape: PageShape) -> PackedStore:
        """One array of bytes; memory is committed as pages are first written."""
        self.check(shape)
        return PackedStore(self, shape)


class PackedStore:
    """The bytes of a pool, and each layer's views of them.

    Attributes:
        data: u8 [num_pages, page_bytes]; a page is one run of bytes, all layers.
        layers: K and V of each layer.
    """

    def __init__(self, page_format: PackedFormat, shape: PageShape) -> None:
        size = page_format.bytes_per_page(shape)
        self.data = torch.empty(shape.num_pages, size, dtype=torch.uint8)
        self.layers: list[tuple[PackedPages, PackedPages]] = []
        begin = 0
        for index, layer in enumerate(page_format.layers):
            self.layers.append(self._views(page_format, shape, index, begin))
            begin += layer.head_bytes(shape) * shape.kv_heads

    def _views(
        self, page_format: PackedFormat, shape: PageShape, index: int, begin: int
    ) -> tuple[PackedPages, PackedPages]:
        layer, dim, size = page_format.layers[index], shape.head_dim, shape.page_size
        sides = (layer.key, layer.value)
        codes = [begin, begin + size * dim * layer.key.bits // 8]
        scales = [codes[1] + size * dim * layer.value.bits // 8, 0]
        scales[1] = scales[0] + size * layer.key.scale_items(dim) * layer.key.scale_width
        mean = None if page_format.key_mean is None else page_format.key_mean[index].contiguous()
        key, value = (
            PackedPages(
                self.data, side, layer.head_bytes(shape), codes[i], scales[i], i == 0, size,
                shape.kv_heads, dim, _signs(side, index, i, shape), mean if i == 0 else None,
            )
            for i, side in enumerate(sides)
        )  # fmt: skip
        return key, value


def _signs(side: VectorFormat, layer: int, index: int, shape: PageShape) -> torch.Tensor | None:
    if not side.is_rotated:
        return None
    return hadamard.random_signs(SEED, layer, index, shape.kv_heads, shape.head_dim)
