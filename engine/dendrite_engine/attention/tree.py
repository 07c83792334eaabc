"""Tree attention: K/V of a shared segment are read once for all branches below it."""

from __future__ import annotations

from typing import Any

import torch

from dendrite_engine.attention.base import AttentionBackend, ForwardBatch
from dendrite_engine.kernels.base import Pages


class TreeAttention(AttentionBackend[ForwardBatch]):
    """The engine's kernels: native SIMD, or their torch twins where the native module is
    missing.
    """

    name = "tree"

    def __init__(self, ops: Any) -> None:
        self._attend = ops.tree_attention
        self.reason = f"{ops.name} kernels ({ops.reason})"

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
        """See AttentionBackend.attend; one kernel launch."""
        self._attend(q, k_pages, v_pages, batch.plan, out, scale, window)
