"""Contract of a vector format: how one head's K or V of one token is stored."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dendrite_engine.errors import InvalidArgument, NumericError
from dendrite_engine.kernels import hadamard


class VectorFormat(ABC):
    """Codes and scales of one vector; K and V each have one.

    A vector's bytes depend on nothing but the vector (and its layer and head), so that appending
    never touches what is stored, a copy of a page is a copy of its bytes, and a fork stores what
    its branch alone would have stored.

    Attributes:
        name: as in `kv_format`.
        native_id: number of the format in the native kernels.
        bits: of one code.
        scale_width: bytes of one scale, 0 without.
        is_rotated: codes are of the rotated vector; head_dim is a power of two.
        dim_step: head_dim has to be a multiple of this.
        error_bound: upper bound of mean ||x - x'||^2 / ||x||^2 over many vectors.
    """

    name: str
    native_id: int
    bits: int
    scale_width: int = 0
    is_rotated: bool = False
    dim_step: int = 16
    error_bound: float

    def check(self, head_dim: int) -> None:
        """Raise InvalidArgument where the format can't hold heads of this size."""
        if self.is_rotated and head_dim & (head_dim - 1):
            raise InvalidArgument(
                f"kv_format {self.name!r} rotates heads by a Walsh-Hadamard transform, so head_dim "
                f"must be a power of two; this model's is {head_dim}. Use fp8_e4m3 or bf16"
            )
        if head_dim % self.dim_step:
            raise InvalidArgument(
                f"kv_format {self.name!r} needs a head_dim that is a multiple of {self.dim_step}; "
                f"this model's is {head_dim}"
            )

    def scale_items(self, head_dim: int) -> int:
        """Scales of one vector."""
        del head_dim
        return 1 if self.scale_width else 0

    def vector_bytes(self, head_dim: int) -> int:
        """Bytes of one vector, scales included."""
        return head_dim * self.bits // 8 + self.scale_items(head_dim) * self.scale_width

    def encode(
        self, x: torch.Tensor, signs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of finite vectors.

        Args:
            x: fp32 [..., head_dim].
            signs: fp32, +-1, broadcast against x; None: all +1. Only rotated formats read it.

        Returns:
            codes i32 [..., head_dim] and scale bytes u8 [..., items, width].

        Raises:
            InvalidArgument: head_dim does not fit the format.
            NumericError: a number is NaN or infinite.
        """
        self.check(x.shape[-1])
        if not bool(torch.isfinite(x).all()):
            where = tuple(int(i) for i in (~torch.isfinite(x)).nonzero()[0])
            raise NumericError(
                f"{self.name}: x{list(where)} is {float(x[where])}; pages hold finite numbers only"
            )
        return self.quantise(x.float(), signs)

    def decode(
        self, codes: torch.Tensor, scales: torch.Tensor, signs: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The vectors that codes and scales stand for, fp32 [..., head_dim].

        For tests and figures: attention reads codes, and never makes this.
        """
        levels = self.levels(codes, scales)
        if not self.is_rotated:
            return levels
        restored = hadamard.transform(levels) * hadamard.norm(codes.shape[-1])
        return restored if signs is None else restored * signs

    @abstractmethod
    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`encode` without its checks; NaN and infinity give scales or codes that read as NaN."""

    @abstractmethod
    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What is stored, fp32 [..., head_dim], in the rotated basis where there is one."""


def no_scales(codes: torch.Tensor) -> torch.Tensor:
    """Scale bytes of a format without scales."""
    return codes.new_zeros((*codes.shape[:-1], 0, 0), dtype=torch.uint8)


def half_bytes(scale: torch.Tensor) -> torch.Tensor:
    """One fp16 scale per vector [...] as bytes u8 [..., 1, 2]."""
    return scale[..., None].contiguous().view(torch.uint8)[..., None, :]


def half_scale(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `half_bytes`, as fp32 [..., 1] to multiply vectors with."""
    return scales[..., 0, :].contiguous().view(torch.float16).float()
