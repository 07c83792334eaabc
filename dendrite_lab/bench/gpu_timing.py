"""Times kernels as they run inside a captured CUDA graph: no launch gaps, no host.

One call's inputs may fit in the L2 cache, where a repeated call would find them: callers hand over
several copies of their inputs, and calls rotate over them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MIN_CALLS = 8  # of a graph, so that its launch does not count
MAX_COPIES = 64
MIN_REPEATS = 5
MAX_SECONDS = 0.25  # of timed launches, where so many repeats would take longer
CACHE_TIMES = 3  # all copies together are this many times the L2 cache

Call = Callable[[int], "torch.Tensor"]


def copies_for(working_set: int, cache: int) -> int:
    """Copies of a working set of so many bytes that a cache of so many bytes can't keep."""
    return max(1, min(MAX_COPIES, -(-CACHE_TIMES * cache // max(working_set, 1))))


def cache_bytes(device: torch.device) -> int:
    """Size of the device's L2 cache; 0 on a CPU, where nothing is rotated."""
    import torch

    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def microseconds(call: Call, copies: int, device: torch.device, repeats: int = 20) -> list[float]:
    """Time of one call, measured `repeats` times over a graph of several calls.

    Args:
        call: launches the work on copy i of its inputs; its host side must be done already.
        copies: of the inputs.
        device: where it runs; on a CPU the calls are timed one after the other.
        repeats: graph launches that are timed, at most.
    """
    if device.type != "cuda":
        return [_seconds(call, copies) * 1e6 for _ in range(repeats)]
    import torch

    calls = copies * max(1, -(-MIN_CALLS // copies))
    graph = _capture(call, copies, calls)
    graph.replay()
    torch.cuda.synchronize(device)
    first = _replays(graph, 1)[0]
    repeats = min(repeats, max(MIN_REPEATS, int(MAX_SECONDS * 1e6 / max(first, 1.0))))
    times = [elapsed / calls for elapsed in _replays(graph, repeats)]
    graph.reset()
    return times


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Microseconds of each of `count` launches of a graph, one after the other."""
    import torch

    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    for begin, end in marks:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in marks]


def _capture(call: Call, copies: int, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls over the copies in turn; each call has run once before."""
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for index in range(min(copies, 2)):
            call(index)
        torch.cuda.synchronize()
        # `torch.cuda.graph` would also empty the allocator's cache each time.
        graph.capture_begin()
        try:
            for index in range(calls):
                call(index % copies)
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph


def _seconds(call: Call, copies: int) -> float:
    start = time.perf_counter()
    for index in range(copies):
        call(index)
    return (time.perf_counter() - start) / copies
