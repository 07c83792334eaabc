"""Twin of the GPU's tree attention: the same work list, walked in plain torch.

Layout of the list: cuda_ext/include/dendrite/attention_work.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

UNIT = 16  # slots of an entry
TWIN_WORKERS = 4  # what the twin answers when asked how many workers fill the device

_HEADER = 4


@dataclass(frozen=True, slots=True)
class WorkList:
    """A work list taken apart.

    Attributes:
        blocks: [B, 4] first row, rows, slots, first slot.
        segments: [S, 8] where its entries start, how many, slot or -1, first row, rows, next
            segment of the worker or -1, first query in the block, unused; the first ones belong to
            workers 0, 1, ...
        work: the list itself.
    """

    blocks: torch.Tensor
    segments: torch.Tensor
    work: torch.Tensor

    @classmethod
    def read(cls, work: torch.Tensor, rows: int, rows_per_block: int) -> WorkList:
        """Views into the int32 list `work` of a batch of `rows` rows."""
        end = _HEADER + 4 * -(-rows // rows_per_block)
        blocks = work[_HEADER:end].view(-1, 4)
        return cls(blocks, work[end : end + 8 * int(work[1])].view(-1, 8), work)

    def entries(self, segment: list[int]) -> torch.Tensor:
        """[E, 4] first slot in the pool, its position, readers (first | old << 15 | end << 16),
        length.
        """
        return self.work[segment[0] : segment[0] + 4 * segment[1]].view(-1, 4)

    def of_workers(self) -> list[list[list[int]]]:
        """The segments of each worker in its order."""
        listed = self.segments.tolist()
        reached = {segment[5] for segment in listed}
        chains = []
        for index in range(len(listed)):
            if index in reached:
                continue
            chain, at = [], index
            while at >= 0:
                chain.append(listed[at])
                at = listed[at][5]
            chains.append(chain)
        return chains


SlotReader = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PageReader:
    """How the pages of a layer are read.

    Attributes:
        kv_heads: of the model.
        keys, values: fp32 [n, kv_heads, head_dim] of pool slots [n].
        finish: what becomes of fp32 sums [rows, heads, head_dim] before they are rounded.
    """

    kv_heads: int
    keys: SlotReader
    values: SlotReader
    finish: SlotReader | None = None


def tree_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, positions: torch.Tensor,
    work: torch.Tensor, partials: torch.Tensor, out: torch.Tensor,
    scale: float, window: int, q_tile: int, workers: int,
) -> None:  # fmt: skip
    """Attend every row of the work list's blocks to the entries it reads; in fp32, per block."""
    del partials, workers
    reader = PageReader(k_pages.shape[1], partial(_gather, k_pages), partial(_gather, v_pages))
    attend_blocks(q, reader, positions, work, out, scale, window, q_tile)


def attend_blocks(
    q: torch.Tensor, reader: PageReader, positions: torch.Tensor, work: torch.Tensor,
    out: torch.Tensor, scale: float, window: int, q_tile: int,
) -> None:  # fmt: skip
    """`tree_attention` over any kind of pages; rows without work are left alone."""
    if q.shape[0] == 0:
        return
    rows_per_block = max(1, q_tile // (q.shape[1] // reader.kv_heads))
    listed = WorkList.read(work.cpu(), q.shape[0], rows_per_block)
    # The pieces of a block in list order: a row's entries come in increasing position.
    pieces = sorted((s for s in listed.segments.tolist() if s[1] > 0), key=lambda s: s[0])
    blocks: dict[int, list[torch.Tensor]] = {}
    for segment in pieces:
        block = segment[3] // rows_per_block
        entries = listed.entries(segment).clone()
        entries[:, 2] += (segment[3] - block * rows_per_block) * 0x10001  # readers in the block
        blocks.setdefault(block, []).append(entries)
    for block, parts in blocks.items():
        first, count = listed.blocks[block, :2].tolist()
        rows = slice(first, first + count)
        summed = _block(q[rows], reader, positions[rows], torch.cat(parts), scale, window)
        out[rows] = (summed if reader.finish is None else reader.finish(summed)).to(out.dtype)


def tree_attention_workers(like: torch.Tensor, head_dim: int, kv_heads: int, q_tile: int) -> int:
    """Workers for each kv head that fill the device; a constant here."""
    del like, head_dim, kv_heads, q_tile
    return TWIN_WORKERS


def _block(
    q: torch.Tensor, reader: PageReader, positions: torch.Tensor, entries: torch.Tensor,
    scale: float, window: int,
) -> torch.Tensor:  # fmt: skip
    """q [rows, heads, head_dim] of one block -> the same shape in fp32."""
    rows, heads, dim = q.shape
    kv_heads = reader.kv_heads
    slot, pos, length, readers = (entries[:, i].long() for i in (0, 1, 3, 2))
    offset = torch.arange(UNIT)
    index = slot[:, None] + torch.minimum(offset[None], (length - 1).clamp(min=0)[:, None])
    at = (pos[:, None] + offset).flatten()  # [slots]
    valid = (offset[None] < length[:, None]).flatten()
    row = torch.arange(rows)[:, None]
    reads = (row >= (readers & 0x7FFF)[None]) & (row < (readers >> 16)[None])
    there = positions.cpu().long()[:, None]
    visible = reads.repeat_interleave(UNIT, 1) & valid[None] & (at[None] <= there)
    if window > 0:
        visible &= at[None] > there - window
    keys, values = reader.keys(index.flatten()), reader.values(index.flatten())
    grouped = q.float().reshape(rows, kv_heads, heads // kv_heads, dim)
    seen = visible.to(q.device)
    summed = [_row(grouped[i], keys[seen[i]], values[seen[i]], scale) for i in range(rows)]
    return torch.stack(summed).reshape(rows, heads, dim)


def _row(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> torch.Tensor:  # fmt: skip
    """q [kv_heads, group, dim] over all of keys and values [n, kv_heads, dim]; 0 where n is 0.

    Shapes are those of the row's own context, so its bits do not depend on the rows beside it.
    """
    weights = torch.softmax(torch.einsum("hgd,shd->hgs", q, keys) * scale, -1)
    return torch.einsum("hgs,shd->hgd", weights, values)


def _gather(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """fp32 [n, kv_heads, head_dim] of pool slots [n]."""
    page_size = pages.shape[2]
    slots = slots.to(pages.device)
    taken: torch.Tensor = pages[slots // page_size, :, slots % page_size]
    return taken.float()
