"""The rotation of TurboQuant pages: random signs, then the Walsh-Hadamard transform.

Every operation is one rounded float32 addition in a stated order, so that the native kernels, and
later those of a GPU, give the same bits.
"""

from __future__ import annotations

import math

import torch

_ROUND = 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53  # the finaliser of MurmurHash3
_MASK = (1 << 64) - 1


def transform(x: torch.Tensor) -> torch.Tensor:
    """Unnormalised Walsh-Hadamard transform of the last dimension, a power of two.

    Neighbours first (distance 1, 2, 4, ...): each step replaces (a, b) by (a + b, a - b). Applied
    twice it gives head_dim times the input. O(d log d) per vector.
    """
    shape, dim = x.shape, x.shape[-1]
    distance = 1
    while distance < dim:
        pairs = x.reshape(*shape[:-1], dim // (2 * distance), 2, distance)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((a + b, a - b), dim=-2).reshape(shape)
        distance *= 2
    return x


def norm(dim: int) -> float:
    """The factor that makes `transform` orthonormal: 1 / sqrt(dim)."""
    return 1.0 / math.sqrt(dim)


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum of the last dimension (a power of two), halves added onto each other: one fixed order."""
    width = x.shape[-1]
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def random_signs(seed: int, layer: int, side: int, kv_heads: int, head_dim: int) -> torch.Tensor:
    """Signs of one layer's rotation, fp32 [kv_heads, head_dim] of +-1.

    Sign (h, d) is the top bit of a hash of (seed, layer, side, h, d): the same on every machine.

    Args:
        seed: of the page format.
        layer: index of the layer.
        side: 0 for K, 1 for V.
        kv_heads, head_dim: of the model.
    """
    base = _mix(_mix(seed) ^ (layer << 1 | side))
    bits = [
        _mix(base ^ (head << 32 | coordinate)) >> 63
        for head in range(kv_heads)
        for coordinate in range(head_dim)
    ]
    return torch.tensor(bits, dtype=torch.float32).mul_(-2).add_(1).reshape(kv_heads, head_dim)


def _mix(value: int) -> int:
    """A bijection of 64-bit integers whose output bits depend on all input bits."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    for factor in _ROUND:
        value = ((value ^ (value >> 33)) * factor) & _MASK
    return value ^ (value >> 33)
