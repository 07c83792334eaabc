"""Plain torch attention over each item's own flattened pages, on any device: the oracle."""

from __future__ import annotations

import torch

from dendrite_engine.attention.base import Plan
from dendrite_engine.attention.device_base import AttentionSetup, DeviceAttention, DeviceBatch
from dendrite_engine.kernels.device_packed import DevicePages


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
        self.reason = "plain torch, every vector decoded" if setup.is_packed else "plain torch"

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
        k_pages: torch.Tensor | DevicePages,
        v_pages: torch.Tensor | DevicePages,
        batch: DeviceBatch,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
    ) -> None:
        """See AttentionBackend.attend; O(rows * context) gathers."""
        for begin, end, slots in self._items:
            keys, values = _gather(k_pages, slots, True), _gather(v_pages, slots, False)
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
                enable_gqa=True,
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


def _gather(pages: torch.Tensor | DevicePages, slots: torch.Tensor, is_key: bool) -> torch.Tensor:
    """fp32 [1, kv_heads, context, head_dim]; K in the basis of q, V in that of the model."""
    if isinstance(pages, DevicePages):
        taken = pages.stored_at(slots) if is_key else pages.restored_at(slots)
    else:
        size = pages.shape[2]
        taken = pages[slots // size, :, slots % size].float()
    return taken.transpose(0, 1)[None]
