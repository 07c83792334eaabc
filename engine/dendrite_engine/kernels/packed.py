"""Packed pages: K or V of one layer as codes and scales, and the layout in which they lie.

A pool is one array `[pages, page_bytes]` of bytes; a page holds all layers. Per layer and kv head
it has four parts, for pages of P tokens (a multiple of 16) and heads of D dimensions (the same):

* K codes `[P / 16, D, 16]`: 16 slots of one dimension lie together, so that their scores are one
  vector;
* V codes `[P, D / 16, 16]`: 16 dimensions of one slot lie together;
* K scales, then V scales: `[items, P]`, where a format has them.

16 codes are one group. Codes of 32, 16 and 8 bits are little-endian; two codes of 4 bits share a
byte, the first in its low half; four of 2 bits the same; 3 bits are a plane of the low two bits
(4 bytes) and then one of the third (2 bytes).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.hadamard import norm, transform

GROUP = 16


class VectorCodec(Protocol):
    """How one head's K or V vector is turned into codes and scales; see `VectorFormat`."""

    @property
    def name(self) -> str:
        """Name of the format."""

    @property
    def native_id(self) -> int:
        """Its number in the native module."""

    @property
    def bits(self) -> int:
        """Bits of a code: 2, 3, 4, 8, 16 or 32."""

    @property
    def scale_width(self) -> int:
        """Bytes of one scale: 0, 1 or 2."""

    @property
    def is_rotated(self) -> bool:
        """Codes are of the rotated vector."""

    def scale_items(self, head_dim: int) -> int:
        """Scales of one vector."""

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes i32 [..., D] and scale bytes u8 [..., items, width] of fp32 vectors [..., D]."""

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What codes and scales stand for, fp32 [..., D], in the basis they are stored in."""


class CodedPages(ABC):
    """K or V of one layer as codes and scales, in whatever layout they lie.

    Attributes:
        data: u8 [pages, page_bytes], the whole pool.
        codec: how a vector is stored.
        page_size, kv_heads, head_dim: sizes.
        signs: fp32 [kv_heads, head_dim] of the rotation, or None.
        mean: fp32 [kv_heads, head_dim], subtracted before K is stored, or None.
    """

    data: torch.Tensor
    codec: VectorCodec
    page_size: int
    kv_heads: int
    head_dim: int
    signs: torch.Tensor | None
    mean: torch.Tensor | None

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.data.shape[0]

    @abstractmethod
    def read(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes i32 [n, kv_heads, P, D] and scales u8 [n, kv_heads, P, items, width]."""

    @abstractmethod
    def write(self, page_ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Store what `read` returns."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of vectors [..., kv_heads, D]; each depends on that vector alone."""
        return self.codec.quantise(self._centred(x), self.signs)

    def stored(self, page_ids: torch.Tensor) -> torch.Tensor:
        """What pages hold in the basis of their codes, fp32 [n, kv_heads, P, D]: K without mean."""
        return self.codec.levels(*self.read(page_ids))

    def restored(self, page_ids: torch.Tensor) -> torch.Tensor:
        """`stored` in the basis of the model, fp32 [n, kv_heads, P, D]; for the plain oracle."""
        return self._restored(self.stored(page_ids).transpose(1, 2)).transpose(1, 2)

    def _restored(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors [..., kv_heads, D] back in the basis of the model, with the mean."""
        if self.signs is not None:
            vectors = transform(vectors) * norm(self.head_dim) * self.signs
        return vectors if self.mean is None else vectors + self.mean

    def _centred(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.mean is None else x - self.mean

    def _check(self, end: int) -> None:
        """Raise InvalidArgument for a pool whose pages have no byte end - 1, or wrong tables."""
        data = self.data
        if data.dtype != torch.uint8 or data.ndim != 2 or not data.is_contiguous():
            raise InvalidArgument(
                f"packed pages must be contiguous uint8 [pages, bytes], got {data.dtype} "
                f"{list(data.shape)}"
            )
        if data.shape[1] < end:
            raise InvalidArgument(
                f"pages of {data.shape[1]} bytes do not hold {self.codec.name!r}, which reads up "
                f"to byte {end}: was the pool made for another format?"
            )
        for name, tensor in (("signs", self.signs), ("mean", self.mean)):
            if tensor is not None and tuple(tensor.shape) != (self.kv_heads, self.head_dim):
                raise InvalidArgument(
                    f"{name} must be [{self.kv_heads}, {self.head_dim}], got {list(tensor.shape)}"
                )


@dataclass(frozen=True, eq=False)
class PackedPages(CodedPages):
    """K or V of one layer in a packed pool of the CPU path.

    Attributes:
        data: u8 [pages, page_bytes], the whole pool.
        codec: how a vector is stored.
        head_stride: bytes from one kv head to the next.
        codes_at, scales_at: where the first head's codes and scales begin in a page.
        is_key: the layout of K, else that of V.
        page_size, kv_heads, head_dim: sizes.
        signs: fp32 [kv_heads, head_dim] of the rotation, or None.
        mean: fp32 [kv_heads, head_dim], subtracted before K is stored, or None.
        first: where the pages lie that have a finer format, or None; see `FirstPages`. It holds
            the vectors in the basis of these codes.
        first_index: i32 [pages], place in `first` or -1.
        address: the same as numbers, for the native module.
    """

    data: torch.Tensor
    codec: VectorCodec
    head_stride: int
    codes_at: int
    scales_at: int
    is_key: bool
    page_size: int
    kv_heads: int
    head_dim: int
    signs: torch.Tensor | None
    mean: torch.Tensor | None
    first: PackedPages | None = None
    first_index: torch.Tensor | None = None
    address: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        end = max(self.codes_at + self.code_bytes, self.scales_at + self.scale_bytes)
        self._check(end + self.head_stride * (self.kv_heads - 1))
        object.__setattr__(self, "address", self._address())

    def _address(self) -> tuple[int, ...]:
        return (
            self.data.data_ptr(), self.data.shape[0], self.data.shape[1], self.head_stride,
            self.codes_at, self.scales_at, self.codec.native_id, int(self.is_key), self.page_size,
            self.kv_heads, self.head_dim,
            0 if self.signs is None else self.signs.data_ptr(),
            0 if self.mean is None else self.mean.data_ptr(),
            0 if self.first_index is None else self.first_index.data_ptr(),
            *(() if self.first is None else self.first.address),
        )  # fmt: skip

    @property
    def code_bytes(self) -> int:
        """Bytes of one kv head's codes in a page."""
        return self.page_size * self.head_dim * self.codec.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of one kv head's scales in a page."""
        return self.page_size * self.codec.scale_items(self.head_dim) * self.codec.scale_width

    def read(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See CodedPages."""
        size, dim = self.page_size, self.head_dim
        groups = self._part(page_ids, self.codes_at, self.code_bytes)
        width = 2 * self.codec.bits  # bytes of a group
        groups = groups.reshape(*groups.shape[:2], self.code_bytes // width, width)
        codes = unpack(groups, self.codec.bits)
        if self.is_key:
            codes = codes.reshape(*codes.shape[:2], size // GROUP, dim, GROUP).transpose(3, 4)
        scales = self._part(page_ids, self.scales_at, self.scale_bytes)
        items, width = self.codec.scale_items(dim), self.codec.scale_width
        lead = codes.shape[:2]
        strip = scales.reshape(*lead, items, size, width).transpose(2, 3)
        return codes.reshape(*lead, size, dim), strip

    def write(self, page_ids: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """See CodedPages."""
        lead, size, dim = codes.shape[:2], self.page_size, self.head_dim
        if self.is_key:
            codes = codes.reshape(*lead, size // GROUP, GROUP, dim).transpose(3, 4)
        groups = pack(codes.reshape(*lead, -1, GROUP), self.codec.bits)
        self._set_part(page_ids, self.codes_at, groups.reshape(*lead, -1))
        self._set_part(page_ids, self.scales_at, scales.transpose(2, 3).reshape(*lead, -1))

    def encode_first(self, x: torch.Tensor) -> torch.Tensor:
        """What a first page stores of vectors [..., kv_heads, D]: in the basis of the codes."""
        x = self._centred(x)
        return x if self.signs is None else transform(x * self.signs) * norm(self.head_dim)

    def stored(self, page_ids: torch.Tensor) -> torch.Tensor:
        """See CodedPages; what first pages hold is there too."""
        vectors = super().stored(page_ids)
        if self.first is not None and self.first_index is not None:
            places = self.first_index[page_ids].long()
            vectors[places >= 0] = self.first.stored(places[places >= 0])
        return vectors

    def _part(self, page_ids: torch.Tensor, begin: int, length: int) -> torch.Tensor:
        pages = self.data[page_ids]
        heads = [pages[:, begin + h * self.head_stride :][:, :length] for h in range(self.kv_heads)]
        return torch.stack(heads, dim=1)

    def _set_part(self, page_ids: torch.Tensor, begin: int, part: torch.Tensor) -> None:
        for head in range(self.kv_heads):
            at = begin + head * self.head_stride
            self.data[page_ids, at : at + part.shape[-1]] = part[:, head]


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Groups of codes i32 [..., n] as bytes u8 [..., n * bits / 8]; n is a multiple of 8."""
    if bits == 32:
        return codes.to(torch.int32).contiguous().view(torch.uint8)
    if bits >= 8:
        shifts = torch.arange(0, bits, 8, device=codes.device)
        return ((codes[..., None] >> shifts) & 255).to(torch.uint8).flatten(-2)
    if bits == 3:
        return torch.cat((pack(codes & 3, 2), pack(codes >> 2, 1)), dim=-1)
    per_byte = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    return (parts << torch.arange(0, 8, bits, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: i32 [..., n]."""
    if bits == 32:
        return groups.contiguous().view(torch.int32)
    length = groups.shape[-1]
    if bits >= 8:
        parts = groups.reshape(*groups.shape[:-1], length * 8 // bits, bits // 8).to(torch.int32)
        return (parts << torch.arange(0, bits, 8, device=groups.device)).sum(-1).to(torch.int32)
    if bits == 3:
        plane = length * 2 // 3
        return unpack(groups[..., :plane], 2) | unpack(groups[..., plane:], 1) << 2
    shifts = torch.arange(0, 8, bits, device=groups.device)
    values = groups[..., None].to(torch.int32) >> shifts
    return (values & ((1 << bits) - 1)).flatten(-2).to(torch.int32)
