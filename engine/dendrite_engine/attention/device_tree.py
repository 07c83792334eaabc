"""Tree attention on the device: the host cuts the plan into a work list, one kernel walks it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dendrite_engine.attention.base import Plan
from dendrite_engine.attention.device_base import AttentionSetup, DeviceAttention, DeviceBatch
from dendrite_engine.errors import BackendUnavailable
from dendrite_engine.kernels.device_packed import DevicePages

_HEAD_DIMS = (64, 96, 128, 256)
_UNIT = 16  # slots of an entry of the work list, which takes 4 ints
_MAX_FIRST_CAPACITY = 1 << 22  # ints
# Variants: tiles of 64 queries where those of variant 0 have 128, and for packed pages of 8 or 16.
_NARROW, _FEW = 1, 2
# Tiles of 64 queries are taken below so many times the page reads of tiles of 128. From runs on an
# H100 over trees of 1 to 1,024 branches; prompts, which read twice as much, stay with 128.
_MAX_READS = {64: 1.95, 96: 1.1, 128: 1.1}  # by head_dim
# Pages read by tiles of 128, times kv heads, up to which heads of 64 take tiles of 64 queries in a
# captured pass whatever the tree: two blocks on a multiprocessor hide each other's start.
_FEW_READS = {64: 24576}
# The kernel for few queries a page takes packed pages of such heads. It is chosen where its tiles
# read at most so many times as much as those of 64 queries, and where that, times kv heads, gives
# its many workers enough to do. From runs on an H100.
_FEW_HEAD_DIMS = (64, 128)
_MAX_FEW_READS, _LEAST_FEW_READS = 2.0, 16384
# With cuts at fixed positions there are too few pieces for twice as many blocks.
_MAX_READS_AT_FIXED_CUTS, _FEW_READS_AT_FIXED_CUTS = 1.1, 0


class DeviceTreeAttention(DeviceAttention):
    """Reads each page once for all queries of a tile, whatever the tree.

    The work section of a batch is one list for each distinct sliding window of the model, each in
    an equal part of the section, so that a captured call finds it for every step.
    """

    name = "tree"

    def __init__(self, setup: AttentionSetup) -> None:
        if setup.head_dim not in _HEAD_DIMS and not setup.is_twin:
            raise BackendUnavailable(
                f"there is no kernel for head_dim {setup.head_dim}, only for "
                f"{', '.join(map(str, _HEAD_DIMS))}"
            )
        self._setup = setup
        self._build, self._reads, note = _work_builder()
        self._group = setup.num_heads // setup.num_kv_heads
        self._windows = sorted(setup.windows)
        like = torch.empty(1, dtype=setup.dtype, device=setup.device)
        ops = setup.ops
        sizes = like, setup.head_dim, setup.num_kv_heads

        def workers(tile: int) -> int:
            if setup.is_packed:
                return int(ops.tree_attention_packed_workers(*sizes, tile, setup.cell_bytes))
            return int(ops.tree_attention_workers(*sizes, tile))

        tiles = {self._tile(1), self._tile(setup.max_rows), self._few_tile()} - {0}
        counts = {tile: workers(tile) for tile in tiles}
        self._workers = {tile: count for tile, count in counts.items() if count}
        self._few = min(self._workers) if min(self._workers) < 64 else 0
        self._max_reads, self._few_reads = self._limits()
        self._results = 0
        self._reserve(max(2 * count * tile for tile, count in self._workers.items()))
        self.reason = f"{setup.ops.name} kernel ({setup.ops.reason}){note}"

    def _tile(self, rows: int, variant: int = 0) -> int:
        """Queries of a tile; a function of what a captured call keeps."""
        if variant == _FEW:
            return self._few
        setup = self._setup
        wide = setup.dtype != torch.float32 and setup.head_dim <= 128
        return 128 if wide and rows * self._group > 64 and variant != _NARROW else 64

    def _few_tile(self) -> int:
        """Queries of a tile of the kernel for few queries; 0 where it can't be taken.

        Its sums are not those of the other kernels, so not where bits may not depend on the tree.
        """
        setup = self._setup
        taken = setup.is_packed and setup.head_dim in _FEW_HEAD_DIMS
        if not taken or setup.deterministic or setup.dtype == torch.float32 or self._group > 16:
            return 0
        return 8 if self._group <= 8 else 16

    def _limits(self) -> tuple[float, int]:
        """Up to which page reads the narrow tile is taken; see the constants."""
        if (
            self._tile(1) == self._tile(self._setup.max_rows)
            or self._setup.head_dim not in _MAX_READS
        ):
            return 0.0, 0
        if self._setup.deterministic:
            return _MAX_READS_AT_FIXED_CUTS, _FEW_READS_AT_FIXED_CUTS
        return _MAX_READS[self._setup.head_dim], _FEW_READS.get(self._setup.head_dim, 0)

    def _choose(self, plan: Plan, rows: int) -> int:
        """The variant for a plan; O(nodes).

        Two tiles of 64 queries run side by side where one of 128 does, and a page of few rows
        occupies half as much; but pages that many rows share are read by twice as many tiles.
        A row's bits are the same with either of these: its operations are those of the entries it
        reads. Not so with the kernel for few queries, see `_few_tile`.
        """
        narrows = self._max_reads > 0 and self._tile(rows) != 64
        if not self._few and not narrows:
            return 0
        nodes = plan.node_row_begin, plan.node_row_end, plan.node_page_indptr
        narrow = self._reads(*nodes, 64 // self._group)
        if self._few:
            few = self._reads(*nodes, self._few // self._group)
            enough = few * self._setup.num_kv_heads >= _LEAST_FEW_READS
            if enough and few <= _MAX_FEW_READS * narrow:
                return _FEW
        if not narrows:
            return 0
        wide = self._reads(*nodes, 128 // self._group)
        little = self._setup.num_kv_heads * wide <= self._few_reads
        little = little and rows <= self._setup.graph_rows
        return _NARROW if little or narrow < self._max_reads * wide else 0

    def _reserve(self, results: int) -> None:
        """Scratch for partial results of so many queries of each kv head."""
        setup, self._results = self._setup, results
        size = results * setup.num_kv_heads * (setup.head_dim + 2)
        self._partials = torch.empty(size, device=setup.device)
        self.scratch_version += 1

    def work_capacity(self, num_pages: int) -> int:
        """Room for a full batch of a prompt over all pages, within reason."""
        setup = self._setup
        rows_per_block = max(1, self._tile(1) // self._group)
        entries = -(-num_pages * setup.page_size // _UNIT) * -(-setup.max_rows // rows_per_block)
        return min(4 * entries + 1024, _MAX_FIRST_CAPACITY) * len(self._windows)

    def prepare(self, plan: Plan, batch: DeviceBatch) -> int:
        """See DeviceAttention.prepare; O(rows + pages read by tiles of queries)."""
        setup = self._setup
        batch.variant = self._choose(plan, batch.rows)
        tile = self._tile(batch.rows, batch.variant)
        part = self._part(len(batch.host_work))
        needed = slots = 0
        for index, window in enumerate(self._windows):
            room = batch.host_work[index * part : (index + 1) * part]
            size = self._build(
                plan.positions, plan.node_pos, plan.node_len, plan.node_row_begin,
                plan.node_row_end, plan.node_page_indptr, plan.page_indices, batch.rows,
                setup.page_size, self._group, tile, self._workers[tile], window,
                setup.deterministic, room,
            )  # fmt: skip
            needed, slots = max(needed, size[0]), max(slots, size[1])
        if slots * tile > self._results:
            self._reserve(slots * tile * 5 // 4)
        if needed > part:
            return (needed + 4) * len(self._windows)
        return part * (len(self._windows) - 1) + needed

    def attend(
        self,
        q: torch.Tensor,
        k_pages: torch.Tensor | DevicePages,
        v_pages: torch.Tensor | DevicePages,
        batch: DeviceBatch,
        out: torch.Tensor,
        *,
        scale: float,
        window: int,
    ) -> None:
        """See AttentionBackend.attend; one launch."""
        tile = self._tile(batch.rows, batch.variant)
        work = batch.work
        if len(self._windows) > 1:
            part = self._part(len(work))
            begin = self._windows.index(window) * part
            work = work[begin : begin + part]
        cut = scale, window, tile, self._workers[tile]
        if not isinstance(k_pages, DevicePages) or not isinstance(v_pages, DevicePages):
            self._setup.ops.tree_attention(
                q, k_pages, v_pages, batch.positions, work, self._partials, out, *cut
            )
            return
        self._setup.ops.tree_attention_packed(
            q, k_pages.data, batch.positions, work, self._partials, out, v_pages.signs, *cut,
            k_pages.layer_at, k_pages.page_size, k_pages.kv_heads, k_pages.codec.native_id,
            v_pages.codec.native_id,
        )  # fmt: skip

    def _part(self, ints: int) -> int:
        """Ints of each window's part of a section; a multiple of 4."""
        return ints // len(self._windows) // 4 * 4


def _work_builder() -> tuple[Callable[..., tuple[int, int, int]], Callable[..., int], str]:
    """What cuts plans, what counts reads, and a note for the report when it is the slow twin."""
    try:
        from dendrite_engine._core import attention_reads, attention_work
    except ImportError as error:
        from dendrite_engine.cache import reference_work

        note = f"; work lists are cut in Python ({error})"
        return reference_work.attention_work, reference_work.attention_reads, note
    return attention_work, attention_reads, ""
