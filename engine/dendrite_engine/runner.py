"""One forward pass: copies, model, logits."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from dendrite_engine.attention.base import AttentionBackend, ForwardBatch, Plan
from dendrite_engine.cache.pages import KVPages
from dendrite_engine.models.transformer import Transformer


class ModelRunner:
    """Runs plans on a model and a page pool; used by the engine thread only.

    Attributes:
        steps: forward passes so far.
        rows: rows that went through the model so far.
    """

    def __init__(
        self,
        model: Transformer,
        pages: KVPages,
        attention: AttentionBackend,
        ops: Any,
    ) -> None:
        self.model, self.pages, self.attention = model, pages, attention
        self._ops = ops
        self.steps = 0
        self.rows = 0
        self.last_ms = 0.0

    @torch.inference_mode()
    def run(self, plan: Plan) -> tuple[torch.Tensor, np.ndarray]:
        """Compute a plan's rows and store their K/V.

        Returns:
            (logits fp32 [R, vocab], for each branch of the plan its row in logits or -1, i64 [n]).
        """
        start = time.perf_counter()
        batch = ForwardBatch.build(plan)
        if len(plan.copies):
            self._ops.copy_pages(self.pages.k, self.pages.v, plan.copies)
        logits = self.model.forward(batch, self.pages, self.attention, self._ops)
        self.steps += 1
        self.rows += plan.num_tokens
        self.last_ms = (time.perf_counter() - start) * 1e3
        return logits, _rows_of(plan.logits_row, batch.logits_rows.numpy())


def _rows_of(logits_row: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each branch's row among the `wanted` rows, -1 where it has none."""
    if len(wanted) == 0:
        return np.full(len(logits_row), -1, np.int64)
    index = np.searchsorted(wanted, logits_row)
    return np.where(logits_row >= 0, index, -1)
