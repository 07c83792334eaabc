"""Plain torch attention over each item's own flattened pages, on any device: the oracle."""

from __future__ import annotations

import torch

from dendrite_engine.attention.base import Plan
from dendrite_engine.attention.device_base import AttentionSetup, DeviceAttention, DeviceBatch


class DeviceReferenceAttention(DeviceAttention):
    """Gathers each work item's K and V and calls scaled_dot_product_attention in fp32.

    Shares nothing between branches and knows nothing of the tree: slow, and right by inspection.
    """

    name = "reference"
    supports_graphs = False

    def __init__(self, setup: AttentionSetup) -> None:
        self._page_size = setup.page_size
        self._device = setup.device
        self._items: list[tuple[int, int, torch.Tensor]] = []
        self.reason = "plain torch"

    def prepare(self, plan: Plan, batch: DeviceBatch) -> int:
        """Find the slots of every item's context; see DeviceAttention.prepare."""
        del batch
        items = zip(plan.item_indptr[:-1].tolist(), plan.item_indptr[1:].tolist(), strict=True)
        self._items = [
            (begin, end, _slots(plan, begin, self._page_size).to(self._device))
            for begin, end in items
        ]
        return 0

    def attend(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        batch: DeviceBatch,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
    ) -> None:
        """See AttentionBackend.attend; O(rows * context) gathers."""
        groups = q.shape[1] // k_pages.shape[1]
        for begin, end, slots in self._items:
            keys, values = (_gather(pages, slots, groups) for pages in (k_pages, v_pages))
            rows = batch.positions[begin:end].long()[:, None]
            cols = torch.arange(len(slots), device=q.device)
            visible = cols[None] <= rows
            if window:
                visible &= cols[None] > rows - window
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[begin:end].float().transpose(0, 1)[None],
                keys,
                values,
                attn_mask=visible,
                scale=scale,
            )
            out[begin:end] = attended[0].transpose(0, 1).to(out.dtype)


def _slots(plan: Plan, row: int, page_size: int) -> torch.Tensor:
    """Pool slots [context] that the item starting at `row` reads, by position."""
    parts = []
    for node in range(plan.num_nodes):
        if plan.node_row_begin[node] <= row < plan.node_row_end[node]:
            first, last = plan.node_page_indptr[node], plan.node_page_indptr[node + 1]
            pages = torch.from_numpy(plan.page_indices[first:last]).long()
            slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
            parts.append(slots[: plan.node_len[node]])
    return torch.cat(parts)


def _gather(pages: torch.Tensor, slots: torch.Tensor, groups: int) -> torch.Tensor:
    """fp32 [1, heads, context, head_dim] of pages [pages, kv_heads, page_size, head_dim]."""
    size = pages.shape[2]
    taken = pages[slots // size, :, slots % size].float()
    return taken.repeat_interleave(groups, 1).transpose(0, 1)[None]
