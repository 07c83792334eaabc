"""fp16: IEEE half precision, rounded to nearest even."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.vector import VectorFormat, no_scales


class Fp16(VectorFormat):
    """11 bits of significand: relative error of a number at most 2^-12 between 6e-5 and 65504.

    What is larger becomes infinite, which ends the branch with a numeric error.
    """

    name = "fp16"
    native_id = 2
    bits = 16
    error_bound = 2.0**-24

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rounded numbers' bits."""
        del signs
        codes = x.to(torch.float16).contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        return codes, no_scales(codes)

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers as fp32."""
        del scales
        return codes.to(torch.int16).contiguous().view(torch.float16).float()
