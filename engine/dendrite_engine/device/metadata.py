"""The metadata of a step on its way to the device: written once, moved in one transfer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dendrite_engine.attention.base import Plan
from dendrite_engine.attention.device_base import (
    HEADER_COPIES,
    HEADER_LOGITS,
    HEADER_ROWS,
    HEADER_WORK,
    BatchLayout,
    DeviceBatch,
)

_HOST_BUFFERS = 2  # the next step is written while the last one may still be on its way


@dataclass(frozen=True, slots=True)
class _Views:
    """Sections of the device's buffer for one number of rows."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    logits_rows: torch.Tensor
    copies: torch.Tensor
    copy_count: torch.Tensor
    work: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Sections:
    """Sections of a host buffer for one number of rows."""

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    logits_rows: np.ndarray
    copies: np.ndarray
    work: np.ndarray


class _HostBuffer:
    """One pinned buffer, and the event after which it may be written again."""

    def __init__(self, size: int, on_gpu: bool) -> None:
        self.tensor = torch.zeros(size, dtype=torch.int32, pin_memory=on_gpu)
        self.array: np.ndarray = self.tensor.numpy()
        self._sections: dict[int, _Sections] = {}
        self._sent = torch.cuda.Event() if on_gpu else None

    def sections(self, layout: BatchLayout) -> _Sections:
        """The sections of a layout."""
        found = self._sections.get(layout.rows)
        if found is None:
            array = self.array
            token_ids, positions, slots, logits_rows = (
                array[layout.row_array(index)] for index in range(4)
            )
            found = self._sections[layout.rows] = _Sections(
                token_ids,
                positions,
                slots,
                logits_rows,
                array[layout.copies],
                array[layout.work :],
            )
        return found

    def wait(self) -> None:
        """Until the last transfer out of this buffer is done."""
        if self._sent is not None:
            self._sent.synchronize()

    def mark_sent(self) -> None:
        """Call after a transfer was queued on the current stream."""
        if self._sent is not None:
            self._sent.record()


class Metadata:
    """Fills batches and sends them; used by the engine thread only.

    The device's buffer never moves while the work lists of the steps fit it, so CUDA graphs may
    hold its address. `grow` moves it.
    """

    def __init__(self, max_rows: int, work_capacity: int, device: torch.device) -> None:
        self._max_rows, self._device = max_rows, device
        self._layouts = [BatchLayout(rows) for rows in range(max_rows + 1)]
        self._next = 0
        self._allocate(work_capacity)

    def _allocate(self, work_capacity: int) -> None:
        size = self._layouts[-1].work + max(work_capacity, 1)
        on_gpu = self._device.type == "cuda"
        self._hosts = [_HostBuffer(size, on_gpu) for _ in range(_HOST_BUFFERS)]
        self._buffer = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._views: dict[int, _Views] = {}

    def grow(self, work_ints: int) -> None:
        """Move to buffers that hold a work list of this length, with room to spare."""
        self._allocate(work_ints * 3 // 2)

    def fill(self, plan: Plan, rows: int) -> DeviceBatch:
        """Write a plan into the next host buffer, padded to `rows` rows; O(T).

        The attention backend writes the work section afterwards, and `send` starts the transfer.
        """
        layout, views = self._layouts[rows], self._views_of(rows)
        host = self._hosts[self._next]
        self._next = (self._next + 1) % _HOST_BUFFERS
        host.wait()
        to, count = host.sections(layout), plan.num_tokens
        wanted, copies = wanted_rows(plan.logits_row), plan.copies
        to.token_ids[:count], to.positions[:count] = plan.token_ids, plan.positions
        to.slots[:count] = plan.slots
        to.logits_rows[: len(wanted)] = wanted
        to.logits_rows[len(wanted) :] = 0
        if count < rows:
            to.token_ids[count:] = to.positions[count:] = 0
            to.slots[count:] = -1
        if len(copies):
            to.copies[: copies.size] = copies.reshape(-1)
        array = host.array
        array[HEADER_ROWS], array[HEADER_COPIES] = count, len(copies)
        array[HEADER_LOGITS] = len(wanted)
        return DeviceBatch(
            plan, rows, count, len(copies), wanted, views.token_ids, views.positions, views.slots,
            views.logits_rows, views.copies, views.copy_count, views.work, array, to.work,
        )  # fmt: skip

    def send(self, batch: DeviceBatch, work_ints: int) -> None:
        """Queue the transfer of everything that was written for this batch."""
        batch.host[HEADER_WORK] = work_ints
        used = self._layouts[batch.rows].work + work_ints
        host = self._hosts[self._next - 1]
        self._buffer[:used].copy_(host.tensor[:used], non_blocking=True)
        host.mark_sent()

    def _views_of(self, rows: int) -> _Views:
        views = self._views.get(rows)
        if views is None:
            layout, buffer = self._layouts[rows], self._buffer
            token_ids, positions, slots, logits_rows = (
                buffer[layout.row_array(index)] for index in range(4)
            )
            views = self._views[rows] = _Views(
                token_ids,
                positions,
                slots,
                logits_rows,
                copies=buffer[layout.copies].view(rows, 3),
                copy_count=buffer[HEADER_COPIES : HEADER_COPIES + 1],
                work=buffer[layout.work :],
            )
        return views


def wanted_rows(logits_row: np.ndarray) -> np.ndarray:
    """The distinct rows whose logits are wanted, increasing, i64 [R]."""
    falls = np.count_nonzero(logits_row[1:] <= logits_row[:-1])
    if not falls and len(logits_row) and logits_row[0] >= 0:
        return logits_row.astype(np.int64)  # as in most steps
    wanted = logits_row[logits_row >= 0].astype(np.int64)
    if len(wanted) > 1 and (wanted[1:] <= wanted[:-1]).any():
        wanted = np.unique(wanted)
    return wanted
