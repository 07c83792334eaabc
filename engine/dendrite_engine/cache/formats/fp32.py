"""fp32: nothing is lost; for pairs in which only K or only V is quantised."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.vector import VectorFormat, no_scales


class Fp32(VectorFormat):
    """IEEE single precision."""

    name = "fp32"
    native_id = 0
    bits = 32
    error_bound = 0.0

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers' bits."""
        del signs
        codes = x.contiguous().view(torch.int32)
        return codes, no_scales(codes)

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """The numbers."""
        del scales
        return codes.to(torch.int32).contiguous().view(torch.float32)
