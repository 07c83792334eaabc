"""Attention on packed pages and the store into them, in torch: the twin of the native kernels.

q is rotated once per head, V is summed in the rotated basis and rotated back once per row: a vector
is never restored. What a page holds is used as level times scale.
"""

from __future__ import annotations

import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.base import IntArray, PlanArrays
from dendrite_engine.kernels.hadamard import norm, transform
from dendrite_engine.kernels.packed import CodedPages, PackedPages


def rotated_query(q: torch.Tensor, keys: CodedPages) -> torch.Tensor:
    """q [T, heads, D] in the basis of the K codes; q itself where they are not rotated."""
    if keys.signs is None:
        return q
    group = q.shape[1] // keys.kv_heads
    return transform(q * keys.signs.repeat_interleave(group, 0)) * norm(keys.head_dim)


def restored_output(out: torch.Tensor, values: CodedPages) -> torch.Tensor:
    """Sums of V codes [T, heads, D] back in the basis of the model."""
    if values.signs is None:
        return out
    group = out.shape[1] // values.kv_heads
    return transform(out) * norm(values.head_dim) * values.signs.repeat_interleave(group, 0)


def gather(
    pages: PackedPages, page_ids: torch.Tensor, length: int
) -> torch.Tensor:  # [kv_heads, length, D]
    """What consecutive pages hold, in the basis of their codes."""
    return pages.stored(page_ids).transpose(0, 1).flatten(1, 2)[:, :length]


def store(
    pages: PackedPages, vectors: torch.Tensor, page: torch.Tensor, offset: torch.Tensor
) -> None:
    """Quantise vectors [n, kv_heads, D] into their slots; the other slots keep their bytes."""
    if pages.first is not None and pages.first_index is not None:
        places = pages.first_index[page].long()
        begun = places >= 0
        store(pages.first, pages.encode_first(vectors[begun]), places[begun], offset[begun])
        vectors, page, offset = vectors[~begun], page[~begun], offset[~begun]
    if len(page) == 0:
        return
    codes, scales = pages.encode(vectors)
    touched, place = page.unique(return_inverse=True)
    old_codes, old_scales = pages.read(touched)
    old_codes[place, :, offset] = codes.to(old_codes.dtype)
    old_scales[place, :, offset] = scales
    pages.write(touched, old_codes, old_scales)


def copy_packed(data: torch.Tensor, copies: IntArray) -> None:
    """Copy whole pages (source, destination, used) of a pool u8 [pages, page_bytes]."""
    for source, target, _ in torch.as_tensor(copies).tolist():
        data[target] = data[source]


def check_pair(keys: object, values: object, head_dim: int) -> tuple[PackedPages, PackedPages]:
    """Both sides of one layer of one pool.

    Raises:
        InvalidArgument: they are of different pools or of another head_dim, or only one is packed.
    """
    if not isinstance(keys, PackedPages) or not isinstance(values, PackedPages):
        raise InvalidArgument("K and V must both be packed pages, or both unquantised")
    if keys.data.data_ptr() != values.data.data_ptr() or not keys.is_key or values.is_key:
        raise InvalidArgument(
            f"K ({keys.codec.name}) and V ({values.codec.name}) must be the two sides of one "
            "layer of one pool"
        )
    if keys.head_dim != head_dim:
        raise InvalidArgument(f"pages hold heads of {keys.head_dim}, the queries have {head_dim}")
    return keys, values


def node_keys_values(
    keys: PackedPages, values: PackedPages, plan: PlanArrays, node: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K [kv_heads, D, length] and V [kv_heads, length, D] of one node, each in its own basis."""
    first, last = int(plan.node_page_indptr[node]), int(plan.node_page_indptr[node + 1])
    ids = torch.as_tensor(plan.page_indices[first:last]).to(torch.int64)
    return gather(keys, ids, length).transpose(1, 2), gather(values, ids, length)
