"""The K/V tensors of a page pool, and the guards that debug mode puts around them."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from dendrite_engine.cache.formats import PageFormat, PageShape
from dendrite_engine.cache.formats.base import DenseStore
from dendrite_engine.cache.formats.device_packed import DevicePackedStore
from dendrite_engine.cache.formats.packed import PackedStore
from dendrite_engine.errors import IntegrityError, InvalidArgument
from dendrite_engine.kernels.base import Pages
from dendrite_engine.kernels.device_packed import DevicePages

PageSide = Pages | DevicePages  # K or V of one layer


class KVPages:
    """K and V of every page of one engine.

    Attributes:
        shape: sizes of the pool.
        format: how a page stores K and V.
        store: the memory; a page id indexes all layers.
        page_state: asks the core for the state of every page, 0 for free; set by who has a core.
        stream: the CUDA stream in whose order pages are read and written; None on a CPU.
    """

    def __init__(
        self, page_format: PageFormat, shape: PageShape, stream: torch.cuda.Stream | None = None
    ) -> None:
        self.format, self.shape, self.stream = page_format, shape, stream
        self.store = page_format.allocate(shape)
        self.page_state: Callable[[], np.ndarray] | None = None

    @property
    def k(self) -> torch.Tensor:
        """K of unquantised pages, [num_layers, num_pages, ...]."""
        return self._dense().k

    @property
    def v(self) -> torch.Tensor:
        """V of unquantised pages, [num_layers, num_pages, ...]."""
        return self._dense().v

    def _dense(self) -> DenseStore:
        if isinstance(self.store, DenseStore):
            return self.store
        raise InvalidArgument(f"pages of kv_format {self.format.name!r} hold codes, not numbers")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V of all layers."""
        return self.format.bytes_per_page(self.shape)

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.format.pool_bytes(self.shape)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer of unquantised pages, [num_pages, kv_heads, ...]."""
        return self.k[index], self.v[index]

    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`layer` of every layer."""
        return [self.layer(index) for index in range(self.shape.num_layers)]

    def views(self) -> Sequence[tuple[PageSide, PageSide]]:
        """K and V of every layer, as the forward pass of the path takes them."""
        return self.layers() if isinstance(self.store, DenseStore) else self.store.layers

    def begin(self, plan: Any, ops: Any) -> None:
        """What has to be done before a plan's rows are stored: places for first pages, copies."""
        if isinstance(self.store, PackedStore):
            if self.store.first is not None:
                self.store.first.prepare(plan, self.page_state)
            if len(plan.copies):
                ops.copy_packed(self.store.data, plan.copies)
        elif len(plan.copies):
            ops.copy_pages(self.k, self.v, plan.copies)

    def copy_on_device(self, copies: torch.Tensor, count: torch.Tensor, ops: Any) -> None:
        """Queue the first `count` i32 [1] copies i32 [n, 3] of a step of the device path."""
        if isinstance(self.store, DenseStore):
            ops.copy_pages(self.k, self.v, copies, count)
        else:
            ops.copy_packed(self.store.data, copies, count)

    def poison(self, page_ids: list[int]) -> None:
        """Fill pages, so that reading a slot nobody wrote cannot go unnoticed: K with NaN; V too on
        the CPU, with large numbers on a device, whose kernels multiply every value of a page that
        they read, by 0 where a row does not see it. In pages of codes the bytes of NaN are 255,
        which makes each scale, or where there are none each number, NaN.
        """
        if page_ids:
            with self._in_order():
                index = torch.tensor(sorted(set(page_ids)), dtype=torch.int64)
                if isinstance(self.store, DevicePackedStore):
                    self.store.poison(index)
                    return
                if isinstance(self.store, PackedStore):
                    self.store.data.index_fill_(0, index, 255)
                    if (first := self.store.first) is not None:
                        first.data.index_fill_(0, first.rows(index), 255)
                    return
                index = index.to(self.k.device)
                self.k.index_fill_(1, index, float("nan"))
                filling = float("nan") if self.v.is_cpu else torch.finfo(self.v.dtype).max
                self.v.index_fill_(1, index, filling)

    def checksum(self, page_id: int) -> int:
        """CRC-32 over K and V of a page in all layers; waits for the device."""
        crc = 0
        with self._in_order():
            for page in self._page(page_id):
                crc = zlib.crc32(page.cpu().numpy().data, crc)
        return crc

    def _page(self, page_id: int) -> list[torch.Tensor]:
        """The bytes of a page."""
        if isinstance(self.store, PackedStore):
            first = self.store.first
            rows = [] if first is None else list(first.data[first.rows(torch.tensor([page_id]))])
            return [self.store.data[page_id], *rows]
        if isinstance(self.store, DevicePackedStore):
            return [self.store.data[page_id]]
        pools = (self.k, self.v)
        return [pool[:, page_id].contiguous().flatten().view(torch.uint8) for pool in pools]

    def _in_order(self) -> AbstractContextManager[object]:
        """Work inside follows what the engine has asked of the device so far."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class PageGuard:
    """Canaries of debug mode: NaN in every slot nobody wrote, a checksum on every full page.

    Full pages are never written again while they are held, so a changed checksum means that some
    write went to the wrong page.
    """

    def __init__(self, pages: KVPages) -> None:
        self._pages = pages
        self._checksums: dict[int, int] = {}
        pages.poison(list(range(pages.shape.num_pages)))

    def before_step(self, taken: list[int], freed: list[int], unsealed: list[int]) -> None:
        """Poison pages that changed hands since the last step; stop watching those that a rollback
        opened for writing again.
        """
        for page_id in (*taken, *freed, *unsealed):
            self._checksums.pop(page_id, None)
        self._pages.poison([*taken, *freed])

    def after_step(self, sealed: list[int]) -> None:
        """Record the checksum of pages that became full."""
        for page_id in sealed:
            self._checksums[page_id] = self._pages.checksum(page_id)

    def verify(self) -> int:
        """Recompute every checksum; returns how many pages were checked.

        Raises:
            IntegrityError: a full page changed; the message names it.
        """
        for page_id, crc in self._checksums.items():
            now = self._pages.checksum(page_id)
            if now != crc:
                raise IntegrityError(
                    f"page {page_id} changed after it was full: checksum {now:08x}, was {crc:08x}"
                )
        return len(self._checksums)
