"""Packed pages on a device: the formats of the CPU path in the layout that device kernels read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dendrite_engine.cache.formats.base import PageShape
from dendrite_engine.cache.formats.packed import LayerFormat, PackedFormat, rotation_signs
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.device_packed import CELL, DevicePages, Rotation, device_pages

KERNEL_HEAD_DIMS = (64, 96, 128, 256)
_LARGE = 4096.0  # of poisoned V; finite in every format, times any scale that comes of it


class DevicePackedFormat(PackedFormat):
    """A table of layer formats for pages on a device; see PackedFormat.

    Args:
        name: for reports.
        layers: one entry per layer.
        device: of the pool.
        key_mean: as in PackedFormat.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[LayerFormat],
        device: torch.device,
        key_mean: torch.Tensor | None = None,
    ) -> None:
        super().__init__(name, layers, key_mean)
        self.device = device

    def check(self, shape: PageShape) -> None:
        """See PackedFormat; GPUs have kernels for some sizes of heads only."""
        super().check(shape)
        if self.device.type == "cuda" and shape.head_dim not in KERNEL_HEAD_DIMS:
            raise InvalidArgument(
                f"kv_format {self.name!r} has GPU kernels for head_dim "
                f"{', '.join(map(str, KERNEL_HEAD_DIMS))}, and this model's is {shape.head_dim}: "
                "take kv_format='auto'"
            )

    def cell_bytes(self, shape: PageShape) -> int:
        """Bytes of the largest cell of a layer; see kernels.device_packed."""
        return CELL * max(layer.head_bytes(shape) for layer in self.layers) // shape.page_size

    def allocate(self, shape: PageShape) -> DevicePackedStore:
        """One array of bytes on the device, all zero: kernels rely on every V being finite."""
        self.check(shape)
        return DevicePackedStore(self, shape)


class DevicePackedStore:
    """The bytes of a pool on a device, and each layer's views of them.

    Attributes:
        data: u8 [num_pages, page_bytes].
        layers: K and V of each layer.
    """

    def __init__(self, page_format: DevicePackedFormat, shape: PageShape) -> None:
        device, size = page_format.device, page_format.bytes_per_page(shape)
        self.data = torch.zeros(shape.num_pages, size, dtype=torch.uint8, device=device)
        self._tables = [_tables(page_format, index, shape) for index in range(shape.num_layers)]
        self._format, self._shape = page_format, shape
        self.layers = self._views(self.data)
        self._poison: torch.Tensor | None = None

    def _views(self, data: torch.Tensor) -> list[tuple[DevicePages, DevicePages]]:
        shape, begin, views = self._shape, 0, []
        sizes = shape.page_size, shape.kv_heads, shape.head_dim
        for layer, tables in zip(self._format.layers, self._tables, strict=True):
            sides = layer.key, layer.value
            views.append(device_pages(data, begin, sizes, sides, tables))
            begin += views[-1][0].layer_bytes
        return views

    def poison(self, index: torch.Tensor) -> None:
        """Fill pages: K with NaN, V with large numbers.

        Kernels multiply every V of a page that they read, by 0 where a row does not see it.
        """
        if self._poison is None:
            self._poison = self._poisoned_page()
        self.data[index.to(self.data.device)] = self._poison

    def _poisoned_page(self) -> torch.Tensor:
        """u8 [page_bytes]."""
        page = torch.full_like(self.data[:1], 255)
        ids = torch.zeros(1, dtype=torch.int64, device=page.device)
        for _keys, values in self._views(page):
            codes, _ = values.read(ids)
            vectors = torch.full(codes.shape, _LARGE, device=page.device)
            values.write(ids, *values.codec.quantise(vectors, None))
        return page[0]


def _tables(page_format: DevicePackedFormat, index: int, shape: PageShape) -> Rotation:
    layer, mean, device = page_format.layers[index], page_format.key_mean, page_format.device
    signs = [
        rotation_signs(side, index, number, shape)
        for number, side in enumerate((layer.key, layer.value))
    ]
    on_device = [
        None if table is None else table.contiguous().to(device)
        for table in (*signs, None if mean is None else mean[index].float())
    ]
    return Rotation(*on_device)
