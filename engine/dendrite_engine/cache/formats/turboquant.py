"""tq4, tq3, tq2: rotated vectors, each coordinate at 4, 3 or 2 bits of a Lloyd-Max codebook.

TurboQuant (Zandieh et al., arXiv 2504.19874), Algorithm 1. Its second stage (a 1-bit sketch of the
residual) is left out: it makes scores unbiased and far noisier. The norm is replaced by the least-
squares scale of the chosen levels, as in EDEN (Vargaftik et al., ICML 2022).
"""

from __future__ import annotations

import math

import torch

from dendrite_engine.cache.formats.vector import VectorFormat, half_bytes, half_scale
from dendrite_engine.kernels.hadamard import transform, tree_sum

# Lloyd-Max levels of a standard normal variable: the positive half, and the limits between them.
CENTROIDS = {
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}
BOUNDARIES = {
    2: (0.981599,),
    3: (0.500550, 1.049957, 1.747927),
    4: (0.258222, 0.522404, 0.799550, 1.099286, 1.437139, 1.843532, 2.400803),
}


class TurboQuant(VectorFormat):
    """Codes of y = R x / |x| * sqrt(d), with R = Walsh-Hadamard times random signs, and one fp16
    scale. R makes coordinates close to normal whatever x was, so one codebook serves all heads.
    """

    scale_width = 2
    is_rotated = True

    @property
    def centroids(self) -> torch.Tensor:
        """Levels in increasing order, fp32 [2^bits]; the code is the place."""
        half = CENTROIDS[self.bits]
        return torch.tensor([*(-c for c in reversed(half)), *half])

    @property
    def boundaries(self) -> torch.Tensor:
        """Limits between the levels, fp32 [2^bits - 1]."""
        half = BOUNDARIES[self.bits]
        return torch.tensor([*(-b for b in reversed(half)), 0.0, *half])

    def quantise(
        self, x: torch.Tensor, signs: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Code: how many boundaries are at most y. Scale: norm / sqrt(d) * <y, level> / <level,
        level>, so that reading needs no correction of the norm; 0 for a zero vector.
        """
        norm = tree_sum(x * x).sqrt()
        inverse = torch.where(norm == 0, 0.0, 1.0 / norm)
        y = transform(x if signs is None else x * signs) * inverse[..., None]
        codes = torch.zeros(x.shape, dtype=torch.int32, device=x.device)
        for boundary in self.boundaries:
            codes += y >= boundary
        level = self.centroids.to(x.device)[codes.long()]
        ratio = tree_sum(y * level) / tree_sum(level * level)
        scale = norm * x.new_tensor(1.0 / math.sqrt(x.shape[-1])) * ratio
        return codes, half_bytes(scale.to(torch.float16))

    def levels(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Level times scale, of the rotated vector."""
        return self.centroids.to(codes.device)[codes.long()] * half_scale(scales)


def _bound(bits: int) -> float:
    """Upper bound of the mean squared error, sqrt(3) * pi / 2 * 4^-bits (Theorem 1)."""
    return math.sqrt(3) * math.pi / 2 * 4.0**-bits


class Tq4(TurboQuant):
    """4 bits: relative squared error 0.0093."""

    name = "tq4"
    native_id = 6
    bits = 4
    error_bound = _bound(4)


class Tq3(TurboQuant):
    """3 bits: relative squared error 0.034."""

    name = "tq3"
    native_id = 7
    bits = 3
    error_bound = _bound(3)


class Tq2(TurboQuant):
    """2 bits: relative squared error 0.116."""

    name = "tq2"
    native_id = 8
    bits = 2
    error_bound = _bound(2)
