"""Twins of the products of a few rows with a weight, in plain torch.

x is [M, K], weight [N, K], both contiguous; the kernels take fp16 and bf16, M <= 16 and K a
multiple of 8. Products are summed in fp32 and rounded once, to the dtype of out.

The kernels add up a row in an order that depends on K (stream_linear's on K and N) alone: a row has
bitwise the same result for every number of rows, at every place and whatever the other rows hold.
They begin to read the weight before work ahead of them has ended: after a weight was written,
synchronize before its first use.
"""

from __future__ import annotations

import torch


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Out [M, N], of the dtype of x or fp32, = x weight^T + bias [N]."""
    product = x.float() @ weight.float().T
    out.copy_(product if bias is None else product + bias.float())


def skinny_linear_silu_mul(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Out [M, N / 2] = silu(x gates^T) * (x ups^T); weight [N, K] holds the gates, then the ups.

    Both products are rounded to the dtype of x in between: bitwise skinny_linear, then silu_mul.
    """
    gate, up = (x.float() @ weight.float().T).to(x.dtype).float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def stream_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    groups: int = 0,
    splits: int = 0,
) -> None:
    """Out [M, N], of the dtype of x or fp32, = x weight^T + bias [N], on Hopper.

    M <= 128, K a multiple of 64, N of 4. How the kernel cuts the product, 0 for its own choice:

    Args:
        x, weight, bias, out: see above.
        groups: warpgroups of a block, 1 or 2; they make no difference to the result.
        splits: blocks that share the inputs, at most 8; the order of the sums follows them.
    """
    del groups, splits
    skinny_linear(x, weight, bias, out)


def stream_linear_silu_mul(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, groups: int = 0, splits: int = 0
) -> None:
    """See skinny_linear_silu_mul and stream_linear; N a multiple of 8."""
    del groups, splits
    skinny_linear_silu_mul(x, weight, out)


def stream_linear_serves(like: torch.Tensor) -> bool:
    """Whether the device of `like` [n] has these kernels; here they are always there."""
    del like
    return True
