"""Operations of the device path: schemas, CPU twins, and the CUDA library that implements them.

    ops = device_kernels()              # the CUDA kernels, or why not: ops.name, ops.reason
    ops.silu_mul(gate_up, out)

Every operation is `torch.ops.dendrite.<name>`: on CPU tensors the twin of `device_reference`, on
CUDA tensors a kernel of libdendrite_cuda.so. All write into tensors that are passed in, return
nothing, wait for nothing and allocate nothing, so that a whole step can be captured in a CUDA
graph. Layouts and numerics are those of `device_reference`.

Importing this module loads no library; a new operation is a row of OPS, its kernel and its twin.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

Operation = Callable[..., Any]

_KERNELS = "dendrite_engine.kernels"


class Op(NamedTuple):
    """A row of OPS."""

    twin: str  # "module:function" in dendrite_engine.kernels
    schema: str  # `Tensor(a!)` is written; the letters only tell the written ones apart


OPS: dict[str, Op] = {
    "take_tokens": Op("device_reference:take_tokens", "(Tensor(a!) token_ids, Tensor drawn) -> ()"),
    "embed": Op(
        "device_reference:embed", "(Tensor token_ids, Tensor table, Tensor(a!) residual) -> ()"
    ),
    "add_rms_norm": Op(
        "device_reference:add_rms_norm",
        "(Tensor? x, Tensor(a!) residual, Tensor weight, float eps, Tensor(b!) out,"
        " Tensor? rows) -> ()",
    ),
    "rope_store_kv": Op(
        "device_reference:rope_store_kv",
        "(Tensor qkv, Tensor positions, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_pages,"
        " Tensor(b!) v_pages, Tensor(c!) q_out, Tensor? q_norm, Tensor? k_norm, float eps) -> ()",
    ),
    "silu_mul": Op("device_reference:silu_mul", "(Tensor gate_up, Tensor(a!) out) -> ()"),
    "copy_pages": Op(
        "device_reference:copy_pages",
        "(Tensor(a!) k_all, Tensor(b!) v_all, Tensor copies, Tensor count) -> ()",
    ),
    "tree_attention": Op(
        "device_reference_attention:tree_attention",
        "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor positions, Tensor work,"
        " Tensor(a!) partials, Tensor(b!) out, float scale, int window,"
        " int q_tile, int workers) -> ()",
    ),
    "tree_attention_workers": Op(
        "device_reference_attention:tree_attention_workers",
        "(Tensor like, int head_dim, int kv_heads, int q_tile) -> int",
    ),
    "rope_store_packed": Op(
        "device_reference_packed:rope_store_packed",
        "(Tensor qkv, Tensor positions, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) data,"
        " Tensor(b!) q_out, Tensor? q_norm, Tensor? k_norm, Tensor? k_signs, Tensor? v_signs,"
        " Tensor? k_mean, float eps, int layer_at, int page_size, int kv_heads, int k_codec,"
        " int v_codec) -> ()",
    ),
    "copy_packed": Op(
        "device_reference_packed:copy_packed",
        "(Tensor(a!) data, Tensor copies, Tensor count) -> ()",
    ),
    "tree_attention_packed": Op(
        "device_reference_packed:tree_attention_packed",
        "(Tensor q, Tensor data, Tensor positions, Tensor work, Tensor(a!) partials,"
        " Tensor(b!) out, Tensor? v_signs, float scale, int window, int q_tile, int workers,"
        " int layer_at, int page_size, int kv_heads, int k_codec, int v_codec) -> ()",
    ),
    "tree_attention_packed_workers": Op(
        "device_reference_packed:tree_attention_packed_workers",
        "(Tensor like, int head_dim, int kv_heads, int q_tile, int cell_bytes) -> int",
    ),
    "skinny_linear": Op(
        "device_reference_linear:skinny_linear",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
    ),
    "skinny_linear_silu_mul": Op(
        "device_reference_linear:skinny_linear_silu_mul",
        "(Tensor x, Tensor weight, Tensor(a!) out) -> ()",
    ),
    "stream_linear": Op(
        "device_reference_linear:stream_linear",
        "(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out, int groups=0, int splits=0) -> ()",
    ),
    "stream_linear_silu_mul": Op(
        "device_reference_linear:stream_linear_silu_mul",
        "(Tensor x, Tensor weight, Tensor(a!) out, int groups=0, int splits=0) -> ()",
    ),
    "stream_linear_serves": Op(
        "device_reference_linear:stream_linear_serves", "(Tensor like) -> bool"
    ),
    "sample": Op(
        "device_reference_sampling:sample",
        "(Tensor logits, Tensor params, Tensor(a!) workspace, Tensor(b!) out,"
        " Tensor? previous=None, bool greedy=False, int blocks=0) -> ()",
    ),
    "top_logprobs": Op(
        "device_reference_sampling:top_logprobs",
        "(Tensor logits, int k, Tensor(a!) ids, Tensor(b!) logprobs, Tensor? rows=None) -> ()",
    ),
}


def _twin(target: str) -> Operation:
    """The function `module:name`, imported when it is first called."""
    module, _, name = target.partition(":")

    @functools.cache
    def function() -> Operation:
        return cast("Operation", getattr(importlib.import_module(f"{_KERNELS}.{module}"), name))

    return lambda *arguments: function()(*arguments)


def _nothing(*_: Any) -> None:
    """Fake implementation: the outputs are arguments."""


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, op in OPS.items():
        library.define(name + op.schema)
        if op.schema.endswith("-> ()"):
            torch.library.register_fake(f"{namespace}::{name}", _nothing, lib=library)
    return library


TWINS: dict[str, Operation] = {name: _twin(op.twin) for name, op in OPS.items()}
_LIBRARY = _define("dendrite")
for _name, _function in TWINS.items():
    _LIBRARY.impl(_name, _function, "CPU")


@dataclass(frozen=True)
class LoadResult:
    """What came of loading a library of kernels.

    Attributes:
        loaded: its operations can be called.
        reason: what it was built for, or why it isn't loaded.
        path: the file, or None when none was found.
    """

    loaded: bool
    reason: str
    path: Path | None = None


def _find(name: str) -> Path | None:
    """The newest library of this name: beside the native modules, or a development build."""
    package = Path(__file__).resolve().parents[1]
    native = importlib.util.find_spec("dendrite_engine._core")
    folders = [package, package.parents[1] / "build" / "cuda"]
    if native is not None and native.origin is not None:
        folders.append(Path(native.origin).parent)
    found = [folder / name for folder in folders if (folder / name).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _load(name: str, path: Path | None) -> LoadResult:
    path = _find(name) if path is None else path.resolve()
    if path is None:
        return LoadResult(False, f"{name} was not built (the output of the build says why)")
    try:
        torch.ops.load_library(str(path))
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return LoadResult(False, f"{path.name} can't be loaded: {error.__cause__ or error}", path)
    for function in (library.dendrite_built_for, library.dendrite_trouble):
        function.restype = ctypes.c_char_p
    trouble = library.dendrite_trouble().decode()
    if trouble:
        return LoadResult(False, f"{path.name} has no kernel that runs here: {trouble}", path)
    return LoadResult(True, library.dendrite_built_for().decode(), path)


@functools.cache
def load_cuda(path: Path | None = None) -> LoadResult:
    """Load libdendrite_cuda.so, once; `path` names another file than the installed one.

    The current CUDA device must have code in it. Never raises: the result says what happened.
    """
    if torch.version.cuda is None:
        return LoadResult(False, f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return LoadResult(False, "torch finds no CUDA device")
    return _load("libdendrite_cuda.so", path)


@functools.cache
def load_emulated(path: Path | None = None) -> LoadResult:
    """Load libdendrite_emulated.so, once: the kernels' own source, run on the CPU, for tests."""
    result = _load("libdendrite_emulated.so", path)
    if result.loaded:
        _EMULATED.append(_define("dendrite_emulated"))
    return result


_EMULATED: list[torch.library.Library] = []  # schemas live as long as their library object


class DeviceKernels:
    """The operations as methods with the least overhead.

    Args:
        name: "cuda" (CPU tensors work too, by the twins), "emulated" (CPU tensors) or "twin".
        reason: what the library was built for, or why the twins stand in.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason
        namespaces = {"cuda": "dendrite", "emulated": "dendrite_emulated"}
        if name in namespaces:
            packet = getattr(torch.ops, namespaces[name])
            operations = {op: getattr(packet, op).default for op in OPS}
        else:
            operations = TWINS
        self._take_tokens = operations["take_tokens"]
        self._embed = operations["embed"]
        self._add_rms_norm = operations["add_rms_norm"]
        self._rope_store_kv = operations["rope_store_kv"]
        self._silu_mul = operations["silu_mul"]
        self._copy_pages = operations["copy_pages"]
        self._tree_attention = operations["tree_attention"]
        self._tree_attention_workers = operations["tree_attention_workers"]
        self._rope_store_packed = operations["rope_store_packed"]
        self._copy_packed = operations["copy_packed"]
        self._tree_attention_packed = operations["tree_attention_packed"]
        self._tree_attention_packed_workers = operations["tree_attention_packed_workers"]
        self._skinny_linear = operations["skinny_linear"]
        self._skinny_linear_silu_mul = operations["skinny_linear_silu_mul"]
        self._stream_linear = operations["stream_linear"]
        self._stream_linear_silu_mul = operations["stream_linear_silu_mul"]
        self._stream_linear_serves = operations["stream_linear_serves"]
        self._sample = operations["sample"]
        self._top_logprobs = operations["top_logprobs"]

    def take_tokens(self, token_ids: torch.Tensor, drawn: torch.Tensor) -> None:
        """See `device_reference.take_tokens`."""
        self._take_tokens(token_ids, drawn)

    def embed(self, token_ids: torch.Tensor, table: torch.Tensor, residual: torch.Tensor) -> None:
        """See `device_reference.embed`."""
        self._embed(token_ids, table, residual)

    def add_rms_norm(
        self, x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float,
        out: torch.Tensor, rows: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """See `device_reference.add_rms_norm`."""
        self._add_rms_norm(x, residual, weight, eps, out, rows)

    def rope_store_kv(
        self, qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        slots: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, q_out: torch.Tensor,
        q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        """See `device_reference.rope_store_kv`."""
        self._rope_store_kv(
            qkv, positions, cos, sin, slots, k_pages, v_pages, q_out, q_norm, k_norm, eps
        )

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """See `device_reference.silu_mul`."""
        self._silu_mul(gate_up, out)

    def copy_pages(
        self, k_all: torch.Tensor, v_all: torch.Tensor, copies: torch.Tensor, count: torch.Tensor
    ) -> None:
        """See `device_reference.copy_pages`."""
        self._copy_pages(k_all, v_all, copies, count)

    def tree_attention(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor,
        positions: torch.Tensor, work: torch.Tensor, partials: torch.Tensor, out: torch.Tensor,
        scale: float, window: int, q_tile: int, workers: int,
    ) -> None:  # fmt: skip
        """See `device_reference_attention.tree_attention`."""
        self._tree_attention(
            q, k_pages, v_pages, positions, work, partials, out, scale, window, q_tile, workers
        )

    def tree_attention_workers(
        self, like: torch.Tensor, head_dim: int, kv_heads: int, q_tile: int
    ) -> int:
        """See `device_reference_attention.tree_attention_workers`."""
        return int(self._tree_attention_workers(like, head_dim, kv_heads, q_tile))

    def rope_store_packed(
        self, qkv: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        slots: torch.Tensor, data: torch.Tensor, q_out: torch.Tensor,
        q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, k_signs: torch.Tensor | None,
        v_signs: torch.Tensor | None, k_mean: torch.Tensor | None, eps: float, layer_at: int,
        page_size: int, kv_heads: int, k_codec: int, v_codec: int,
    ) -> None:  # fmt: skip
        """See `device_reference_packed.rope_store_packed`."""
        self._rope_store_packed(
            qkv, positions, cos, sin, slots, data, q_out, q_norm, k_norm, k_signs, v_signs, k_mean,
            eps, layer_at, page_size, kv_heads, k_codec, v_codec,
        )  # fmt: skip

    def copy_packed(self, data: torch.Tensor, copies: torch.Tensor, count: torch.Tensor) -> None:
        """See `device_reference_packed.copy_packed`."""
        self._copy_packed(data, copies, count)

    def tree_attention_packed(
        self, q: torch.Tensor, data: torch.Tensor, positions: torch.Tensor, work: torch.Tensor,
        partials: torch.Tensor, out: torch.Tensor, v_signs: torch.Tensor | None, scale: float,
        window: int, q_tile: int, workers: int, layer_at: int, page_size: int, kv_heads: int,
        k_codec: int, v_codec: int,
    ) -> None:  # fmt: skip
        """See `device_reference_packed.tree_attention_packed`."""
        self._tree_attention_packed(
            q, data, positions, work, partials, out, v_signs, scale, window, q_tile, workers,
            layer_at, page_size, kv_heads, k_codec, v_codec,
        )  # fmt: skip

    def tree_attention_packed_workers(
        self, like: torch.Tensor, head_dim: int, kv_heads: int, q_tile: int, cell_bytes: int
    ) -> int:
        """See `device_reference_packed.tree_attention_packed_workers`."""
        return int(
            self._tree_attention_packed_workers(like, head_dim, kv_heads, q_tile, cell_bytes)
        )

    def skinny_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """See `device_reference_linear.skinny_linear`."""
        self._skinny_linear(x, weight, bias, out)

    def skinny_linear_silu_mul(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """See `device_reference_linear.skinny_linear_silu_mul`."""
        self._skinny_linear_silu_mul(x, weight, out)

    def stream_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
        groups: int = 0, splits: int = 0,
    ) -> None:  # fmt: skip
        """See `device_reference_linear.stream_linear`."""
        self._stream_linear(x, weight, bias, out, groups, splits)

    def stream_linear_silu_mul(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, groups: int = 0,
        splits: int = 0,
    ) -> None:  # fmt: skip
        """See `device_reference_linear.stream_linear_silu_mul`."""
        self._stream_linear_silu_mul(x, weight, out, groups, splits)

    def stream_linear_serves(self, like: torch.Tensor) -> bool:
        """See `device_reference_linear.stream_linear_serves`."""
        return bool(self._stream_linear_serves(like))

    def sample(
        self, logits: torch.Tensor, params: torch.Tensor, workspace: torch.Tensor,
        out: torch.Tensor, previous: torch.Tensor | None = None, greedy: bool = False,
        blocks: int = 0,
    ) -> None:  # fmt: skip
        """See `device_reference_sampling.sample`."""
        self._sample(logits, params, workspace, out, previous, greedy, blocks)

    def top_logprobs(
        self, logits: torch.Tensor, k: int, ids: torch.Tensor, logprobs: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """See `device_reference_sampling.top_logprobs`."""
        self._top_logprobs(logits, k, ids, logprobs, rows)


def device_kernels(path: Path | None = None) -> DeviceKernels:
    """The CUDA kernels, or their twins with the reason; see `load_cuda`."""
    result = load_cuda(path)
    return DeviceKernels("cuda" if result.loaded else "twin", result.reason)
