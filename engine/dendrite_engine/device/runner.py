"""The runner of the device path: metadata, one transfer, a few graph launches, and no waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dendrite_engine.attention.base import Plan
from dendrite_engine.attention.device_base import DeviceAttention, DeviceBatch
from dendrite_engine.cache.pages import KVPages
from dendrite_engine.device.graphs import Buckets, GraphCache, chain_of
from dendrite_engine.device.metadata import Metadata
from dendrite_engine.device.timer import StepTimer
from dendrite_engine.errors import DeviceError
from dendrite_engine.models.device_transformer import (
    Activations,
    DeviceTransformer,
    padded_rows,
)
from dendrite_engine.runner import rows_of
from dendrite_engine.types import LogitsEpoch

_FEW_LOGITS = 16  # the output matrix runs over so many rows, or over all of a bucket


@dataclass(slots=True)
class DeviceState:
    """What a DeviceRunner works with.

    Attributes:
        model: the weights.
        pages: K and V.
        attention: reads them.
        ops: the device kernels.
        activations: buffers of the model.
        logits: fp32 [rows, vocab]: where logits go as long as they fit; overwritten by each pass.
        metadata: the way of the plans to the device.
        graphs: captured passes.
        buckets: sizes that small batches are padded to.
    """

    model: DeviceTransformer
    pages: KVPages
    attention: DeviceAttention
    ops: Any
    activations: Activations
    logits: torch.Tensor
    metadata: Metadata
    graphs: GraphCache
    buckets: Buckets


class DeviceRunner:
    """Runs plans on a device; see runner.Runner. Used by the engine thread only.

    The thread that calls `run` works on the runner's stream from then on, so that what it asks of
    the device afterwards (sampling, for example) comes after the forward pass.
    """

    is_async = True

    def __init__(self, state: DeviceState, note_graphs: Callable[[str], None]) -> None:
        self.state = state
        self.pages, self.attention = state.pages, state.attention
        self.steps = self.rows = self.graph_steps = 0
        self.host_ms = 0.0
        self.logits_epoch: LogitsEpoch | None = None
        self.failure: DeviceError | None = None
        self._note_graphs = note_graphs
        self._kv = state.pages.views()
        self._chain = chain_of(len(self._kv))
        self._stream = state.pages.stream
        self._timer = StepTimer(self._stream is not None)
        self._bound_thread = 0

    @property
    def last_ms(self) -> float:
        """Time of the last pass that was known to be done when `run` or `synchronize` looked."""
        return self._timer.last_ms

    def run(self, plan: Plan, drawn: torch.Tensor | None = None) -> tuple[torch.Tensor, np.ndarray]:
        """See Runner.run; returns as soon as everything is queued.

        The logits stay until the next call (see `logits_epoch`), on the device.

        Raises:
            DeviceError: the device failed, now or in an earlier call.
        """
        if self.failure is not None:
            raise self.failure
        started = time.perf_counter()
        try:
            self._bind_thread()
            with torch.inference_mode():
                result = self._run(plan, drawn)
            self._timer.poll()
        except Exception as error:
            raise self.diagnose(error) from error
        self.steps += 1
        self.rows += plan.num_tokens
        self.host_ms = (time.perf_counter() - started) * 1e3
        return result

    def synchronize(self) -> None:
        """See Runner.synchronize."""
        if self._stream is None:
            return
        try:
            self._stream.synchronize()
            self._timer.poll()
        except Exception as error:
            raise self.diagnose(error) from error

    def diagnose(self, error: Exception) -> Exception:
        """See Runner.diagnose."""
        if self.failure is None and self._is_fatal(error):
            said = str(error).strip().splitlines() or [type(error).__name__]
            self.failure = DeviceError(
                f"the device failed: {said[0]}. Nothing more can be computed: close this engine "
                "and make a new one, in a new process after a CUDA error"
            )
        return error if self.failure is None else self.failure

    # -- inside -------------------------------------------------------------------------------

    def _bind_thread(self) -> None:
        thread = threading.get_ident()
        if self._stream is not None and thread != self._bound_thread:
            torch.cuda.set_stream(self._stream)
            self._bound_thread = thread

    def _is_fatal(self, error: Exception) -> bool:
        """Whether the device is beyond use: CUDA repeats its first error from then on."""
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
            return False
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            return True
        if self._stream is None:
            return False
        try:
            self._stream.synchronize()
        except RuntimeError:
            return True
        return False

    def _run(self, plan: Plan, drawn: torch.Tensor | None) -> tuple[torch.Tensor, np.ndarray]:
        rows = self.state.buckets.of(plan.num_tokens)
        batch, work_ints = self._prepare(plan, rows)
        wanted = len(batch.logits_index)
        is_padded = rows <= self.state.buckets.largest
        logits_rows = _logits_rows(wanted, rows) if is_padded else wanted
        logits = self._logits_buffer(logits_rows)
        self._timer.start()
        self.state.metadata.send(batch, work_ints)
        if drawn is not None:
            self.state.ops.take_tokens(batch.token_ids, drawn)
        if is_padded and self.attention.supports_graphs and self.state.graphs.is_on:
            self._run_graph(batch, logits, logits_rows)
        else:
            self._forward(batch, logits, with_copies=batch.num_copies > 0)
        self._timer.stop()
        return logits[:wanted], rows_of(plan.logits_row, batch.logits_index)

    def _prepare(self, plan: Plan, rows: int) -> tuple[DeviceBatch, int]:
        """Host side of a step: the filled buffer and the length of its work list."""
        metadata, version = self.state.metadata, self.attention.scratch_version
        while True:
            batch = metadata.fill(plan, rows)
            work_ints = self.attention.prepare(plan, batch)
            fits = work_ints <= len(batch.host_work)
            if not fits or self.attention.scratch_version != version:
                self.synchronize()  # graphs can be dropped only when none is running
                self.state.graphs.clear()
            if fits:
                return batch, work_ints
            metadata.grow(work_ints)

    def _logits_buffer(self, rows: int) -> torch.Tensor:
        """Where `rows` rows of logits go; ends the time of those that were there."""
        if self.logits_epoch is not None:
            self.logits_epoch.is_current = False
        static, rows = self.state.logits, self.state.model.gemm_rows(rows)
        if rows <= static.shape[0]:
            self.logits_epoch = LogitsEpoch()
            return static[:rows]
        self.logits_epoch = None
        return torch.empty(rows, static.shape[1], device=static.device)

    def _run_graph(self, batch: DeviceBatch, logits: torch.Tensor, logits_rows: int) -> None:
        key = (batch.rows, logits_rows, batch.variant)
        graphs = self.state.graphs
        chain = graphs.get(key)
        if chain is not None:
            for graph in chain:
                graph.replay()
            self.graph_steps += 1
            return
        self._forward(batch, logits, with_copies=True)
        graphs.capture(key, [partial(self._run_part, batch, logits, part) for part in self._chain])
        self._note_graphs(graphs.reason)

    def _run_part(self, batch: DeviceBatch, logits: torch.Tensor, part: range) -> None:
        self._forward(batch, logits, with_copies=part.start == 0, part=part)

    def _forward(
        self,
        batch: DeviceBatch,
        logits: torch.Tensor,
        *,
        with_copies: bool,
        part: range | None = None,
    ) -> None:
        state = self.state
        if with_copies:
            state.pages.copy_on_device(batch.copies, batch.copy_count, state.ops)
        state.model.forward(
            batch, self._kv, state.attention, state.ops, state.activations, logits, part
        )


def _logits_rows(wanted: int, rows: int) -> int:
    """Rows of logits that a padded pass computes: few sizes, so that there are few graphs."""
    if wanted == 0 or rows <= _FEW_LOGITS:
        return min(wanted, 1) * rows
    return _FEW_LOGITS if wanted <= _FEW_LOGITS else rows


def logits_capacity(buckets: Buckets) -> int:
    """Rows of the logits buffer that serves every padded pass."""
    return padded_rows(max(buckets.largest, _FEW_LOGITS))
