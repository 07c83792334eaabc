"""Tree cases in the GPU's layout, and one call that cuts the work list and attends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tree_cases import NAN, TreeCase

from dendrite_engine import _core


@dataclass(frozen=True)
class Cut:
    """How the work is cut."""

    q_tile: int = 64
    workers: int = 4
    deterministic: bool = False


def cut_work(plan, page_size: int, group: int, cut: Cut, window: int = 0, rows: int | None = None):
    """(work int32 tensor, slots, blocks) of a plan."""
    arrays = (
        plan.positions, plan.node_pos, plan.node_len, plan.node_row_begin, plan.node_row_end,
        plan.node_page_indptr, plan.page_indices,
        len(plan.positions) if rows is None else rows, page_size, group, cut.q_tile, cut.workers,
        window, cut.deterministic,
    )  # fmt: skip
    needed, slots, blocks = _core.attention_work(*arrays, np.empty(0, np.int32))
    out = np.full(needed + 5, -7, np.int32)
    assert _core.attention_work(*arrays, out) == (needed, slots, blocks)
    assert (out[needed:] == -7).all()
    return torch.from_numpy(out[:needed].copy()), slots, blocks


def device_pages(case: TreeCase, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V [pages, kv_heads, page_size, head_dim]. What nobody may read is NaN in K, huge in V:
    kernels may rely on every V being finite.
    """
    values = case.v_pages.nan_to_num(nan=1e4).to(dtype)
    return case.k_pages.transpose(2, 3).contiguous().to(dtype), values


def attend_device(
    op, case: TreeCase, cut: Cut, *, dtype=torch.float32, plan=None, q=None, window=0, scale=0.25,
    device="cpu",
):  # fmt: skip
    """Run the op `tree_attention` on poisoned memory; returns fp32 on the CPU."""
    plan = plan or case.plan
    q = (case.q if q is None else q).to(dtype)
    work, slots, _blocks = cut_work(plan, case.page_size, case.heads // case.kv_heads, cut, window)
    k_pages, v_pages = device_pages(case, dtype)
    partials = torch.full((slots * case.kv_heads * cut.q_tile * (case.head_dim + 2) + 4,), NAN)
    out = torch.full_like(q, NAN)
    tensors = [q, k_pages, v_pages, torch.from_numpy(plan.positions), work, partials, out]
    on_device = [tensor.to(device) for tensor in tensors]
    op(*on_device, scale, window, cut.q_tile, cut.workers)
    return on_device[6].float().cpu()
