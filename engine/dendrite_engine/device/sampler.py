"""Sampling on the device: one copy in, one kernel, one copy out, and no waiting before `wait`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from dendrite_engine.kernels.sampling_pack import Penalties, SamplingTable, make_workspace
from dendrite_engine.sampling import SamplingRows

_SLOTS = 2  # the next step is packed while the tokens of the last one are on their way


class _Slot:
    """Buffers of one call: settings on both sides, results on both sides."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self.settings = _Pair(0, device)
        self.results = _Pair(0, device)

    def reserve(self, settings: int, results: int) -> None:
        """Room for so many ints, once nothing that used the slot before is on its way."""
        self.wait()
        if self.settings.size < settings:
            self.settings = _Pair(settings * 3 // 2, self._device)
        if self.results.size < results:
            self.results = _Pair(results * 3 // 2, self._device)

    def mark(self) -> None:
        """Everything was queued."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Until what was queued before `mark` is done; the interpreter's lock is free meanwhile."""
        if self._event is not None:
            self._event.synchronize()


class _Pair:
    """An int32 buffer on the host and its counterpart on the device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.host = torch.zeros(
            size, dtype=torch.int32, pin_memory=device.type == "cuda" and size > 0
        )
        self.array: np.ndarray = self.host.numpy()
        self.device = torch.zeros(size, dtype=torch.int32, device=device)

    def send(self, size: int) -> torch.Tensor:
        """Queue the copy of the first `size` ints to the device; they are returned there."""
        target = self.device[:size]
        target.copy_(self.host[:size], non_blocking=True)
        return target

    def fetch(self, size: int) -> None:
        """Queue the copy of the first `size` ints to the host."""
        self.host[:size].copy_(self.device[:size], non_blocking=True)


@dataclass(slots=True)
class DeviceTokens:
    """Tokens, or alternatives, on their way from the device; see `sampling.PendingTokens`."""

    slot: _Slot
    shape: tuple[int, ...]

    @property
    def drawn(self) -> torch.Tensor:
        """See `PendingTokens.drawn`; good until the second `begin` that follows."""
        return self.slot.results.device[: math.prod(self.shape)]

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """See `PendingTokens.wait`; call it before the second `begin` that follows."""
        self.slot.wait()
        size = math.prod(self.shape)
        both = self.slot.results.array[: 2 * size].copy()
        tokens, logprobs = both[:size], both[size:].view(np.float32)
        return tokens.reshape(self.shape), logprobs.reshape(self.shape)


class DeviceSampler:
    """Samples on the device, in the order of the current stream; see sampling.TokenSampler.

    Args:
        ops: the device kernels.
        vocab_size: logits of a row.
        device: where the logits are.
    """

    def __init__(self, ops: Any, vocab_size: int, device: torch.device) -> None:
        self._ops, self._device = ops, device
        self.vocab_size = vocab_size
        self._token_slots = [_Slot(device) for _ in range(_SLOTS)]
        self._top_slots = [_Slot(device) for _ in range(_SLOTS)]
        self._rows = 0  # memory is taken on the engine's stream, when the first tokens are sampled

    def begin(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        settings: SamplingRows,
        positions: np.ndarray,
        masks: np.ndarray | None = None,
    ) -> DeviceTokens:
        """See TokenSampler.begin."""
        count = len(rows)
        self._make_room(count)
        table = _table_of(settings, self.vocab_size)
        penalties = Penalties(*settings.penalties()) if settings.special else None
        entries = 0 if penalties is None else len(penalties.ids)
        slot = _next(self._token_slots)
        slot.reserve(table.size(entries), 2 * count)
        packed = table.pack(
            positions, rows=rows, mask=masks, penalties=penalties, out=slot.settings.array
        )
        out = slot.results.device[: 2 * count].view(2, count)
        self._ops.sample(
            logits, slot.settings.send(len(packed)), self._workspace, out, greedy=table.greedy
        )
        slot.results.fetch(2 * count)
        slot.mark()
        return DeviceTokens(slot, (count,))

    def begin_top(self, logits: torch.Tensor, rows: np.ndarray, k: int) -> DeviceTokens:
        """See TokenSampler.begin_top."""
        count, k = len(rows), min(k, self.vocab_size)
        size = count * k
        slot = _next(self._top_slots)
        slot.reserve(count, 2 * size)
        slot.settings.array[:count] = rows
        ids = slot.results.device[:size].view(count, k)
        logprobs = slot.results.device[size : 2 * size].view(torch.float32).view(count, k)
        self._ops.top_logprobs(logits, k, ids, logprobs, slot.settings.send(count))
        slot.results.fetch(2 * size)
        slot.mark()
        return DeviceTokens(slot, (count, k))

    def _make_room(self, rows: int) -> None:
        """The kernel's own memory. Calls that are queued may still use what is replaced here: the
        allocator gives it away only in the order of the same stream.
        """
        if rows > self._rows:
            self._rows = max(rows * 3 // 2, 64)
            self._workspace = make_workspace(self.vocab_size, self._rows, self._device)


def _next(slots: list[_Slot]) -> _Slot:
    slot = slots.pop(0)
    slots.append(slot)
    return slot


def _table_of(settings: SamplingRows, vocab_size: int) -> SamplingTable:
    """The packed settings, made once for a set of rows."""
    table = settings.packed
    if table is None:
        settings.packed = table = SamplingTable(
            settings.neutral_batch(),
            vocab_size,
            seeds=cast("Any", settings.seeds),
            path_keys=cast("Any", settings.path_keys),
            mask_rows=settings.mask_rows,
        )
    return table
