"""The operations of the device path in plain torch: twins of the CUDA kernels, on any device.

Signatures, shapes and layouts are those of `device_ops.OPS`: K and V pages of a layer are
`[pages, kv_heads, page_size, head_dim]`, the residual stream is fp32, everything else has the
compute dtype, integers are int32. They compute in fp32 and round once, as the kernels do, and write
their outputs in place.
"""

from __future__ import annotations

import torch

_NAN = float("nan")


def take_tokens(token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
    """Each of token_ids i32 [T] that is -1 - i with i < n becomes drawn[i], of drawn i32 [n]."""
    place = -1 - token_ids
    known = (place >= 0) & (place < len(drawn))
    if len(drawn):
        token_ids.copy_(torch.where(known, drawn[torch.where(known, place, 0).long()], token_ids))


def embed(token_ids: torch.Tensor, table: torch.Tensor, residual: torch.Tensor) -> None:
    """Residual [T, H] = rows of table [V, H]; an id outside the table gives a row of NaN."""
    known = (token_ids >= 0) & (token_ids < len(table))
    rows = table[torch.where(known, token_ids, 0).long()].float()
    residual.copy_(torch.where(known[:, None], rows, _NAN))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def add_rms_norm(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    out: torch.Tensor, rows: torch.Tensor | None,
) -> None:  # fmt: skip
    """Out = rms_norm(residual + x) * weight.

    Without `rows` [R] the sum is kept in the residual. With them out [R, H] is of those rows, the
    residual stays as it is, and an index outside it gives a row of zeros.
    """
    if rows is None:
        total = residual if x is None else residual.add_(x)
        out.copy_(_rms_norm(total, weight, eps))
        return
    known = (rows >= 0) & (rows < len(residual))
    index = torch.where(known, rows, 0).long()
    total = residual[index] if x is None else residual[index] + x[index].float()
    out.copy_(torch.where(known[:, None], _rms_norm(total, weight, eps), 0.0))


def rope_store_kv(
    qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    slots: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, q_out: torch.Tensor,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
) -> None:  # fmt: skip
    """Rotate q and k (two-halves RoPE, after an RMS norm per head), store K and V in their slots.

    qkv is [T, (heads + 2 * kv_heads) * head_dim], a slot page * page_size + offset or -1 (not
    stored). A value head that is not finite is stored as zeros, and its key with NaN in front: the
    branch itself then sees NaN, and siblings, which weigh the value by 0, don't. A position outside
    the tables gives NaN.
    """
    pages, kv_heads, page_size = k_pages.shape[:3]
    query, key, value = rotated_states(
        qkv, positions, cos, sin, q_out.shape, kv_heads, q_norm, k_norm, eps
    )
    q_out.copy_(query)
    key = key.to(k_pages.dtype)
    bad = ~torch.isfinite(value).all(-1, keepdim=True)
    value = torch.where(bad, 0.0, value)
    key[..., :1] = torch.where(bad, _NAN, key[..., :1])
    stored = (slots >= 0) & (slots < pages * page_size)
    slot = slots[stored].long()
    page, offset = slot // page_size, slot % page_size
    k_pages[page, :, offset, :] = key[stored]
    v_pages[page, :, offset, :] = value[stored]


def rotated_states(
    qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    shape: torch.Size, kv_heads: int,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Queries and keys after norm and RoPE, fp32 [T, heads, dim], and the values as they are.

    `shape` is that of the queries. A position outside the tables gives NaN.
    """
    rows, heads, dim = shape
    states = qkv.reshape(rows, heads + 2 * kv_heads, dim)
    query, key, value = torch.split(states, [heads, kv_heads, kv_heads], dim=1)
    query, key = query.float(), key.float()
    if q_norm is not None:
        query = _rms_norm(query, q_norm, eps)
    if k_norm is not None:
        key = _rms_norm(key, k_norm, eps)
    known = (positions >= 0) & (positions < len(cos))
    at = torch.where(known, positions, 0).long()
    angles = [torch.where(known[:, None], table[at], _NAN)[:, None, :] for table in (cos, sin)]
    return _rotate(query, *angles), _rotate(key, *angles), value


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Out [T, F] = silu(gate_up[:, :F]) * gate_up[:, F:]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def copy_pages(
    k_all: torch.Tensor, v_all: torch.Tensor, copies: torch.Tensor, count: torch.Tensor
) -> None:
    """Copy the used slots of pages in all layers: copies [C, 3] = (source, destination, used).

    Only the first `count` [1] are there. k_all and v_all are [layers, pages, kv_heads, page_size,
    head_dim]. No page may be both a source and a destination.
    """
    pages = k_all.shape[1]
    for source, target, used in copies[: int(count)].tolist():
        if 0 <= source < pages and 0 <= target < pages and used > 0:
            k_all[:, target, :, :used] = k_all[:, source, :, :used]
            v_all[:, target, :, :used] = v_all[:, source, :, :used]
