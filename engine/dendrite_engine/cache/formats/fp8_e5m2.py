"""fp8_e5m2: the upper byte of fp16, without scales."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.vector import VectorFormat, no_scales

TOP = 57344.0  # largest finite E5M2 number


class Fp8E5M2(VectorFormat):
    """OCP E5M2, rounded to nearest even, saturating: relative error of a number at most 2^-3.

    Numbers below 2^-14 lose precision, so K and V have to be of ordinary size; those of language
    models are.
    """

    name = "fp8_e5m2"
    native_id = 4
    bits = 8
    error_bound = 2.0**-6

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rounded numbers' codes; what is infinite becomes NaN."""
        del signs
        x = torch.where(x.isinf(), torch.nan, x).clamp(-TOP, TOP).to(torch.float8_e5m2)
        codes = x.contiguous().view(torch.uint8).to(torch.int32)
        return codes, no_scales(codes)

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers as fp32."""
        del scales
        return codes.to(torch.uint8).contiguous().view(torch.float8_e5m2).float()
