"""Native SIMD kernels. `Address` is a tensor's `data_ptr()`; callers check shapes first."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Address = int
Ints = NDArray[np.int32]

def available_isas() -> list[str]: ...
def team_description() -> str: ...

class Schedule:
    def __init__(
        self, positions: Ints, node_pos: Ints, node_len: Ints, node_row_begin: Ints,
        node_row_end: Ints, node_page_indptr: Ints, page_indices: Ints, page_size: int,
        window: int, group: int,
    ) -> None: ...  # fmt: skip
    @property
    def num_rows(self) -> int: ...

class Context:
    threads: int
    def __init__(self, isa: str = "auto", threads: int = 1) -> None: ...
    @property
    def isa(self) -> str: ...
    def tree_attention(
        self, schedule: Schedule, q: Address, k_pages: Address, v_pages: Address, out: Address,
        heads: int, kv_heads: int, dim: int, num_pages: int, scale: float, /,
    ) -> None: ...  # fmt: skip
    def tree_attention_packed(
        self, schedule: Schedule, q: Address, keys: tuple[int, ...], values: tuple[int, ...],
        out: Address, heads: int, scale: float, /,
    ) -> None: ...  # fmt: skip
    def add_rms_norm(
        self, x: Address, residual: Address, weight: Address, eps: float, out: Address, rows: int,
        width: int, /,
    ) -> None: ...  # fmt: skip
    def rope_store_kv(
        self, qkv: Address, positions: Ints, cos: Address, sin: Address, slots: Ints,
        k_pages: Address, v_pages: Address, q_out: Address, q_norm: Address, k_norm: Address,
        eps: float, rows: int, heads: int, kv_heads: int, dim: int, page_size: int, num_pages: int,
        max_position: int, /,
    ) -> None: ...  # fmt: skip
    def rope_store_packed(
        self, qkv: Address, positions: Ints, cos: Address, sin: Address, slots: Ints,
        keys: tuple[int, ...], values: tuple[int, ...], q_out: Address, q_norm: Address,
        k_norm: Address, eps: float, rows: int, heads: int, max_position: int, /,
    ) -> None: ...  # fmt: skip
    def copy_packed(self, data: Address, pages: int, page_bytes: int, copies: Ints, /) -> None: ...
    def silu_mul(self, gate_up: Address, out: Address, rows: int, width: int, /) -> None: ...
    def copy_pages(
        self, k_all: Address, v_all: Address, copies: Ints, layers: int, pages: int, kv_heads: int,
        dim: int, page_size: int, /,
    ) -> None: ...  # fmt: skip
    def sample(
        self, logits: Address, rows: int, vocab: int, stride: int, batch: tuple[Any, ...],
        tokens: Address, logprobs: Address, /,
    ) -> None: ...  # fmt: skip
    def top_logprobs(
        self, logits: Address, rows: int, vocab: int, stride: int, k: int, ids: Address,
        logprobs: Address, /,
    ) -> None: ...  # fmt: skip
