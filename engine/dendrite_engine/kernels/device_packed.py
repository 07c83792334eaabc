"""Packed pages on a device: K or V of one layer as codes and scales, and where they lie.

A pool is one array `[pages, page_bytes]` of bytes; a page holds all layers, and a layer begins at
byte `layer_at` of every page. A layer is cells `[page_size / 16][kv_heads]`, one run of bytes each,
so that a kernel fetches what it needs of 16 slots of one head in one piece. A cell has four parts:

* K codes `[16][D * bits / 8]`, then V codes: the codes of a token lie together, so that tokens are
  written in parallel without sharing a byte (on the CPU it is 16 slots that lie together);
* K scales `[16][items * width]`, then V scales, where a format has them.

Codes of 32, 16 and 8 bits are little-endian; of 2 bits the first lies in the low bits of a byte;
3 bits are a plane of the low two bits (D / 4 bytes), then one of the third (D / 8 bytes). Those of
4 bits are sign and magnitude, 8 in 4 bytes, with signs where kernels need them: `pack_signed`.
Codes and scales themselves are those of the CPU's pages, and a page takes as many bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.packed import CodedPages, VectorCodec, pack, unpack
from dendrite_engine.registry import Registry

CELL = 16  # slots of a cell

# Of 8 codes of 4 bits: whose sign each nibble has in its highest bit, and which nibble has the sign
# of each code.
_SIGN_IN = (4, 0, 5, 1, 6, 2, 7, 3)
_SIGN_AT = (1, 3, 5, 7, 0, 2, 4, 6)

# Formats by their number, as operations take them.
CODECS: Registry[Callable[[], VectorCodec]] = Registry(
    "codec",
    {
        "0": "dendrite_engine.cache.formats.fp32:Fp32",
        "1": "dendrite_engine.cache.formats.bf16:Bf16",
        "2": "dendrite_engine.cache.formats.fp16:Fp16",
        "3": "dendrite_engine.cache.formats.fp8_e4m3:Fp8E4M3",
        "4": "dendrite_engine.cache.formats.fp8_e5m2:Fp8E5M2",
        "5": "dendrite_engine.cache.formats.mxfp8:Mxfp8",
        "6": "dendrite_engine.cache.formats.turboquant:Tq4",
        "7": "dendrite_engine.cache.formats.turboquant:Tq3",
        "8": "dendrite_engine.cache.formats.turboquant:Tq2",
    },
)


@functools.cache
def codec(number: int) -> VectorCodec:
    """The format with this `native_id`.

    Raises:
        UnknownName: there is none.
    """
    return CODECS.get(str(number))()


@dataclass(frozen=True, eq=False)
class DevicePages(CodedPages):
    """K or V of one layer in a packed pool of the device path; made by `device_pages`.

    Attributes:
        data: u8 [pages, page_bytes], the whole pool.
        codec: how a vector is stored.
        layer_at: where the layer begins in a page.
        cell_bytes: of one cell, K and V.
        codes_at, scales_at: where its codes and scales begin in a cell.
        page_size, kv_heads, head_dim: sizes.
        signs: fp32 [kv_heads, head_dim] of the rotation, or None.
        mean: fp32 [kv_heads, head_dim], subtracted before K is stored, or None.
    """

    data: torch.Tensor
    codec: VectorCodec
    layer_at: int
    cell_bytes: int
    codes_at: int
    scales_at: int
    page_size: int
    kv_heads: int
    head_dim: int
    signs: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.page_size % CELL:
            raise InvalidArgument(
                f"packed pages hold a multiple of {CELL} tokens, got page_size={self.page_size}"
            )
        self._check(self.layer_at + self.layer_bytes)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the layer in a page, K and V."""
        return self.page_size // CELL * self.kv_heads * self.cell_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one vector."""
        return self.head_dim * self.codec.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one vector."""
        return self.codec.scale_items(self.head_dim) * self.codec.scale_width

    def read(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See CodedPages."""
        lead = len(page_ids), self.kv_heads, self.page_size
        ids = page_ids.to(self.data.device)
        codes, scales = (
            part[ids].transpose(1, 2).reshape(*lead, part.shape[-1]) for part in self.parts()
        )
        return self._decoded(codes, scales)

    def write(self, page_ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """See CodedPages."""
        ids = page_ids.to(self.data.device)
        shape = (len(ids), self.kv_heads, self.page_size // CELL, CELL, -1)
        for part, rows in zip(self.parts(), (self._packed(codes), scales.flatten(-2)), strict=True):
            part[ids] = rows.reshape(*shape[:4], part.shape[-1]).transpose(1, 2)

    def read_slots(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes i32 [n, kv_heads, D] and scales u8 [n, kv_heads, items, width] of pool slots."""
        page, unit, offset = self._place(slots)
        codes, scales = (part[page, unit, :, offset] for part in self.parts())
        return self._decoded(codes, scales)

    def write_slots(self, slots: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Store what `read_slots` returns."""
        page, unit, offset = self._place(slots)
        for part, rows in zip(self.parts(), (self._packed(codes), scales.flatten(-2)), strict=True):
            part[page, unit, :, offset] = rows

    def stored_at(self, slots: torch.Tensor) -> torch.Tensor:
        """`stored` of single slots, fp32 [n, kv_heads, D]."""
        return self.codec.levels(*self.read_slots(slots))

    def restored_at(self, slots: torch.Tensor) -> torch.Tensor:
        """`restored` of single slots, fp32 [n, kv_heads, D]."""
        return self._restored(self.stored_at(slots))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of codes and scales, u8 [pages, units, kv_heads, 16, bytes]."""
        layer = self.data[:, self.layer_at : self.layer_at + self.layer_bytes]
        cells = layer.unflatten(1, (self.page_size // CELL, self.kv_heads, self.cell_bytes))
        places = (self.codes_at, self.row_bytes), (self.scales_at, self.scale_bytes)
        codes, scales = (
            cells[..., begin : begin + CELL * width].unflatten(-1, (CELL, width))
            for begin, width in places
        )
        return codes, scales

    def _place(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slots = slots.to(self.data.device).long()
        inside = slots % self.page_size
        return slots // self.page_size, inside // CELL, inside % CELL

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        return pack_signed(codes) if self.codec.bits == 4 else pack(codes, self.codec.bits)

    def _decoded(
        self, codes: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        items, width = self.codec.scale_items(self.head_dim), self.codec.scale_width
        strip = scales.reshape(*scales.shape[:-1], items, width)
        bits = self.codec.bits
        return unpack_signed(codes) if bits == 4 else unpack(codes, bits), strip


def pack_signed(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, i32 [..., n], as bytes u8 [..., n / 2]; n is a multiple of 8.

    Of 8 codes nibble i has the place of magnitude i among the positive levels, and the highest bit
    of each nibble the sign, 1 for a negative one, of the code that `_SIGN_IN` tells: the highest
    bits of the four bytes are signs 0 to 3, those 4 bits further down signs 4 to 7.
    """
    size = torch.where(codes < 8, 7 - codes, codes - 8).unflatten(-1, (-1, 8))
    negative = (codes < 8).to(codes.dtype).unflatten(-1, (-1, 8))[..., list(_SIGN_IN)]
    return pack((size | negative << 3).flatten(-2), 4)


def unpack_signed(groups: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_signed`: i32 [..., n]."""
    nibbles = unpack(groups, 4).unflatten(-1, (-1, 8))
    size, negative = nibbles & 7, (nibbles >> 3)[..., list(_SIGN_AT)]
    return torch.where(negative == 1, 7 - size, size + 8).flatten(-2)


@dataclass(frozen=True, slots=True)
class Rotation:
    """Tables of one layer on its device: fp32 [kv_heads, head_dim], or None where there is none."""

    k_signs: torch.Tensor | None = None
    v_signs: torch.Tensor | None = None
    k_mean: torch.Tensor | None = None


def device_pages(
    data: torch.Tensor, layer_at: int, sizes: tuple[int, int, int],
    codecs: tuple[VectorCodec, VectorCodec], tables: Rotation,
) -> tuple[DevicePages, DevicePages]:  # fmt: skip
    """K and V of the layer that begins at byte `layer_at` of every page.

    Args:
        data: u8 [pages, page_bytes].
        layer_at: a multiple of 16.
        sizes: page_size, kv_heads, head_dim.
        codecs: of K and of V.
        tables: signs and mean.

    Raises:
        InvalidArgument: the pages do not hold such a layer.
    """
    dim = sizes[2]
    key, value = codecs
    rows = [CELL * dim * side.bits // 8 for side in codecs]
    strips = [CELL * side.scale_items(dim) * side.scale_width for side in codecs]
    key_scales, cell = sum(rows), sum(rows) + sum(strips)
    return (
        DevicePages(
            data, key, layer_at, cell, 0, key_scales, *sizes, tables.k_signs, tables.k_mean
        ),
        DevicePages(
            data, value, layer_at, cell, rows[0], key_scales + strips[0], *sizes, tables.v_signs
        ),
    )
