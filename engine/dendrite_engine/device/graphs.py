"""Forward passes of padded sizes, captured as chains of CUDA graphs when they are first needed."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterable

import torch

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256)
_STEP_ABOVE = 32  # between larger buckets, where a cap above 256 asks for them
_GROWTH = 3  # of the parts of a chain

Graphs = tuple[torch.cuda.CUDAGraph, ...]
GraphKey = tuple[int, int, int]  # rows, rows of logits, variant of the attention


class Buckets:
    """The numbers of rows to which small batches are padded."""

    def __init__(self, max_rows: int) -> None:
        above = range(BUCKETS[-1] + _STEP_ABOVE, max_rows + 1, _STEP_ABOVE)
        self._sizes = [size for size in (*BUCKETS, *above) if size <= max_rows]

    @property
    def largest(self) -> int:
        """Rows of the largest bucket, 0 when there is none."""
        return self._sizes[-1] if self._sizes else 0

    def of(self, rows: int) -> int:
        """The smallest bucket that holds `rows` rows; `rows` itself above the largest."""
        index = bisect_left(self._sizes, rows)
        return self._sizes[index] if index < len(self._sizes) else rows


def chain_of(layers: int) -> tuple[range, ...]:
    """The layers of a pass cut into parts, each of which becomes a graph: 1, 3, 9, ..., the rest.

    The host needs more than a microsecond for each kernel of a graph that it launches, and the
    device begins when the whole graph has been launched. So the first part is small, and the others
    grow: a part is launched while the device is busy with the one before it. There are no more of
    them than that takes, since each costs the device a gap.
    """
    parts: list[range] = []
    begin, size = 0, 1
    while layers - begin >= 2 * size:  # else the rest is a shorter part than the one before it
        parts.append(range(begin, begin + size))
        begin, size = begin + size, size * _GROWTH
    return (*parts, range(begin, layers))


class GraphCache:
    """Captured forward passes by (rows, logits rows), sharing one memory pool.

    A pass is a chain of graphs that are replayed in order, on one stream. A pass that can't be
    captured turns graphs off for good: passes run eagerly from then on, and `reason` says why.

    Attributes:
        is_on: whether passes are captured.
        reason: the state in words, for `Engine.report()`.
    """

    def __init__(self, *, is_on: bool, reason: str) -> None:
        self.is_on, self.reason = is_on, reason
        self._graphs: dict[GraphKey, Graphs] = {}
        self._pool = torch.cuda.graph_pool_handle() if is_on else None

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: GraphKey) -> Graphs | None:
        """The graphs of a size in the order in which they run, if it was captured."""
        return self._graphs.get(key)

    def clear(self) -> None:
        """Drop all graphs: the buffers they know have moved. The device must be idle."""
        self._graphs.clear()

    def capture(self, key: GraphKey, launches: Iterable[Callable[[], None]]) -> None:
        """Capture what each of `launches` launches as a graph; nothing runs. All must have run
        once before, eagerly.

        The current stream must not be the default one.
        """
        if not self.is_on:
            return
        try:
            self._graphs[key] = tuple(self._captured(launch) for launch in launches)
        except Exception as error:  # whatever refuses to be captured
            torch.cuda.current_stream().synchronize()  # a graph may be dropped when it is idle
            self._graphs.clear()
            self.is_on = False
            text = str(error).strip().splitlines() or [type(error).__name__]
            self.reason = f"off: capturing {key[0]} rows failed ({text[0]}); passes run eagerly"

    def _captured(self, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Only this thread is watched: others may use CUDA as they like.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            launch()
        except Exception:
            with contextlib.suppress(RuntimeError):  # the first error is the one to report
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
