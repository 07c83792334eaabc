"""The operations as native SIMD kernels (`dendrite_engine._cpu`).

The native side takes addresses, so dtypes, layouts and shapes are checked here, on every call: it
costs about half a microsecond. What is derived from a plan is kept until another plan comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from dendrite_engine import _cpu
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.base import IntArray, Pages, PlanArrays
from dendrite_engine.kernels.packed_reference import check_pair
from dendrite_engine.kernels.sampling_batch import SamplingBatch

_F32 = torch.float32


def _usable(tensor: torch.Tensor) -> bool:
    return tensor.dtype is _F32 and tensor.is_contiguous() and tensor.is_cpu


def _refuse(operation: str, **tensors: tuple[torch.Tensor, tuple[int, ...]]) -> NoReturn:
    """Raise for the first tensor that isn't plain fp32 of its shape."""
    for name, (tensor, shape) in tensors.items():
        if not _usable(tensor) or tuple(tensor.shape) != shape:
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise InvalidArgument(
                f"{operation}: {name} must be contiguous fp32 of shape {list(shape)} in host "
                f"memory, got {tensor.dtype} {list(tensor.shape)} ({layout}) on {tensor.device}"
            )
    raise InvalidArgument(f"{operation}: the tensors' shapes disagree")


def _ints(array: IntArray) -> NDArray[np.int32]:
    return array if type(array) is np.ndarray else torch.as_tensor(array).numpy()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class NativeKernels:
    """The native implementation with its own threads, scratch memory and instruction set.

    Args:
        isa: "auto" or one of `dendrite_engine._cpu.available_isas()`.
        threads: threads to use; None follows `torch.get_num_threads()`, read once per plan.

    Raises:
        InvalidArgument: this machine can't run `isa`, or `threads` is below 1.
    """

    name = "native"

    def __init__(self, isa: str = "auto", threads: int | None = None) -> None:
        count = torch.get_num_threads() if threads is None else threads
        try:
            self._context = _cpu.Context(isa, count)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        self._follow_torch = threads is None
        self._plan: PlanArrays | None = None
        self._tables: tuple[torch.Tensor, torch.Tensor] | None = None  # last cos, sin that passed
        self._schedules: dict[tuple[int, int, int], _cpu.Schedule] = {}

    @property
    def isa(self) -> str:
        """Instruction set in use."""
        return self._context.isa

    @property
    def threads(self) -> int:
        """Threads in use."""
        return self._context.threads

    @property
    def reason(self) -> str:
        """Instruction set, threads and thread runtime, for reports."""
        return f"{self.isa}, {self.threads} threads, {_cpu.team_description()}"

    def _schedule(self, plan: PlanArrays, page_size: int, window: int, group: int) -> _cpu.Schedule:
        if plan is not self._plan:
            self._schedules.clear()
            self._plan = plan
            if self._follow_torch:
                self._context.threads = torch.get_num_threads()
        key = (page_size, window, group)
        schedule = self._schedules.get(key)
        if schedule is None:
            schedule = self._schedules[key] = _cpu.Schedule(
                plan.positions, plan.node_pos, plan.node_len, plan.node_row_begin,
                plan.node_row_end, plan.node_page_indptr, plan.page_indices, *key,
            )  # fmt: skip
        return schedule

    def tree_attention(
        self, q: torch.Tensor, k_pages: Pages, v_pages: Pages, plan: PlanArrays,
        out: torch.Tensor, scale: float, window: int = 0,
    ) -> None:  # fmt: skip
        """See `Kernels.tree_attention`. O(tokens that the rows see)."""
        if not isinstance(k_pages, torch.Tensor) or not isinstance(v_pages, torch.Tensor):
            self._packed_attention(q, k_pages, v_pages, plan, out, scale, window)
            return
        shape = rows, heads, dim = q.shape
        pages, kv_heads, depth, page_size = k_pages.shape
        try:
            schedule = self._schedule(plan, page_size, window, heads // kv_heads)
            if not (
                out.shape == shape and depth == dim and schedule.num_rows == rows
                and v_pages.shape == (pages, kv_heads, page_size, dim)
                and q.dtype is k_pages.dtype is v_pages.dtype is out.dtype is _F32
                and q.is_contiguous() and out.is_contiguous() and q.is_cpu and out.is_cpu
                and k_pages.is_contiguous() and v_pages.is_contiguous()
                and k_pages.is_cpu and v_pages.is_cpu
            ):  # fmt: skip
                _refuse(
                    "tree_attention",
                    q=(q, (schedule.num_rows, heads, dim)),
                    k_pages=(k_pages, (pages, kv_heads, dim, page_size)),
                    v_pages=(v_pages, (pages, kv_heads, page_size, dim)),
                    out=(out, (rows, heads, dim)),
                )
            self._context.tree_attention(
                schedule, q.data_ptr(), k_pages.data_ptr(), v_pages.data_ptr(), out.data_ptr(),
                heads, kv_heads, dim, pages, scale,
            )  # fmt: skip
        except InvalidArgument:
            raise
        except ValueError as error:
            raise InvalidArgument(f"tree_attention: {error}") from error

    def _packed_attention(
        self, q: torch.Tensor, k_pages: Pages, v_pages: Pages, plan: PlanArrays,
        out: torch.Tensor, scale: float, window: int,
    ) -> None:  # fmt: skip
        shape = rows, heads, dim = q.shape
        keys, values = check_pair(k_pages, v_pages, dim)
        try:
            schedule = self._schedule(plan, keys.page_size, window, heads // keys.kv_heads)
            if schedule.num_rows != rows or out.shape != shape or not (_usable(q) and _usable(out)):
                wanted = (schedule.num_rows, heads, dim)
                _refuse("tree_attention", q=(q, wanted), out=(out, wanted))
            self._context.tree_attention_packed(
                schedule, q.data_ptr(), keys.address, values.address, out.data_ptr(), heads, scale
            )
        except InvalidArgument:
            raise
        except ValueError as error:
            raise InvalidArgument(f"tree_attention: {error}") from error

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """See `Kernels.add_rms_norm`. O(T * width)."""
        shape = rows, width = x.shape
        if not (
            out.shape == shape and weight.shape == (width,)
            and x.dtype is weight.dtype is out.dtype is _F32
            and x.is_contiguous() and weight.is_contiguous() and out.is_contiguous()
            and x.is_cpu and weight.is_cpu and out.is_cpu
            and (residual is None or (residual.shape == shape and _usable(residual)))
        ):  # fmt: skip
            _refuse(
                "add_rms_norm",
                x=(x, (rows, width)),
                residual=(x if residual is None else residual, (rows, width)),
                weight=(weight, (width,)),
                out=(out, (rows, width)),
            )
        self._context.add_rms_norm(
            x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(), eps,
            out.data_ptr(), rows, width,
        )  # fmt: skip

    def rope_store_kv(
        self, qkv: torch.Tensor, positions: IntArray, cos: torch.Tensor, sin: torch.Tensor,
        slots: IntArray, k_pages: Pages, v_pages: Pages, q_out: torch.Tensor,
        q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        """See `Kernels.rope_store_kv`. O(T * row width)."""
        rows, heads, dim = q_out.shape
        positions_known = self._check_tables(cos, sin, dim // 2)
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None and (norm.shape != (dim,) or not _usable(norm)):
                _refuse("rope_store_kv", **{name: (norm, (dim,))})
        norms = (_address(q_norm), _address(k_norm), eps)
        if not isinstance(k_pages, torch.Tensor) or not isinstance(v_pages, torch.Tensor):
            keys, values = check_pair(k_pages, v_pages, dim)
            width = (heads + 2 * keys.kv_heads) * dim
            if qkv.shape != (rows, width) or not (_usable(qkv) and _usable(q_out)):
                _refuse(
                    "rope_store_kv", qkv=(qkv, (rows, width)), q_out=(q_out, (rows, heads, dim))
                )
            self._guarded(
                "rope_store_kv", self._context.rope_store_packed,
                qkv.data_ptr(), _ints(positions), cos.data_ptr(), sin.data_ptr(), _ints(slots),
                keys.address, values.address, q_out.data_ptr(), *norms, rows, heads,
                positions_known,
            )  # fmt: skip
            return
        pages, kv_heads, depth, page_size = k_pages.shape
        if not (
            qkv.shape == (rows, (heads + 2 * kv_heads) * dim) and depth == dim
            and v_pages.shape == (pages, kv_heads, page_size, dim)
            and qkv.dtype is q_out.dtype is k_pages.dtype is v_pages.dtype is _F32
            and qkv.is_contiguous() and q_out.is_contiguous() and qkv.is_cpu and q_out.is_cpu
            and k_pages.is_contiguous() and v_pages.is_contiguous()
            and k_pages.is_cpu and v_pages.is_cpu
        ):  # fmt: skip
            _refuse(
                "rope_store_kv",
                qkv=(qkv, (rows, (heads + 2 * kv_heads) * dim)),
                q_out=(q_out, (rows, heads, dim)),
                k_pages=(k_pages, (pages, kv_heads, dim, page_size)),
                v_pages=(v_pages, (pages, kv_heads, page_size, dim)),
            )
        self._guarded(
            "rope_store_kv", self._context.rope_store_kv,
            qkv.data_ptr(), _ints(positions), cos.data_ptr(), sin.data_ptr(), _ints(slots),
            k_pages.data_ptr(), v_pages.data_ptr(), q_out.data_ptr(), *norms, rows, heads,
            kv_heads, dim, page_size, pages, positions_known,
        )  # fmt: skip

    @staticmethod
    def _guarded(operation: str, call: Callable[..., None], *args: Any) -> None:
        """Call the native side; what it refuses names the operation."""
        try:
            call(*args)
        except ValueError as error:
            raise InvalidArgument(f"{operation}: {error}") from error

    def _check_tables(self, cos: torch.Tensor, sin: torch.Tensor, half: int) -> int:
        """Positions in the rotary tables; tables that passed once are known by identity."""
        length, width = cos.shape
        known = self._tables is not None and cos is self._tables[0] and sin is self._tables[1]
        if not known or width != half:
            if sin.shape != cos.shape or width != half or not _usable(cos) or not _usable(sin):
                _refuse("rope_store_kv", cos=(cos, (length, half)), sin=(sin, (length, half)))
            self._tables = (cos, sin)
        return length

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """See `Kernels.silu_mul`. O(T * f)."""
        rows, width = out.shape
        if gate_up.shape != (rows, 2 * width) or not _usable(gate_up) or not _usable(out):
            _refuse("silu_mul", gate_up=(gate_up, (rows, 2 * width)), out=(out, (rows, width)))
        self._context.silu_mul(gate_up.data_ptr(), out.data_ptr(), rows, width)

    def copy_pages(self, k_all: torch.Tensor, v_all: torch.Tensor, copies: IntArray) -> None:
        """See `Kernels.copy_pages`. O(copies * layers * page)."""
        layers, pages, kv_heads, dim, page_size = k_all.shape
        if (
            v_all.shape != (layers, pages, kv_heads, page_size, dim)
            or not _usable(k_all) or not _usable(v_all)
        ):  # fmt: skip
            _refuse(
                "copy_pages",
                k_all=(k_all, (layers, pages, kv_heads, dim, page_size)),
                v_all=(v_all, (layers, pages, kv_heads, page_size, dim)),
            )
        if copies.ndim != 2 or copies.shape[1] != 3:
            raise InvalidArgument(f"copy_pages: copies must be [C, 3], got {list(copies.shape)}")
        try:
            self._context.copy_pages(
                k_all.data_ptr(), v_all.data_ptr(), _ints(copies), layers, pages, kv_heads, dim,
                page_size,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidArgument(f"copy_pages: {error}") from error

    def copy_packed(self, data: torch.Tensor, copies: IntArray) -> None:
        """See `Kernels.copy_packed`. O(copies * page)."""
        if data.dtype is not torch.uint8 or data.ndim != 2 or not data.is_contiguous():
            raise InvalidArgument(
                f"copy_packed: data must be contiguous uint8 [pages, bytes], got {data.dtype} "
                f"{list(data.shape)}"
            )
        if copies.ndim != 2 or copies.shape[1] != 3:
            raise InvalidArgument(f"copy_packed: copies must be [C, 3], got {list(copies.shape)}")
        self._guarded(
            "copy_packed", self._context.copy_packed, data.data_ptr(), *data.shape, _ints(copies)
        )

    def sample(
        self, logits: torch.Tensor, batch: SamplingBatch
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """See `Kernels.sample`. O(V) per row: only the part of a row at a cut is sorted."""
        rows, vocab = self._logits_shape("sample", logits)
        if rows != batch.num_rows:
            raise InvalidArgument(f"sample: logits has {rows} rows, batch {batch.num_rows}")
        tokens, logprobs = np.empty(rows, np.int32), np.empty(rows, np.float32)
        try:
            self._context.sample(
                logits.data_ptr(), rows, vocab, logits.stride(0), batch.arrays(),
                tokens.ctypes.data, logprobs.ctypes.data,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidArgument(f"sample: {error}") from error
        return tokens, logprobs

    def top_logprobs(
        self, logits: torch.Tensor, k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """See `Kernels.top_logprobs`. O(V + k log k log V) per row with tokens in random order."""
        rows, vocab = self._logits_shape("top_logprobs", logits)
        ids, logprobs = np.empty((rows, k), np.int32), np.empty((rows, k), np.float32)
        try:
            self._context.top_logprobs(
                logits.data_ptr(), rows, vocab, logits.stride(0), k, ids.ctypes.data,
                logprobs.ctypes.data,
            )  # fmt: skip
        except ValueError as error:
            raise InvalidArgument(f"top_logprobs: {error}") from error
        return ids, logprobs

    @staticmethod
    def _logits_shape(operation: str, logits: torch.Tensor) -> tuple[int, int]:
        """Rows may be further apart than the vocabulary; inside a row logits are contiguous."""
        rows, vocab = logits.shape
        if logits.dtype is not _F32 or not logits.is_cpu or (vocab > 1 and logits.stride(1) != 1):
            _refuse(operation, logits=(logits, (rows, vocab)))
        return rows, vocab
