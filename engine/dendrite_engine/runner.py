"""One forward pass: copies, model, logits."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import torch

from dendrite_engine.attention.base import AttentionBackend, ForwardBatch, Plan
from dendrite_engine.cache.pages import KVPages
from dendrite_engine.errors import DeviceError
from dendrite_engine.models.transformer import Transformer
from dendrite_engine.types import LogitsEpoch


class Runner(Protocol):
    """Runs plans on a model and a page pool; used by the engine thread only.

    Attributes:
        is_async: `run` returns before the device is done; what it returns is in the order of the
            device's stream, so it may be used by kernels at once, and read after `synchronize`.
        steps: forward passes so far.
        rows: rows that went through the model so far.
        graph_steps: passes that were replays of CUDA graphs.
        last_ms: time of the last forward pass whose time is known; never waits.
        host_ms: what launching the last forward pass took on the calling thread.
        logits_epoch: how long the logits of the last `run` stay; None: nothing overwrites them.
        failure: the first error of the device, after which `run` only raises it again.
        attention: the backend; its `name` and `reason` are for reports.
    """

    attention: Any
    is_async: bool
    steps: int
    rows: int
    graph_steps: int
    logits_epoch: LogitsEpoch | None

    @property
    def last_ms(self) -> float:
        """See above."""

    @property
    def host_ms(self) -> float:
        """See above."""

    @property
    def failure(self) -> DeviceError | None:
        """See above."""

    def run(self, plan: Plan, drawn: torch.Tensor | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """Compute a plan's rows and store their K/V.

        Args:
            plan: what to compute.
            drawn: tokens on the device, i32 [n], that the plan's ids below 0 stand for: -1 - i for
                drawn[i]. Only with `is_async`.

        Returns:
            (logits fp32 [R, vocab], for each branch of the plan its row in logits or -1, i64 [n]).
        """

    def synchronize(self) -> None:
        """Wait until the device has done everything asked of it.

        Raises:
            DeviceError: the device failed.
        """

    def diagnose(self, error: Exception) -> Exception:
        """What to report for an error that came out of work on the device, in or after `run`: a
        DeviceError, remembered in `failure`, when the device is beyond use; else the error.
        """


class ModelRunner:
    """The runner of the CPU path; see Runner."""

    is_async = False
    logits_epoch: LogitsEpoch | None = None
    failure: DeviceError | None = None
    graph_steps = 0

    def __init__(
        self,
        model: Transformer,
        pages: KVPages,
        attention: AttentionBackend[ForwardBatch],
        ops: Any,
    ) -> None:
        self.model, self.pages, self.attention = model, pages, attention
        self._ops = ops
        self.steps = 0
        self.rows = 0
        self.last_ms = 0.0

    @property
    def host_ms(self) -> float:
        """On the CPU path launching and computing are one."""
        return self.last_ms

    @torch.inference_mode()
    def run(self, plan: Plan, drawn: torch.Tensor | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """See Runner.run."""
        del drawn
        start = time.perf_counter()
        batch = ForwardBatch.build(plan)
        self.pages.begin(plan, self._ops)
        logits = self.model.forward(batch, self.pages, self.attention, self._ops)
        self.steps += 1
        self.rows += plan.num_tokens
        self.last_ms = (time.perf_counter() - start) * 1e3
        return logits, rows_of(plan.logits_row, batch.logits_rows.numpy())

    def synchronize(self) -> None:
        """Nothing runs behind the caller's back."""

    def diagnose(self, error: Exception) -> Exception:
        """On the CPU path an error is just that."""
        return error


def rows_of(logits_row: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of each branch's row among the `wanted` rows, -1 where it has none."""
    if len(wanted) == 0:
        return np.full(len(logits_row), -1, np.int64)
    index = np.searchsorted(wanted, logits_row)
    return np.where(logits_row >= 0, index, -1)
