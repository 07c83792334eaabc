"""One attention problem for all contestants: a planned tree, queries, and copies of its pages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dendrite_engine.errors import InvalidArgument
from dendrite_lab.bench.gpu_timing import cache_bytes, copies_for
from dendrite_lab.bench.gpu_trees import Planned
from dendrite_lab.bench.shapes import attention_floor_us

SAMPLED_ROWS = 16


@dataclass(frozen=True, slots=True)
class Heads:
    """Heads of a layer."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def name(self) -> str:
        """As the tables say it."""
        return f"{self.heads}/{self.kv_heads} d={self.head_dim}"

    @classmethod
    def parse(cls, text: str) -> Heads:
        """From "32x8x128".

        Raises:
            InvalidArgument: the text is not of that form.
        """
        try:
            heads, kv_heads, head_dim = (int(part) for part in text.split("x"))
        except ValueError:
            raise InvalidArgument(
                f"not heads: {text!r}; write query heads, K/V heads and their size, as 32x8x128"
            ) from None
        return cls(heads, kv_heads, head_dim)


@dataclass(slots=True)
class Case:
    """What the contestants get.

    Attributes:
        planned: the tree's plan.
        heads: of the layer.
        q: [rows, heads, head_dim].
        k, v: [copies, pages, kv_heads, page_size, head_dim].
        scale: factor on the scores.
        device: where it runs.
        exact: fp32 results of the sampled rows, once they were needed.
    """

    planned: Planned
    heads: Heads
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    device: torch.device
    exact: torch.Tensor | None = None

    @property
    def copies(self) -> int:
        """Copies of the pages."""
        return self.k.shape[0]

    @property
    def floor_us(self) -> float:
        """The least time one H100 needs."""
        tree, heads = self.planned.tree, self.heads
        contexts = tree.contexts
        return attention_floor_us(
            len(contexts), tree.unique_tokens, sum(contexts), heads.heads, heads.kv_heads,
            heads.head_dim,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        call: launches it on copy i of the pages and returns [rows, heads, head_dim].
        host_us: what its planning on the host took, once per step in real use.
    """

    call: Callable[[int], torch.Tensor]
    host_us: float


Maker = Callable[[Case], Contestant]


def make_case(
    planned: Planned, heads: Heads, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Case:
    """Random queries, keys and values; as many copies of the pages as the L2 cache asks for."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = planned.tree.unique_tokens
    working_set = 2 * tokens * heads.kv_heads * heads.head_dim * dtype.itemsize
    copies = copies_for(working_set, cache_bytes(device))

    def normal(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=device)
        return made.normal_(generator=generator)

    pages = (copies, planned.num_pages, heads.kv_heads, planned.page_size, heads.head_dim)
    q = normal(len(planned.plan.positions), heads.heads, heads.head_dim)
    return Case(planned, heads, q, normal(*pages), normal(*pages), heads.head_dim**-0.5, device)


def relative_error(case: Case, out: torch.Tensor) -> float:
    """||out - exact|| / ||exact|| over some rows, against fp32 attention over each row's pages."""
    rows = sampled_rows(out.shape[0])
    if case.exact is None:
        case.exact = torch.stack([_exact_row(case, row) for row in rows])
    return distance(out[torch.tensor(rows, device=out.device)], case.exact)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    a, b = a.float(), b.float()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def sampled_rows(count: int) -> list[int]:
    """The first, the last, and some rows between."""
    chosen = np.random.default_rng(0).permutation(count)[: SAMPLED_ROWS - 2].tolist()
    return sorted({0, count - 1, *chosen})


def _exact_row(case: Case, row: int) -> torch.Tensor:
    """Attention of one row in fp32, [heads, head_dim]."""
    index, length = row_pages(case, row)
    k, v = (
        pages[0, index].float().transpose(1, 2).flatten(0, 1)[:length] for pages in (case.k, case.v)
    )
    return attend_row(case, row, k, v)


def row_pages(case: Case, row: int) -> tuple[torch.Tensor, int]:
    """Ids of the pages that a row reads, in order, and how many of their tokens."""
    plan: Any = case.planned.plan
    reads = (plan.node_row_begin <= row) & (row < plan.node_row_end)
    ids = np.concatenate([
        plan.page_indices[plan.node_page_indptr[n] : plan.node_page_indptr[n + 1]]
        for n in np.flatnonzero(reads)
    ])  # fmt: skip
    length = int(plan.positions[row]) + 1  # of what a prompt's rows read, later tokens are hidden
    return torch.from_numpy(ids.astype(np.int64)).to(case.device), length


def attend_row(case: Case, row: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of one row over k and v fp32 [n, kv_heads, head_dim], [heads, head_dim]."""
    group = case.heads.heads // case.heads.kv_heads
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = torch.einsum("hd,khd->hk", case.q[row].float(), k) * case.scale
    return torch.einsum("hk,khd->hd", score.softmax(-1), v)
