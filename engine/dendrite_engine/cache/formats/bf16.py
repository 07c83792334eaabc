"""bf16: the upper half of fp32, rounded to nearest even."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.vector import VectorFormat, no_scales


class Bf16(VectorFormat):
    """8 bits of exponent, 8 of significand: relative error of a number at most 2^-9."""

    name = "bf16"
    native_id = 1
    bits = 16
    error_bound = 2.0**-18

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rounded numbers' bits."""
        del signs
        codes = x.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        return codes, no_scales(codes)

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers as fp32."""
        del scales
        return (codes.to(torch.int32) << 16).contiguous().view(torch.float32)
