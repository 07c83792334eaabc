"""The contract of the kernels: every implementation has these operations with these signatures.

Float tensors are torch fp32, contiguous, in host memory. Integer arrays are contiguous int32 numpy
arrays (a CPU torch tensor is accepted too). Outputs are written in place where an `out` is given.

KV pages of one layer: K `[pages, kv_heads, head_dim, page_size]` (transposed inside a page, so that
the scores of 16 consecutive positions are one vector) and V
`[pages, kv_heads, page_size, head_dim]`. In packed pools each is a `PackedPages` instead; what an
operation does with them is the same.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dendrite_engine.kernels.packed import PackedPages
from dendrite_engine.kernels.sampling_batch import SamplingBatch

IntArray = NDArray[np.int32] | torch.Tensor
Pages = torch.Tensor | PackedPages  # K or V of one layer

OPERATIONS = (
    "tree_attention", "add_rms_norm", "rope_store_kv", "silu_mul", "copy_pages", "copy_packed",
    "sample", "top_logprobs",
)  # fmt: skip


class PlanArrays(Protocol):
    """The part of a plan that attention reads; see `tree_attention`."""

    @property
    def positions(self) -> NDArray[np.int32]:
        """[T] absolute position of every row."""

    @property
    def node_pos(self) -> NDArray[np.int32]:
        """[N] position of the node's first slot, a multiple of the page size."""

    @property
    def node_len(self) -> NDArray[np.int32]:
        """[N] tokens in the node."""

    @property
    def node_row_begin(self) -> NDArray[np.int32]:
        """[N] first row that reads the node."""

    @property
    def node_row_end(self) -> NDArray[np.int32]:
        """[N] one past the last row that reads the node."""

    @property
    def node_page_indptr(self) -> NDArray[np.int32]:
        """[N + 1] the node's pages are page_indices[indptr[n] : indptr[n + 1]]."""

    @property
    def page_indices(self) -> NDArray[np.int32]:
        """Flattened page ids."""


class Kernels(Protocol):
    """One implementation of all operations, as returned by `kernels.load`."""

    @property
    def name(self) -> str:
        """ "native" or "reference"."""

    @property
    def reason(self) -> str:
        """Which instruction set and threads run, or why the native kernels don't."""

    def tree_attention(
        self, q: torch.Tensor, k_pages: Pages, v_pages: Pages, plan: PlanArrays,
        out: torch.Tensor, scale: float, window: int = 0,
    ) -> None:  # fmt: skip
        """Attend every row to its own path through the tree of pages.

        Args:
            q: [T, heads, head_dim].
            k_pages: [pages, kv_heads, head_dim, page_size], or packed.
            v_pages: [pages, kv_heads, page_size, head_dim], or packed.
            plan: whose nodes tile 0 .. positions[r] for every row r, in ascending order. It must
                not change between calls of one step: what is derived from it is kept.
            out: [T, heads, head_dim], written.
            scale: factor of the scores.
            window: a row sees kv position p when p <= positions[r] and, with window > 0,
                p > positions[r] - window.

        Raises:
            InvalidArgument: shapes disagree, K and V are of different pools, or the plan's nodes
                leave a gap.
        """

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """residual += x in place, then out = rms_norm(residual) * weight; all [T, width].

        Without a residual the norm is of x. `out` may be x.
        """

    def rope_store_kv(
        self, qkv: torch.Tensor, positions: IntArray, cos: torch.Tensor, sin: torch.Tensor,
        slots: IntArray, k_pages: Pages, v_pages: Pages, q_out: torch.Tensor,
        q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None, eps: float = 1e-6,
    ) -> None:  # fmt: skip
        """Rotate queries and keys (two-halves RoPE) and store K and V in their slots.

        Args:
            qkv: [T, (heads + 2 * kv_heads) * head_dim], queries then keys then values.
            positions: [T].
            cos: [max_position, head_dim / 2], sin the same.
            sin: see cos.
            slots: [T] page * page_size + offset; -1 is not stored.
            k_pages: one layer, written.
            v_pages: one layer, written.
            q_out: [T, heads, head_dim], written.
            q_norm: [head_dim] RMS norm weight applied to each head before the rotation, or None.
            k_norm: the same for keys.
            eps: of those norms.

        Raises:
            InvalidArgument: a position or slot is outside its table.
        """

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, f] = silu(gate_up[:, :f]) * gate_up[:, f:]."""

    def copy_pages(self, k_all: torch.Tensor, v_all: torch.Tensor, copies: IntArray) -> None:
        """Copy the used slots of pages in all layers: copies [C, 3] = (source, destination, used).

        `k_all` is [layers, pages, kv_heads, head_dim, page_size], `v_all` has the last two swapped.
        """

    def copy_packed(self, data: torch.Tensor, copies: IntArray) -> None:
        """Copy whole pages of a packed pool u8 [pages, page_bytes]; copies as in `copy_pages`."""

    def sample(
        self, logits: torch.Tensor, batch: SamplingBatch
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Choose one token per row of logits [R, V].

        Returns:
            tokens [R] and their log-probabilities [R] under the raw logits. A row with NaN or Inf
            logits, or with every token banned, gives token -1 and logprob NaN.
        """

    def top_logprobs(
        self, logits: torch.Tensor, k: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The k most likely tokens of each row of logits [R, V], most likely first, then by id.

        Returns:
            ids [R, k] and log-probabilities [R, k]; -1 and NaN in a row with NaN or Inf.
        """
