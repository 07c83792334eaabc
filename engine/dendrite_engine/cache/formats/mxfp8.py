"""mxfp8: E4M3 with one power-of-two scale for 32 dimensions (OCP microscaling)."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.fp8_e4m3 import TOP, e4m3_numbers, round_e4m3
from dendrite_engine.cache.formats.vector import VectorFormat

BLOCK = 32


class Mxfp8(VectorFormat):
    """OCP MX 1.0 elements; the E8M0 exponent is rounded up (NVIDIA, arXiv 2506.08027).

    The standard's own rule rounds down and saturates up to 511 at 448, which costs 6 times the
    error where a few dimensions are much larger than the rest.
    """

    name = "mxfp8"
    native_id = 5
    bits = 8
    scale_width = 1
    dim_step = BLOCK
    error_bound = 2.0**-8

    def scale_items(self, head_dim: int) -> int:
        """One for 32 dimensions."""
        return head_dim // BLOCK

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of x / 2^e with e = ceil(log2(largest / 448)); exponent 255 stands for NaN."""
        del signs
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
        ratio = blocks.abs().amax(-1) / TOP
        bits = ratio.contiguous().view(torch.int32).to(torch.int64)
        exponent = ((bits + 0x7FFFFF) >> 23).clamp(1, 255)  # of the next power of two
        exponent = torch.where(ratio.isfinite(), exponent, 255)
        inverse = ((254 - exponent) << 23).to(torch.int32).view(torch.float32)
        inverse = torch.where(exponent < 254, inverse, 0.0)
        codes = round_e4m3(blocks * inverse[..., None])
        return codes.reshape(x.shape), exponent.to(torch.uint8)[..., None]

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Number times 2^(exponent - 127)."""
        exponent = scales[..., 0].to(torch.int32)
        factor = (exponent << 23).contiguous().view(torch.float32)
        factor = torch.where(exponent == 255, torch.nan, factor)
        blocks = e4m3_numbers(codes).reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK, BLOCK)
        return (blocks * factor[..., None]).reshape(codes.shape)
