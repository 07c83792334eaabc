"""Matrix products on the device, into buffers that were allocated before.

A few rows of 16-bit numbers go to the engine's own kernels, which fetch weights while the kernels
ahead of them still run: skinny_linear for small matrices, stream_linear (on Hopper) for the others
and for more rows. The rest goes to cuBLAS. Which of them runs is a function of the matrix and the
number of rows.

cuBLAS picks its kernel, and with it the order in which the products of a row are added up, by the
number of rows. At a fixed number of rows a row's bits depend neither on its place nor on the other
rows. So the deterministic mode multiplies tiles of DEVICE_DETERMINISTIC_TILE rows, whatever stands
in the rows that nobody needs: by stream_linear where it serves, else by cuBLAS. Larger tiles of
cuBLAS are used where a comparison at load time showed that they give bitwise the same rows, so that
prompts do not pay for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

DEVICE_DETERMINISTIC_TILE = 64
# Where the engine's own kernels win on an H100, measured by benchmarks/gpu/skinny_linear_check.py
# and stream_linear_times.py: skinny_linear up to so many rows and numbers in the matrix,
# stream_linear up to so many rows where the matrix has at least so many numbers.
SKINNY_LIMITS = ((8, 1 << 23),)
SKINNY_LIMITS_WITHOUT_STREAM = ((8, 1 << 24), (16, 1 << 23))
STREAM_LIMITS = ((64, 0), (128, 1 << 25))
_SKINNY_INPUTS = 8  # it wants a multiple of this many inputs
_STREAM_INPUTS, _STREAM_OUTPUTS = 64, 8
# Deterministic: up to so many inputs and with so many outputs, a product is not shared out over
# blocks, so that it adds up as larger tiles of cuBLAS do. Others would take too long that way in
# every step, and are multiplied 128 rows at a time in prompts.
_UNSPLIT_INPUTS, _UNSPLIT_OUTPUTS = 4096, 4096
_STREAM_TILE = 128  # rows
_TILES = (2048, 1024, 512, 256, 128)  # candidates, largest first
_PROBE_BYTES = 256 << 20  # of one probe's output


class DeviceLinear:
    """y = x W^T + b, written into `out`.

    Attributes:
        weight: [out_features, in_features] in the compute dtype.
        bias: [out_features] or None.
        tiles: the numbers of rows that may be multiplied at once, largest first; empty: any.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        ops: Any = None,
        deterministic: bool = False,
    ) -> None:
        self.weight, self.bias = weight.contiguous(), bias
        self._transposed = self.weight.t()
        self._ops, self._deterministic = ops, deterministic
        self._skinny_rows, self._stream_rows = 0, 0
        if ops is not None:
            self._skinny_rows, self._stream_rows = _rows_of_kernels(self.weight, ops)
        self._splits = 0  # of stream_linear: its own choice
        self.tiles: tuple[int, ...] = ()
        if deterministic:
            self._skinny_rows = 0
            self._stream_rows = _STREAM_TILE if self._stream_rows else 0
            outputs, inputs = self.weight.shape
            self._splits = int(inputs <= _UNSPLIT_INPUTS and outputs >= _UNSPLIT_OUTPUTS)
            self.tiles = self._first_tiles()

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply all rows.

        Args:
            x: compute dtype [rows, in_features], contiguous. With `tiles`, rows is a multiple of
                the smallest tile.
            out: [rows, out_features], compute dtype or fp32.
        """
        rows = x.shape[0]
        if rows <= self._skinny_rows:
            self._ops.skinny_linear(x, self.weight, self.bias, out)
        elif rows <= self._stream_rows:
            self._ops.stream_linear(x, self.weight, self.bias, out, 0, self._splits)
        elif not self.tiles:
            self._multiply(x, out)
        else:
            self._multiply_tiles(x, out)

    def serves_silu_mul(self, rows: int) -> bool:
        """Whether `silu_mul` takes so many rows."""
        if self.bias is not None or (self._deterministic and self._splits != 1):
            return False  # shared out over blocks it may add up in another order than the product
        return rows <= max(self._skinny_rows, self._stream_rows)

    def silu_mul(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply and gate in one kernel; the weight holds the gates, then the ups.

        Args:
            x: compute dtype [rows, in_features], contiguous.
            out: compute dtype [rows, out_features / 2].
        """
        if x.shape[0] <= self._skinny_rows:
            self._ops.skinny_linear_silu_mul(x, self.weight, out)
        else:
            self._ops.stream_linear_silu_mul(x, self.weight, out, 0, self._splits)

    def _multiply_tiles(self, x: torch.Tensor, out: torch.Tensor) -> None:
        begin, rows = 0, x.shape[0]
        for tile in self.tiles:
            while rows - begin >= tile:
                part = slice(begin, begin + tile)
                if tile <= self._stream_rows:
                    self(x[part], out[part])
                else:
                    self._multiply(x[part], out[part])
                begin += tile

    def _multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if out.dtype != x.dtype:
            _multiply_to_fp32(x, self._transposed, self.bias, out)
        elif self.bias is None:
            torch.mm(x, self._transposed, out=out)
        else:
            torch.addmm(self.bias, x, self._transposed, out=out)

    def find_tiles(self, max_rows: int, out_dtype: torch.dtype) -> tuple[int, ...]:
        """Set `tiles` to those that give bitwise the rows of the smallest one, and return them.

        Compared on random data with this matrix; cuBLAS chooses by shape, so what holds for one
        matrix holds for all of its shape.
        """
        outputs, inputs = self.weight.shape
        limit = min(max_rows, _PROBE_BYTES // (outputs * 4))
        self.tiles = self._first_tiles()
        candidates = [tile for tile in _TILES if self.tiles[0] < tile <= limit]
        if not candidates:
            return self.tiles
        x = _random_rows(candidates[0], inputs, self.weight)
        expected = torch.empty(candidates[0], outputs, dtype=out_dtype, device=x.device)
        self._multiply_tiles(x, expected)
        found = torch.empty_like(expected)
        equal = []
        for tile in candidates:
            for begin in range(0, candidates[0], tile):
                self._multiply(x[begin : begin + tile], found[begin : begin + tile])
            if torch.equal(found, expected):
                equal.append(tile)
        self.tiles = (*equal, *self.tiles)
        return self.tiles

    def _first_tiles(self) -> tuple[int, ...]:
        """The tiles that need no comparison."""
        if self._stream_rows:  # a row of stream_linear has the same bits in every number of rows
            return (_STREAM_TILE, DEVICE_DETERMINISTIC_TILE)
        return (DEVICE_DETERMINISTIC_TILE,)


def _rows_of_kernels(weight: torch.Tensor, ops: Any) -> tuple[int, int]:
    """Rows up to which skinny_linear and stream_linear serve a weight, 0: not at all."""
    outputs, inputs = weight.shape
    numbers = weight.numel()
    stream = 0
    if inputs % _STREAM_INPUTS == outputs % _STREAM_OUTPUTS == 0 and ops.stream_linear_serves(
        weight.view(-1)
    ):
        stream = max((rows for rows, least in STREAM_LIMITS if numbers >= least), default=0)
    limits = SKINNY_LIMITS if stream else SKINNY_LIMITS_WITHOUT_STREAM
    skinny = max((rows for rows, most in limits if numbers <= most), default=0)
    return (0 if inputs % _SKINNY_INPUTS else skinny), stream


def _random_rows(rows: int, width: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(like.device)
    generator.manual_seed(rows * width)
    x = torch.empty(rows, width, dtype=like.dtype, device=like.device)
    return x.normal_(generator=generator)


def _multiply_to_fp32(
    x: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """A product of 16-bit numbers whose sums are not rounded to 16 bits."""
    if x.is_cuda:
        torch.ops.aten.mm.dtype_out(x, transposed, torch.float32, out=out)
    else:
        torch.mm(x.float(), transposed.float(), out=out)
    if bias is not None:
        out += bias


class DeviceLinearFactory:
    """Makes the linear layers of one model.

    Attributes:
        deterministic: one way of adding up for every number of rows.
        reason: what multiplies, for `Engine.report()`.
    """

    def __init__(self, ops: Any, dtype: torch.dtype, *, deterministic: bool = False) -> None:
        self.deterministic = deterministic
        self._ops = ops if dtype != torch.float32 else None
        self._made: list[DeviceLinear] = []
        self.reason = self._plain_reason()

    def _plain_reason(self) -> str:
        if self.deterministic:
            return f"tiles of {DEVICE_DETERMINISTIC_TILE} rows"
        if self._ops is None:
            return "cublas by torch.mm"
        return "skinny_linear and stream_linear for few rows, cublas by torch.mm for the rest"

    def __call__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> DeviceLinear:
        """Linear of `weight` [out, in] and `bias` [out] or None."""
        linear = DeviceLinear(weight, bias, ops=self._ops, deterministic=self.deterministic)
        self._made.append(linear)
        return linear

    @torch.inference_mode()
    def find_tiles(self, max_rows: int, fp32_outputs: Iterable[DeviceLinear]) -> None:
        """Deterministic mode: find the larger tiles of every shape made so far, once per shape.

        Args:
            max_rows: rows of a batch at most.
            fp32_outputs: those of the layers that write fp32 (the output matrix).
        """
        if not self.deterministic:
            return
        wide = {id(linear) for linear in fp32_outputs}
        known: dict[tuple[Any, ...], tuple[int, ...]] = {}
        for linear in self._made:
            dtype = torch.float32 if id(linear) in wide else linear.weight.dtype
            key = (*linear.weight.shape, linear.bias is None, dtype)
            if key not in known:
                known[key] = linear.find_tiles(max_rows, dtype)
            linear.tiles = known[key]
        shapes = (f"{key[0]}x{key[1]}: {_listed(tiles)}" for key, tiles in known.items())
        self.reason = "bitwise equal tiles of rows by matrix: " + "; ".join(shapes)


def _listed(tiles: tuple[int, ...]) -> str:
    return " ".join(str(tile) for tile in reversed(tiles))
