"""fp8_e4m3: 8-bit floats with one fp16 scale per token and kv head."""

from __future__ import annotations

import torch

from dendrite_engine.cache.formats.vector import VectorFormat, half_bytes, half_scale

TOP = 448.0  # largest E4M3 number


class Fp8E4M3(VectorFormat):
    """OCP E4M3 (no infinity), scaled so that the vector's largest number is at most 448.

    The scale depends on the token alone, never on a page or tensor, and is rounded up to fp16 so
    that nothing saturates. Relative error of a number at most 2^-4, while it is above 2^-15 of the
    largest.
    """

    name = "fp8_e4m3"
    native_id = 3
    bits = 8
    scale_width = 2
    error_bound = 2.0**-8

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of x / scale, rounded to nearest even."""
        del signs
        largest = x.abs().amax(-1)
        scale = (largest / TOP).to(torch.float16)
        low = scale.float() * TOP < largest  # rounded down: one step up
        scale = (scale.view(torch.int16) + low.to(torch.int16)).view(torch.float16)
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
        return round_e4m3(x * inverse[..., None]), half_bytes(scale)

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Number times scale."""
        return e4m3_numbers(codes) * half_scale(scales)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 numbers as codes i32; beyond +-448 they saturate."""
    clamped = x.clamp(-TOP, TOP).to(torch.float8_e4m3fn)
    return clamped.contiguous().view(torch.uint8).to(torch.int32)


def e4m3_numbers(codes: torch.Tensor) -> torch.Tensor:
    """fp32 numbers of E4M3 codes."""
    return codes.to(torch.uint8).contiguous().view(torch.float8_e4m3fn).float()
