"""Contract of an attention backend, and the batch it works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch


class Plan(Protocol):
    """What one forward pass computes; made by the page-and-tree core, rows in depth-first order.

    A node is a run of whole or partial pages that the rows [node_row_begin, node_row_end) read: KV
    of a shared segment is one node for all branches below it. For each row its nodes come in
    increasing position order and cover 0..positions[row] exactly once.
    """

    token_ids: np.ndarray  # i32 [T]
    positions: np.ndarray  # i32 [T]
    slots: np.ndarray  # i32 [T]: page * page_size + offset, or -1: do not store
    copies: np.ndarray  # i32 [C, 3]: source page, destination page, used slots
    logits_row: np.ndarray  # i32 [n]: row of each requested branch, or -1
    item_indptr: np.ndarray  # i32 [I + 1]
    node_pos: np.ndarray  # i32 [N]: absolute position of the node's first slot
    node_len: np.ndarray  # i32 [N]: tokens
    node_row_begin: np.ndarray  # i32 [N]
    node_row_end: np.ndarray  # i32 [N]
    node_page_indptr: np.ndarray  # i32 [N + 1]
    page_indices: np.ndarray  # i32 [sum of node pages]
    num_tokens: int
    num_items: int
    num_nodes: int

    def commit(self) -> None:
        """Record that K/V of these rows are in the pages."""

    def cancel(self) -> None:
        """Forget the plan; nothing changes."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """A plan with its row arrays as tensors, made once per step and never per layer.

    Attributes:
        plan: the plan.
        token_ids, positions, slots: i32 [T].
        logits_rows: i64 [R], the distinct rows whose logits are wanted, increasing.
    """

    plan: Plan
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits_rows: torch.Tensor

    @classmethod
    def build(cls, plan: Plan) -> ForwardBatch:
        """Wrap a plan; O(T)."""
        wanted = np.unique(plan.logits_row[plan.logits_row >= 0]).astype(np.int64)
        return cls(
            plan,
            torch.from_numpy(plan.token_ids),
            torch.from_numpy(plan.positions),
            torch.from_numpy(plan.slots),
            torch.from_numpy(wanted),
        )


Batch = TypeVar("Batch")


class AttentionBackend(ABC, Generic[Batch]):
    """Attends over the pages of the live tree.

    `Batch` is what a forward pass hands to every layer: `ForwardBatch` on the CPU path,
    `DeviceBatch` (attention.device_base) on the device path.

    Attributes:
        name: key in the registry.
        reason: why this backend runs, for `Engine.report()`.
    """

    name: str
    reason: str = ""

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        k_pages: Any,
        v_pages: Any,
        batch: Batch,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
    ) -> None:
        """Write softmax(q K^T * scale) V into `out`.

        Args:
            q: compute dtype (fp32 on the CPU path) [T, heads, head_dim].
            k_pages, v_pages: one layer of the pool, K/V of these rows already stored; tensors, or
                on the CPU path PackedPages.
            batch: the step's batch.
            out: like q, overwritten.
            scale: factor on the scores.
            window: 0, or the sliding window in tokens.
        """


Ops = Any  # namespace of kernels, see dendrite_engine.kernels.load
