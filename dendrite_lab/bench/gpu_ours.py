"""The engine's own tree attention as a contestant: the backend that the engine runs, nothing else.

Only this file knows how the kernel is called.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from dendrite_engine.attention import DEVICE_ATTENTION_BACKENDS, AttentionSetup, DeviceAttention
from dendrite_engine.device.metadata import Metadata
from dendrite_engine.kernels.device_ops import device_kernels
from dendrite_engine.kernels.device_packed import DevicePages
from dendrite_lab.bench.gpu_attention_case import Case, Contestant

if TYPE_CHECKING:
    from dendrite_engine.attention import DeviceBatch


Packed = Sequence[tuple[DevicePages, DevicePages]]  # K and V of each copy of the pages


def ours(
    case: Case, *, deterministic: bool = False, packed: Packed | None = None
) -> Contestant:  # fmt: skip
    """Plan the case as the engine plans a decode step, and call its attention backend.

    With `packed` it reads these pages instead of the case's, and the case's q is taken to be in the
    basis of their K.

    Raises:
        BackendUnavailable: the kernel does not serve this case.
    """
    rows = len(case.planned.plan.positions)
    backend = DEVICE_ATTENTION_BACKENDS.get("tree")(
        _setup(case, rows, deterministic, packed[0][0].cell_bytes if packed else 0)
    )
    metadata = Metadata(rows, backend.work_capacity(case.planned.num_pages), case.device)
    batch, _ = _planned(case, backend, metadata)
    start = time.perf_counter()
    batch, used = _planned(case, backend, metadata)
    metadata.send(batch, used)
    host_us = (time.perf_counter() - start) * 1e6
    out = torch.full_like(case.q, float("nan"))

    def call(index: int) -> torch.Tensor:
        keys, values = (case.k[index], case.v[index]) if packed is None else packed[index]
        backend.attend(case.q, keys, values, batch, out, scale=case.scale, window=0)
        return out

    return Contestant(call, host_us)


def _setup(case: Case, rows: int, deterministic: bool, cell_bytes: int) -> AttentionSetup:
    heads = case.heads
    return AttentionSetup(
        ops=device_kernels(), device=case.device, dtype=case.q.dtype, num_heads=heads.heads,
        num_kv_heads=heads.kv_heads, head_dim=heads.head_dim, windows=frozenset((0,)),
        page_size=case.planned.page_size, max_rows=rows, graph_rows=rows,
        deterministic=deterministic, is_twin=case.device.type != "cuda",
        cell_bytes=cell_bytes,
    )  # fmt: skip


def _planned(case: Case, backend: DeviceAttention, metadata: Metadata) -> tuple[DeviceBatch, int]:
    plan = case.planned.plan
    batch = metadata.fill(plan, len(plan.positions))
    used = backend.prepare(plan, batch)
    while used > len(batch.host_work):
        metadata.grow(used)
        batch = metadata.fill(plan, len(plan.positions))
        used = backend.prepare(plan, batch)
    return batch, used
