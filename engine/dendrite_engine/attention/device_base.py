"""Contract of an attention backend of the device path, and the batch that it works on.

All metadata of a step is one int32 buffer: a header, row arrays at offsets that depend on the
number of rows alone, and last, of any length, what the attention backend wrote for itself. The
host's copy is filled once per step and goes to the device in one transfer, into a buffer that never
moves, so that a captured CUDA graph reads the metadata of whatever step it is replayed for.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dendrite_engine.attention.base import AttentionBackend, Plan

HEADER_INTS = 16
HEADER_ROWS, HEADER_COPIES, HEADER_LOGITS, HEADER_WORK = range(4)  # places in the header
_ALIGN = 64  # ints: sections start at multiples of 256 bytes


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Where the sections of a batch of `rows` rows begin in its int32 buffer.

    Sections: header [16], token_ids, positions, slots, logits_rows [rows each], copies [rows, 3],
    then the attention backend's work list up to the end of the buffer.
    """

    rows: int

    @property
    def section(self) -> int:
        """Ints between the beginnings of two row arrays."""
        return -(-self.rows // _ALIGN) * _ALIGN

    def row_array(self, index: int) -> slice:
        """Place of a row array: 0 token_ids, 1 positions, 2 slots, 3 logits_rows."""
        begin = _ALIGN + index * self.section
        return slice(begin, begin + self.rows)

    @property
    def copies(self) -> slice:
        """Place of the copy-on-write triples; a batch has at most one a row."""
        begin = _ALIGN + 4 * self.section
        return slice(begin, begin + 3 * self.rows)

    @property
    def work(self) -> int:
        """Where the work list begins."""
        return _ALIGN + 7 * self.section


@dataclass(slots=True)
class DeviceBatch:
    """One step on the device path: views into the host's and the device's metadata buffer.

    Rows are padded to the bucket: padded rows have token 0, position 0 and slot -1, and no work.

    Attributes:
        plan: the plan of this step; not to be read by `attend` of a backend that supports graphs.
        rows: rows of the bucket.
        num_rows: rows of the plan; the others are padding.
        num_copies: copy-on-write pairs.
        logits_index: rows whose logits are wanted, increasing, i64 [R]; on the host.
        token_ids, positions, slots: i32 [rows], on the device.
        logits_rows: i32 [rows], on the device; what follows the wanted ones is 0.
        copies: i32 [rows, 3] and copy_count i32 [1], on the device.
        copy_count: see copies.
        work: i32, on the device: what `prepare` wrote into host_work.
        host: i32 numpy, the whole buffer on the host, to be written before the transfer.
        host_work: its work section.
        variant: which of the ways that `attend` has; set by `prepare`, kept by a captured call.
    """

    plan: Plan
    rows: int
    num_rows: int
    num_copies: int
    logits_index: np.ndarray
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits_rows: torch.Tensor
    copies: torch.Tensor
    copy_count: torch.Tensor
    work: torch.Tensor
    host: np.ndarray
    host_work: np.ndarray
    variant: int = 0


@dataclass(frozen=True, slots=True)
class AttentionSetup:
    """What a device backend is made for.

    Attributes:
        ops: the device kernels (kernels.device_ops) or their twins.
        device: where q, pages and scratch are.
        dtype: of q and the output, and of K and V unless pages are packed.
        num_heads, num_kv_heads, head_dim: shape of a layer.
        windows: sliding windows that occur in the model's layers, 0 for full attention.
        page_size: tokens per page.
        max_rows: rows of a batch at most.
        graph_rows: rows of a batch that runs as a CUDA graph at most; 0 without graphs.
        deterministic: a row's result must be bitwise independent of the other rows.
        is_twin: CPU tensors stand in for a GPU.
        kv_format: how a page stores K and V.
        cell_bytes: 0, or pages are DevicePages: codes, which only the engine's own kernels read, in
            cells of at most so many bytes.
    """

    ops: Any
    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: frozenset[int]
    page_size: int
    max_rows: int
    graph_rows: int
    deterministic: bool
    is_twin: bool
    kv_format: str = "auto"
    cell_bytes: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether pages are DevicePages."""
        return self.cell_bytes > 0


class DeviceAttention(AttentionBackend[DeviceBatch]):
    """Attention over the pages of one layer: token-major [pages, kv_heads, page_size, head_dim], or
    K and V as DevicePages, with q in the basis of the K codes.

    `prepare` runs once per step on the host, `attend` once per layer. Made with an AttentionSetup;
    a backend that can't serve it raises `BackendUnavailable` with the reason. Large scratch memory
    is allocated when the backend is made, so that the page budget is measured after it.

    Attributes:
        supports_graphs: `attend` takes everything that changes between steps from `batch.work` and
            buffers of its own, so that a captured call serves every later batch of as many rows
            and the same variant.
        scratch_version: changed by `prepare` when those buffers moved; graphs captured before are
            dropped.
    """

    supports_graphs: bool = True
    scratch_version: int = 0

    @abstractmethod
    def __init__(self, setup: AttentionSetup) -> None:
        """Allocate scratch for the setup."""

    def work_capacity(self, num_pages: int) -> int:
        """Ints of the work section that steps usually fit; it grows when one does not.

        Called once, before the first `prepare`, when the size of the pool is known.
        """
        del num_pages
        return 0

    def prepare(self, plan: Plan, batch: DeviceBatch) -> int:
        """Write the step's work into `batch.host_work` and return how many ints it takes.

        A backend with several ways to run a batch, such as kernels for different tiles, chooses one
        here by the plan and sets `batch.variant`: few small numbers, since each size of batch is
        captured once for each. Left alone it is 0.

        Called once per step, before the metadata goes to the device and with the engine's stream
        current; it must not wait for the device. A number greater than `len(batch.host_work)` asks
        to be called again with that much room.
        """
        del plan, batch
        return 0
