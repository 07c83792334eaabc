"""FlashInfer as an attention backend: paged decode, paged prefill and multi-level cascade.

Optional (extra `[cuda]`). Where FlashInfer is missing, refuses the model or fails, the "tree"
backend takes over and the report says why; nothing is lost but the choice.

FlashInfer plans on the host, once for each step and window; its `run` is then the same for all
layers. The plan is not made for replay, so steps with this backend are not captured in CUDA graphs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
import torch

from dendrite_engine.attention import ATTENTION_BACKENDS, DEVICE_ATTENTION_BACKENDS
from dendrite_engine.attention.base import AttentionBackend, ForwardBatch, Plan
from dendrite_engine.attention.device_base import AttentionSetup, DeviceAttention, DeviceBatch
from dendrite_engine.attention.flashinfer_plan import (
    PageTable,
    cascade_depth,
    cascade_tables,
    flat_table,
)
from dendrite_engine.errors import BackendUnavailable

Pages = tuple[torch.Tensor, torch.Tensor]
Run = Callable[[torch.Tensor, Pages, torch.Tensor | None], torch.Tensor]
Mode = Literal["auto", "flat", "cascade"]
WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
TENSOR_CORE_GROUP = 4  # query heads per K/V head from which on decode pays on tensor cores


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a FlashInfer plan depends on besides the page tables."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    scale: float
    window: int = 0

    def options(self) -> dict[str, Any]:
        """Keywords that all FlashInfer plans share. A window of w tokens is the token itself and
        w - 1 to its left.
        """
        left = self.window - 1 if self.window else -1
        return {
            "sm_scale": self.scale, "window_left": left,
            "q_data_type": self.dtype, "kv_data_type": self.dtype,
        }  # fmt: skip

    def sizes(self) -> tuple[int, int, int, int]:
        """heads, kv_heads, head_dim, page_size, as FlashInfer's plans take them."""
        return self.heads, self.kv_heads, self.head_dim, self.page_size


class FlashInferAttention(DeviceAttention):
    """Chooses among FlashInfer's wrappers for each step.

    Mode "flat": every branch reads its own page list (paged decode; paged prefill, causal, where an
    item has several rows). Mode "cascade": one level for each depth of the live tree. Mode "auto":
    the cheaper one by `flat_microseconds` and `cascade_microseconds`. A sliding window, which
    FlashInfer counts from the end of a request, is always flat.

    Raises:
        BackendUnavailable: FlashInfer is missing, can't serve the model, or failed on a small
            problem. Its kernels are compiled at that time: up to minutes where its cache is empty.
    """

    name = "flashinfer"
    supports_graphs = False
    mode: ClassVar[Mode] = "auto"

    def __init__(self, setup: AttentionSetup) -> None:
        self._setup = setup
        self._module = _import()
        _refuse_unsupported(setup)
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=setup.device)
        self._maker = WrapperMaker(self._module, self._workspace)
        self._wrappers: dict[tuple[object, ...], Wrapper] = {}
        self._scale = setup.head_dim**-0.5
        self._plan: Plan | None = None
        self._runs: dict[Geometry, Run] = {}
        self._planned: torch.cuda.Event | None = None
        self._fallback: DeviceAttention | None = None
        version = getattr(self._module, "__version__", "of unknown version")
        self.reason = f"FlashInfer {version}, {self.mode}"
        if not setup.is_twin:
            self._try_out()

    def prepare(self, plan: Plan, batch: DeviceBatch) -> int:
        """See DeviceAttention.prepare: plans FlashInfer's wrappers; no work list of our own."""
        if self._fallback is None:
            self._plan = plan
            self._runs.clear()
            try:
                for window in sorted(self._setup.windows):
                    self._run(self._geometry(self._scale, window))
            except Exception as error:  # whatever FlashInfer raises: it is optional
                self._fall_back(error)
        return 0 if self._fallback is None else self._fallback.prepare(plan, batch)

    def attend(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        batch: DeviceBatch,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
    ) -> None:
        """See AttentionBackend.attend; padded rows are neither read nor written."""
        if self._fallback is None:
            rows = batch.num_rows
            self._scale = scale
            try:
                run = self._run(self._geometry(scale, window))
                run(q[:rows], (k_pages, v_pages), out[:rows])
                return
            except Exception as error:  # whatever FlashInfer raises: it is optional
                self._fall_back(error)
                self._hand_over(batch, error)
        fallback = cast("DeviceAttention", self._fallback)
        fallback.attend(q, k_pages, v_pages, batch, out, scale=scale, window=window)

    def _geometry(self, scale: float, window: int) -> Geometry:
        setup = self._setup
        return Geometry(
            setup.num_heads, setup.num_kv_heads, setup.head_dim, setup.page_size, setup.dtype,
            scale, window,
        )  # fmt: skip

    def _run(self, geometry: Geometry) -> Run:
        """The planned call of this step."""
        run = self._runs.get(geometry)
        if run is None:
            if self._planned is not None:
                self._planned.synchronize()  # FlashInfer is about to rewrite its pinned staging
            run = self._runs[geometry] = self._make_run(cast("Plan", self._plan), geometry)
            if self._setup.device.type == "cuda":
                self._planned = torch.cuda.Event()
                self._planned.record()
        return run

    def _make_run(self, plan: Plan, geometry: Geometry) -> Run:
        tables = choose_tables(plan, geometry, self.mode)
        decode = len(tables) == 1 and _one_row_each(tables[0])
        # A wrapper holds one plan, and layers with different windows take turns in a step.
        key = (decode, len(tables), geometry)
        if key not in self._wrappers:
            maker = self._maker
            self._wrappers[key] = maker.decode(geometry) if decode else maker.levels(len(tables))
        return self._wrappers[key].plan(tables, geometry)

    def _try_out(self) -> None:
        """Compile what steps will need, all at once, and run it on a few tokens."""
        setup = self._setup
        shape = (2, setup.num_kv_heads, setup.page_size, setup.head_dim)
        pages = torch.zeros(shape, dtype=setup.dtype, device=setup.device)
        q = pages.new_zeros(3, setup.num_heads, setup.head_dim)
        size = setup.page_size
        jobs: list[tuple[Wrapper, list[PageTable], Geometry]] = []
        for window in sorted(setup.windows):
            geometry = self._geometry(self._scale, window)
            jobs.append((self._maker.decode(geometry), [_sample(1, size)], geometry))
            jobs.append((self._maker.levels(1), [_sample(3, size)], geometry))
            if not window and self.mode != "flat":
                tables = [_sample(3, size), _sample(1, size)]
                jobs.append((self._maker.levels(2), tables, geometry))
        try:
            with ThreadPoolExecutor(len(jobs)) as pool:  # compilers run beside each other
                runs = list(pool.map(self._plan_one, jobs))
            torch.cuda.synchronize(setup.device)
            for run in runs:
                run(q, (pages, pages), None)
            torch.cuda.synchronize(setup.device)
        except Exception as error:
            raise BackendUnavailable(
                f"FlashInfer failed on a small problem ({type(error).__name__}: {error})"
            ) from error

    def _plan_one(self, job: tuple[Wrapper, list[PageTable], Geometry]) -> Run:
        wrapper, tables, geometry = job
        with torch.cuda.device(self._setup.device):
            return wrapper.plan(tables, geometry)

    def _fall_back(self, error: Exception) -> None:
        self._runs.clear()
        self._wrappers.clear()
        self._fallback = DEVICE_ATTENTION_BACKENDS.get("tree")(self._setup)
        self.reason = (
            f"FlashInfer failed ({type(error).__name__}: {error}); the tree backend runs instead: "
            f"{self._fallback.reason}"
        )

    def _hand_over(self, batch: DeviceBatch, error: Exception) -> None:
        """Give the fallback its work list in the middle of a step, after the transfer."""
        fallback = cast("DeviceAttention", self._fallback)
        used = fallback.prepare(batch.plan, batch)
        if used > len(batch.host_work):
            raise error  # this step is lost; the next one asks for the room
        batch.work[:used].copy_(torch.from_numpy(batch.host_work[:used]))


class FlashInferFlat(FlashInferAttention):
    """Backend "flashinfer-flat": every branch reads its own page list."""

    name = "flashinfer-flat"
    mode = "flat"


class FlashInferCascade(FlashInferAttention):
    """Backend "flashinfer-cascade": one level for each depth of the live tree."""

    name = "flashinfer-cascade"
    mode = "cascade"


def on_cpu(ops: Any) -> AttentionBackend[ForwardBatch]:
    """What runs where "flashinfer" is asked for on a CPU: the tree backend, which says so."""
    backend = ATTENTION_BACKENDS.get("tree")(ops)
    backend.reason = f"FlashInfer needs an NVIDIA GPU; {backend.reason}"
    return backend


def _import() -> Any:
    try:
        return importlib.import_module("flashinfer")
    except Exception as error:  # an optional dependency may fail in any way while it loads
        raise BackendUnavailable(
            f"FlashInfer can't be imported ({type(error).__name__}: {error}); "
            'pip install "dendrite-lab[cuda]" brings it'
        ) from error


def _refuse_unsupported(setup: AttentionSetup) -> None:
    if setup.deterministic:
        raise BackendUnavailable(
            "FlashInfer splits K/V by the whole batch, so a row's bits depend on its neighbours; "
            "deterministic=True needs the tree backend"
        )
    if setup.is_packed:
        raise BackendUnavailable(
            f"FlashInfer reads unquantised pages of the compute dtype, not kv_format "
            f"{setup.kv_format!r}"
        )
    if setup.is_twin:
        return
    if setup.device.type != "cuda":
        raise BackendUnavailable(f"FlashInfer needs an NVIDIA GPU, not {setup.device.type}")
    if setup.dtype not in DTYPES:
        raise BackendUnavailable(
            f"FlashInfer computes in float16 or bfloat16, the model in {setup.dtype}"
        )
    if setup.head_dim not in HEAD_DIMS:
        raise BackendUnavailable(
            f"FlashInfer serves head_dim {', '.join(map(str, HEAD_DIMS))}, not {setup.head_dim}"
        )


def _sample(rows: int, page_size: int) -> PageTable:
    """Three query rows in requests of `rows` each, which read as many tokens, all in page 0."""
    count, pages = 3 // rows, -(-rows // page_size)
    steps = np.arange(count + 1, dtype=np.int32)
    last = np.full(count, rows - (pages - 1) * page_size, np.int32)
    return PageTable(
        steps * np.int32(rows), steps * np.int32(pages), np.zeros(count * pages, np.int32), last
    )


@dataclass(frozen=True, slots=True)
class Wrapper:
    """One of FlashInfer's wrappers, over pages laid out [pages, kv_heads, page_size, head_dim]."""

    kind: Literal["decode", "prefill", "cascade"]
    inner: Any

    def plan(self, tables: Sequence[PageTable], geometry: Geometry) -> Run:
        """Plan for these tables; returns run(q, (k_pages, v_pages), out or None)."""
        inner, sizes, options = self.inner, geometry.sizes(), geometry.options()
        arrays = [_tensors(table) for table in tables]
        if self.kind == "cascade":
            columns = [list(column) for column in zip(*arrays, strict=True)]
            inner.plan(*columns, *sizes, causal=True, **options)
            return lambda q, pages, out: _written(inner.run(q, pages), out)
        if self.kind == "decode":
            inner.plan(*arrays[0][1:], *sizes, **options)
        else:
            inner.plan(*arrays[0], *sizes, causal=True, **options)
        return lambda q, pages, out: cast("torch.Tensor", inner.run(q, pages, out=out))


class WrapperMaker:
    """Makes wrappers that share one workspace."""

    def __init__(self, module: Any, workspace: torch.Tensor) -> None:
        self._module, self._workspace = module, workspace

    def decode(self, geometry: Geometry, tensor_cores: bool | None = None) -> Wrapper:
        """Flat decode; `tensor_cores` None decides by the size of a head group."""
        if tensor_cores is None:
            tensor_cores = geometry.heads >= TENSOR_CORE_GROUP * geometry.kv_heads
        make = self._module.BatchDecodeWithPagedKVCacheWrapper
        return Wrapper("decode", make(self._workspace, "HND", use_tensor_cores=tensor_cores))

    def levels(self, count: int) -> Wrapper:
        """Prefill where there is one level, else a cascade."""
        if count == 1:
            make = self._module.BatchPrefillWithPagedKVCacheWrapper
            return Wrapper("prefill", make(self._workspace, "HND"))
        make = self._module.MultiLevelCascadeAttentionWrapper
        return Wrapper("cascade", make(count, self._workspace, "HND"))


def _written(result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    return result if out is None else out.copy_(result)


def _tensors(table: PageTable) -> tuple[torch.Tensor, ...]:
    arrays = (table.qo_indptr, table.kv_indptr, table.indices, table.last_page_len)
    return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def _one_row_each(table: PageTable) -> bool:
    return bool((np.diff(table.qo_indptr) == 1).all())


def choose_tables(plan: Plan, geometry: Geometry, mode: Mode = "auto") -> list[PageTable]:
    """One table for a flat call, or those of a cascade."""
    page_size = geometry.page_size
    flat = flat_table(plan, page_size)
    if mode == "flat" or geometry.window or cascade_depth(plan) == 0:
        return [flat]
    cascade = cascade_tables(plan, page_size)
    if mode == "cascade":
        return cascade
    if not _one_row_each(flat):
        return [flat]  # prompts, mostly: rows of one item share their pages already
    cheaper = cascade_microseconds(cascade, geometry) < flat_microseconds(flat, geometry)
    return cascade if cheaper else [flat]


# Rules of thumb fitted to FlashInfer 0.6.11 on one H100 (64 x 4096 .. 256 x 4096, 1..256 branches,
# 32 query and 8 K/V heads of 128): they only have to order the two choices.
_SMS = 132
_QUERY_TILE = 128
_L2_BYTES_PER_US = 8.5e6  # flat decode finds shared pages in the L2 cache
_LEVEL_US = 10.0
_TILE_US = 2.0
_TOKEN_US = 0.014  # one tile walks its keys one after the other: FlashInfer does not split them


def flat_microseconds(table: PageTable, geometry: Geometry) -> float:
    """Estimated time of flat decode: all bytes of all page lists, at the L2 cache's rate."""
    tokens = int(table.kv_lens(geometry.page_size).sum())
    token_bytes = 2 * geometry.kv_heads * geometry.head_dim * geometry.dtype.itemsize
    return 15.0 + tokens * token_bytes / _L2_BYTES_PER_US


def cascade_microseconds(tables: Sequence[PageTable], geometry: Geometry) -> float:
    """Estimated time of a cascade: for each level its longest tile, or all tiles over the SMs."""
    total = 0.0
    for table in tables:
        lens = table.kv_lens(geometry.page_size)
        tiles = -(-np.diff(table.qo_indptr) // _QUERY_TILE) * geometry.heads
        tile_us = _TILE_US + lens * (_TOKEN_US * geometry.head_dim / 128)
        total += _LEVEL_US + max(float(tile_us.max()), float((tiles * tile_us).sum()) / _SMS)
    return total
