"""Rotary position embedding tables, in the variants that Llama, Mistral and Qwen3 checkpoints use.

Sources: RoPE, Su et al. 2021 (arXiv 2104.09864); linear interpolation, Chen et al. 2023
    (2306.15595);
YaRN, Peng et al. 2023 (2309.00071); the "llama3" rule, as published with Llama 3.1.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dendrite_engine.errors import ModelError
from dendrite_engine.models.config import ModelConfig

ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "yarn")


def rope_tables(config: ModelConfig, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [max_positions, head_dim / 2], attention scaling folded in.

    Raises:
        ModelError: the checkpoint asks for a rope type that is not implemented.
    """
    inv_freq, scaling = _inverse_frequencies(config)
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = torch.outer(positions, inv_freq)
    return (angles.cos() * scaling).contiguous(), (angles.sin() * scaling).contiguous()


def _inverse_frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    rope, dim = config.rope, config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    plain = 1.0 / (float(rope["rope_theta"]) ** exponents)
    kind = rope["rope_type"]
    # "dynamic" only differs past the original context, which max_context does not exceed.
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return plain / float(rope["factor"]), 1.0
    if kind == "llama3":
        return _llama3(plain, rope), 1.0
    if kind == "yarn":
        return _yarn(plain, rope, dim, config.max_context)
    raise ModelError(f"rope type {kind!r} is not supported; known: {', '.join(ROPE_TYPES)}")


def _llama3(plain: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    factor = float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi / plain
    slowed = torch.where(wavelength > original / low, plain / factor, plain)
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * slowed / factor + smooth * slowed
    medium = (wavelength >= original / high) & (wavelength <= original / low)
    return torch.where(medium, blended, slowed)


def _yarn(
    plain: torch.Tensor, rope: dict[str, Any], dim: int, max_context: int
) -> tuple[torch.Tensor, float]:
    factor, base = float(rope["factor"]), float(rope["rope_theta"])
    original = float(rope.get("original_max_position_embeddings") or max_context)
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(fast), correction(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    inv_freq = plain / factor * ramp + plain * (1 - ramp)
    return inv_freq, _yarn_scaling(rope, factor)


def _yarn_scaling(rope: dict[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(factor, rope["mscale"]) / mscale(factor, rope["mscale_all_dim"])
    return mscale(factor)
