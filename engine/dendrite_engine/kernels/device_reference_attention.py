"""Twin of the GPU's tree attention: the same work list, walked in plain torch.

Layout of the list: cuda_ext/include/dendrite/attention_work.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNIT = 16  # slots of an entry
TWIN_WORKERS = 4  # what the twin answers when asked how many workers fill the device

_HEADER = 8


@dataclass(frozen=True, slots=True)
class WorkList:
    """A work list taken apart.

    Attributes:
        indptr: [workers + 1] segments of each worker.
        segments: [S, 4] block, first entry, one past the last entry, slot or -1.
        blocks: [B, 4] first row, rows, slots, first slot.
        entries: [E, 4] first slot in the pool, its position, readers (first | end << 16), length.
    """

    indptr: torch.Tensor
    segments: torch.Tensor
    blocks: torch.Tensor
    entries: torch.Tensor

    @classmethod
    def read(cls, work: torch.Tensor) -> WorkList:
        """Views into the int32 list `work`."""
        workers, indptr, segments, blocks, entries, count, _, _ = work[:_HEADER].tolist()
        ends = work[indptr : indptr + workers + 1]
        last = int(work[segments : segments + 4 * int(ends[-1])].view(-1, 4)[:, 2].max(0)[0])
        return cls(
            ends,
            work[segments : segments + 4 * int(ends[-1])].view(-1, 4),
            work[blocks : blocks + 4 * count].view(-1, 4),
            work[entries : entries + 4 * last].view(-1, 4),
        )


def tree_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, positions: torch.Tensor,
    work: torch.Tensor, partials: torch.Tensor, counters: torch.Tensor, out: torch.Tensor,
    scale: float, window: int, q_tile: int, workers: int,
) -> None:  # fmt: skip
    """Attend every row of the work list's blocks to the entries it reads; in fp32, per block."""
    del partials, counters, q_tile, workers
    if q.shape[0] == 0:
        return
    listed = WorkList.read(work.cpu())
    owner: dict[int, list[torch.Tensor]] = {}
    for block, begin, end, _ in listed.segments.tolist():
        owner.setdefault(block, []).append(listed.entries[begin:end])
    for index, parts in owner.items():
        first, count = listed.blocks[index, :2].tolist()
        rows = slice(first, first + count)
        out[rows] = _block(
            q[rows], k_pages, v_pages, positions[rows], torch.cat(parts), scale, window
        ).to(out.dtype)


def tree_attention_workers(like: torch.Tensor, head_dim: int, kv_heads: int, q_tile: int) -> int:
    """Workers for each kv head that fill the device; a constant here."""
    del like, head_dim, kv_heads, q_tile
    return TWIN_WORKERS


def _block(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, positions: torch.Tensor,
    entries: torch.Tensor, scale: float, window: int,
) -> torch.Tensor:  # fmt: skip
    """q [rows, heads, head_dim] of one block -> the same shape in fp32."""
    rows, heads, dim = q.shape
    pages, kv_heads, page_size, _ = k_pages.shape
    slot, pos, length, readers = (entries[:, i].long() for i in (0, 1, 3, 2))
    offset = torch.arange(UNIT)
    index = slot[:, None] + torch.minimum(offset[None], (length - 1).clamp(min=0)[:, None])
    at = (pos[:, None] + offset).flatten()  # [slots]
    valid = (offset[None] < length[:, None]).flatten()
    row = torch.arange(rows)[:, None]
    reads = (row >= (readers & 0xFFFF)[None]) & (row < (readers >> 16)[None])
    there = positions.cpu().long()[:, None]
    visible = reads.repeat_interleave(UNIT, 1) & valid[None] & (at[None] <= there)
    if window > 0:
        visible &= at[None] > there - window
    keys, values = _gather(k_pages, index), _gather(v_pages, index)
    values = torch.where(valid.to(values.device)[:, None, None], values, 0.0)
    grouped = q.float().reshape(rows, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("rhgd,shd->rhgs", grouped, keys) * scale
    scores = scores.masked_fill(~visible.to(q.device)[:, None, None], float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num_(0.0) if not visible.any(1).all() else (
        torch.softmax(scores, -1)
    )
    return torch.einsum("rhgs,shd->rhgd", weights, values).reshape(rows, heads, dim)


def _gather(pages: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """fp32 [slots, kv_heads, head_dim] of pool slots [E, UNIT]."""
    page_size = pages.shape[2]
    flat = index.flatten().to(pages.device)
    taken: torch.Tensor = pages[flat // page_size, :, flat % page_size]
    return taken.float()
