"""Plain torch attention over each branch's own flattened pages: the oracle of the others."""

from __future__ import annotations

from typing import Any

import torch

from dendrite_engine.attention.base import AttentionBackend, ForwardBatch, Plan
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.base import Pages
from dendrite_engine.kernels.packed import PackedPages


class ReferenceAttention(AttentionBackend[ForwardBatch]):
    """Gathers each work item's K and V and calls scaled_dot_product_attention in fp32.

    Shares nothing between branches and knows nothing of the tree: slow, and right by inspection.
    """

    name = "reference"

    def __init__(self, ops: Any) -> None:
        del ops
        self.reason = "asked for: plain torch"

    def attend(
        self,
        q: torch.Tensor,
        k_pages: Pages,
        v_pages: Pages,
        batch: ForwardBatch,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
    ) -> None:
        """See AttentionBackend.attend; O(rows * context) gathers."""
        plan = batch.plan
        for begin, end in zip(plan.item_indptr[:-1], plan.item_indptr[1:], strict=True):
            keys, values = _gather(plan, int(begin), k_pages, v_pages)
            groups = q.shape[1] // keys.shape[1]
            rows = batch.positions[begin:end].long()
            cols = torch.arange(keys.shape[0])
            visible = cols[None, :] <= rows[:, None]
            if window:
                visible &= cols[None, :] > rows[:, None] - window
            out[begin:end] = torch.nn.functional.scaled_dot_product_attention(
                q[begin:end].transpose(0, 1)[None],
                keys.repeat_interleave(groups, 1).transpose(0, 1)[None],
                values.repeat_interleave(groups, 1).transpose(0, 1)[None],
                attn_mask=visible,
                scale=scale,
            )[0].transpose(0, 1)


def _gather(
    plan: Plan, row: int, k_pages: Pages, v_pages: Pages
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [context, kv_heads, head_dim] that the item starting at `row` reads."""
    keys, values = [], []
    for node in range(plan.num_nodes):
        if not plan.node_row_begin[node] <= row < plan.node_row_end[node]:
            continue
        first, last = plan.node_page_indptr[node], plan.node_page_indptr[node + 1]
        ids = torch.from_numpy(plan.page_indices[first:last]).long()
        length = plan.node_len[node]
        if isinstance(k_pages, torch.Tensor) and isinstance(v_pages, torch.Tensor):
            keys.append(k_pages[ids].permute(0, 3, 1, 2).flatten(0, 1)[:length])
            values.append(v_pages[ids].permute(0, 2, 1, 3).flatten(0, 1)[:length])
        else:
            keys.append(_decoded(k_pages, ids)[:length])
            values.append(_decoded(v_pages, ids)[:length])
    return torch.cat(keys), torch.cat(values)


def _decoded(pages: Pages, ids: torch.Tensor) -> torch.Tensor:
    """Vectors [tokens, kv_heads, head_dim] restored from codes: what no kernel does."""
    if not isinstance(pages, PackedPages):
        raise InvalidArgument("K and V must both be packed pages, or both unquantised")
    vectors = pages.restored(ids)
    return vectors.transpose(1, 2).flatten(0, 1)
