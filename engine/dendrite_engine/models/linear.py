"""Matrix products with weights packed once.

On CPU a decode step multiplies a few rows with every weight matrix. oneDNN's packed layout does
that at memory speed for 1..16 rows (`dendrite-lab bench gemm`); the plain call re-packs each time.

It also makes results independent of the batch: for two or more rows oneDNN adds up the products of
a row in an order that depends on the matrix alone, so a row's result is bitwise the same whatever
stands beside it. A single row may take another path, so it is padded to two, which costs nothing.
`deterministic` does not rely on that observation and runs fixed tiles of 16 rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

DETERMINISTIC_TILE = 16
_PACK_ROWS = 16


class Linear(Protocol):
    """y = x W^T + b for x fp32 [rows, in_features] -> fp32 [rows, out_features]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply the rows of x."""


class PlainLinear:
    """torch.nn.functional.linear: the twin, and the path where oneDNN is missing."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight, self.bias = weight.contiguous(), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 [rows, in] -> fp32 [rows, out]."""
        return functional.linear(x, self.weight, self.bias)


class PackedLinear:
    """oneDNN linear with the weight reordered once at load."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        self.bias = bias
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 [rows, in] -> fp32 [rows, out]."""
        rows = x.shape[0]
        x = functional.pad(x, (0, 0, 0, 1)) if rows == 1 else x
        y: torch.Tensor = self._run(x, self.packed, self.bias, "none", [], "")
        return y[:rows]


class TiledLinear:
    """Runs another linear in tiles of a fixed number of rows, zero-padded."""

    def __init__(self, inner: Linear, tile: int = DETERMINISTIC_TILE) -> None:
        self.inner, self.tile = inner, tile

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 [rows, in] -> fp32 [rows, out]; rows are padded to whole tiles."""
        rows = x.shape[0]
        padded = functional.pad(x, (0, 0, 0, -rows % self.tile))
        tiles = [self.inner(part) for part in padded.split(self.tile)]
        return torch.cat(tiles)[:rows] if len(tiles) > 1 else tiles[0][:rows]


class LinearFactory:
    """Chooses how weights are multiplied, once per model.

    Attributes:
        name: "onednn-packed" or "torch".
        reason: why this path was taken.
    """

    def __init__(self, *, packed: bool = True, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self.name, self.reason = "torch", "asked for"
        if packed:
            self._probe()

    def _probe(self) -> None:
        """Multiply a small matrix: the operators are torch-internal, so only a run is proof."""
        if not torch.backends.mkldnn.is_available():
            self.reason = "this torch build has no oneDNN"
            return
        try:
            weight, x = torch.ones(32, 16), torch.ones(2, 16)
            result = PackedLinear(weight)(x)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            self.reason = f"oneDNN packed linear failed: {str(error).splitlines()[0]}"
            return
        if torch.equal(result, functional.linear(x, weight)):
            self.name, self.reason = "onednn-packed", "weights are packed once at load"
        else:
            self.reason = "oneDNN packed linear gave a wrong result"

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        """Linear of `weight` fp32 [out, in] and `bias` fp32 [out] or None."""
        kind = PackedLinear if self.name == "onednn-packed" else PlainLinear
        inner: Linear = kind(weight, bias)
        return TiledLinear(inner) if self.deterministic else inner
