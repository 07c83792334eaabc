"""The operations in plain torch: the twin that native kernels are tested against, and the fallback.

Signatures, shapes and layouts are those of `kernels.base.Kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels import packed_reference
from dendrite_engine.kernels.base import IntArray, Pages, PlanArrays
from dendrite_engine.kernels.reference_sampling import sample, top_logprobs

_MINUS_INF = float("-inf")


def _index(array: IntArray) -> torch.Tensor:
    return torch.as_tensor(array).to(torch.int64)


NodeReader = Callable[[PlanArrays, int, int], tuple[torch.Tensor, torch.Tensor]]


def tree_attention(
    q: torch.Tensor, k_pages: Pages, v_pages: Pages, plan: PlanArrays, out: torch.Tensor,
    scale: float, window: int = 0,
) -> None:  # fmt: skip
    """Attend every row to its path through the tree: node by node, merged by log-sum-exp.

    Each node's K and V are gathered once for all of its rows. O(rows * tokens) per node.
    """
    if isinstance(k_pages, torch.Tensor) and isinstance(v_pages, torch.Tensor):
        read = partial(_node_kv, k_pages, v_pages)
        _attend(q, k_pages.shape[1], read, plan, out, scale, window)
        return
    keys, values = packed_reference.check_pair(k_pages, v_pages, q.shape[-1])
    query = packed_reference.rotated_query(q, keys)
    read = partial(packed_reference.node_keys_values, keys, values)
    _attend(query, keys.kv_heads, read, plan, out, scale, window)
    out.copy_(packed_reference.restored_output(out, values))


def _attend(
    q: torch.Tensor, kv_heads: int, read: NodeReader, plan: PlanArrays, out: torch.Tensor,
    scale: float, window: int,
) -> None:  # fmt: skip
    rows, heads, dim = q.shape
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, dim) * scale
    positions = _index(plan.positions)
    best = torch.full((rows, kv_heads, heads // kv_heads, 1), _MINUS_INF)  # running maximum
    total = torch.zeros_like(best)  # running sum of exp(score - best)
    acc = torch.zeros_like(grouped)  # running sum of exp(score - best) * value
    for node in range(len(plan.node_pos)):
        begin, end = int(plan.node_row_begin[node]), int(plan.node_row_end[node])
        length = int(plan.node_len[node])
        if begin == end or length == 0:
            continue
        span = slice(begin, end)
        keys, values = read(plan, node, length)
        scores = torch.einsum("rhgd,hdc->rhgc", grouped[span], keys)
        at = int(plan.node_pos[node]) + torch.arange(length)  # kv positions
        reader = positions[span, None]
        hidden = at > reader
        if window > 0:
            hidden |= at <= reader - window
        scores.masked_fill_(hidden[:, None, None, :], _MINUS_INF)
        top = torch.maximum(best[span], scores.amax(-1, keepdim=True))
        shift = torch.where(top == _MINUS_INF, 0.0, top)  # nothing seen so far: avoid inf - inf
        weights = torch.exp(scores - shift)
        keep = torch.exp(best[span] - shift)
        total[span] = total[span] * keep + weights.sum(-1, keepdim=True)
        acc[span] = acc[span] * keep + torch.einsum("rhgc,hcd->rhgd", weights, values)
        best[span] = top
    out.copy_((acc / total).reshape(rows, heads, dim))


def _node_kv(
    k_pages: torch.Tensor, v_pages: torch.Tensor, plan: PlanArrays, node: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [kv_heads, head_dim, length] and V [kv_heads, length, head_dim] of one node."""
    first, last = int(plan.node_page_indptr[node]), int(plan.node_page_indptr[node + 1])
    pages = _index(plan.page_indices[first:last])
    keys = k_pages[pages].permute(1, 2, 0, 3).flatten(2)
    values = v_pages[pages].permute(1, 0, 2, 3).flatten(1, 2)
    return keys[:, :, :length], values[:, :length]


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
    out: torch.Tensor,
) -> None:  # fmt: skip
    """residual += x in place, then out = rms_norm(residual) * weight."""
    if residual is not None:
        x = residual.add_(x)
    out.copy_(_rms_norm(x, weight, eps))


def rope_store_kv(
    qkv: torch.Tensor, positions: IntArray, cos: torch.Tensor, sin: torch.Tensor, slots: IntArray,
    k_pages: Pages, v_pages: Pages, q_out: torch.Tensor,
    q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 1e-6,
) -> None:  # fmt: skip
    """Rotate queries and keys and store K and V in their slots; slot -1 is not stored."""
    rows, heads, dim = q_out.shape
    if isinstance(k_pages, torch.Tensor):
        num_pages, kv_heads, _, page_size = k_pages.shape
    else:
        packed_reference.check_pair(k_pages, v_pages, dim)
        num_pages, kv_heads, page_size = k_pages.num_pages, k_pages.kv_heads, k_pages.page_size
    at, slot = _index(positions)[:rows], _index(slots)[:rows]
    _check_range("positions", at, 0, len(cos))
    _check_range("slots", slot, -1, num_pages * page_size)
    states = qkv.reshape(rows, heads + 2 * kv_heads, dim)
    query, key, value = torch.split(states, [heads, kv_heads, kv_heads], dim=1)
    if q_norm is not None:
        query = _rms_norm(query, q_norm, eps)
    if k_norm is not None:
        key = _rms_norm(key, k_norm, eps)
    angles = cos[at][:, None, :], sin[at][:, None, :]
    q_out.copy_(_rotate(query, *angles))
    stored = slot >= 0
    page, offset = slot[stored] // page_size, slot[stored] % page_size
    key, value = _rotate(key, *angles)[stored], value[stored]
    if isinstance(k_pages, torch.Tensor) and isinstance(v_pages, torch.Tensor):
        k_pages[page, :, :, offset] = key
        v_pages[page, :, offset, :] = value
    else:
        keys, values = packed_reference.check_pair(k_pages, v_pages, dim)
        packed_reference.store(keys, key, page, offset)
        packed_reference.store(values, value, page, offset)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _check_range(name: str, values: torch.Tensor, low: int, limit: int) -> None:
    outside = ((values < low) | (values >= limit)).nonzero()
    if len(outside) > 0:
        i = int(outside[0])
        raise InvalidArgument(f"{name}[{i}] = {int(values[i])} is outside {low}..{limit - 1}")


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(first half of gate_up) * second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.silu(gate) * up)


def copy_pages(k_all: torch.Tensor, v_all: torch.Tensor, copies: IntArray) -> None:
    """Copy the used slots of pages (source, destination, used) in all layers."""
    for source, target, used in _index(copies).tolist():
        k_all[:, target, :, :, :used] = k_all[:, source, :, :, :used]
        v_all[:, target, :, :used] = v_all[:, source, :, :used]


class ReferenceKernels:
    """The torch implementation as an object, for `kernels.load`.

    Args:
        reason: why it was chosen.
    """

    name = "reference"

    def __init__(self, reason: str = "asked for") -> None:
        self.reason = reason

    tree_attention = staticmethod(tree_attention)
    add_rms_norm = staticmethod(add_rms_norm)
    rope_store_kv = staticmethod(rope_store_kv)
    silu_mul = staticmethod(silu_mul)
    copy_pages = staticmethod(copy_pages)
    copy_packed = staticmethod(packed_reference.copy_packed)
    sample = staticmethod(sample)
    top_logprobs = staticmethod(top_logprobs)
