"""Times the row kernels and copy_pages on a GPU, beside the time that their bytes take.

    python benchmarks/gpu/row_kernels.py --library build/cuda/libdendrite_cuda.so

Times are medians of replays of one CUDA graph with many calls, with programmatic edges between them
as in a decode step. Inputs of small batches stay in the L2 cache, as they do in a step; the floor
is the bytes at BANDWIDTH, so it means something for the large batches only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from dendrite_engine.kernels.device_ops import DeviceKernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "engine"))
BANDWIDTH = 3.0e12  # bytes a second, about what a copy on an H100 moves
CALLS = 50
DTYPE = torch.bfloat16


class Model(NamedTuple):
    """Sizes of a model."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    layers: int


MODELS = {
    "1.1B": Model(2048, 5632, 32, 4, 64, 22),
    "8B": Model(4096, 14336, 32, 8, 128, 32),
    "Qwen3-0.6B": Model(1024, 3072, 16, 8, 128, 28),
}


def microseconds(call: Callable[[], None]) -> float:
    """Median time of one call, out of a graph of CALLS of them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(9):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[1:])


def randn(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=dtype)


def ints(values: object) -> torch.Tensor:
    """An int32 tensor on the GPU."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def row_calls(ops: DeviceKernels, m: Model, rows: int) -> dict[str, tuple[Callable[[], None], int]]:
    """Each operation on `rows` rows, and the bytes that it moves."""
    residual, x = torch.zeros(rows, m.hidden, device="cuda"), randn(rows, m.hidden) * 1e-3
    weight, table = randn(m.hidden), randn(32000, m.hidden)
    gate_up, gated = randn(rows, 2 * m.intermediate), randn(rows, m.intermediate)
    qkv = randn(rows, (m.heads + 2 * m.kv_heads) * m.dim)
    pages = [randn(rows // 16 + 1, m.kv_heads, 16, m.dim) for _ in range(2)]
    tables = [randn(rows, m.dim // 2, dtype=torch.float32) for _ in range(2)]
    q_out, index = randn(rows, m.heads, m.dim), ints(list(range(rows)))
    norm = randn(m.dim)

    def rope(q_norm: torch.Tensor | None) -> Callable[[], None]:
        return lambda: ops.rope_store_kv(
            qkv, index, *tables, index, *pages, q_out, q_norm, q_norm, 1e-6
        )

    cells = rows * m.hidden
    return {
        "embed": (lambda: ops.embed(index, table, residual), 6 * cells),
        "norm": (lambda: ops.add_rms_norm(None, residual, weight, 1e-5, x), 6 * cells),
        "add+norm": (lambda: ops.add_rms_norm(x, residual, weight, 1e-5, x), 12 * cells),
        "rope+store": (rope(None), 4 * qkv.numel()),
        "norm+rope": (rope(norm), 4 * qkv.numel()),
        "silu_mul": (lambda: ops.silu_mul(gate_up, gated), 6 * gated.numel()),
    }


def copy_calls(ops: DeviceKernels, m: Model, count: int) -> tuple[Callable[[], None], int]:
    """Copy-on-write of `count` pages with 15 used slots; the list has room for 256."""
    pages = [randn(m.layers, 512, m.kv_heads, 16, m.dim) for _ in range(2)]
    copies, number = ints([(i, 256 + i, 15) for i in range(256)]), ints([count])
    moved = 2 * 2 * count * m.layers * m.kv_heads * 15 * m.dim * 2
    return lambda: ops.copy_pages(*pages, copies, number), moved


def report(name: str, call: Callable[[], None], moved: int) -> None:
    """Time a call and print it beside its floor."""
    took, floor = microseconds(call), moved / BANDWIDTH * 1e6
    sys.stdout.write(f"{name:32s} {took:9.2f} us   floor {floor:9.2f} us   x{took / floor:.2f}\n")
    sys.stdout.flush()


def main() -> None:
    """Time everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="libdendrite_cuda.so; default: the newest")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256, 8192])
    arguments = parser.parse_args()
    from dendrite_engine.kernels import device_ops

    ops = device_ops.device_kernels(arguments.library)
    if ops.name != "cuda":
        raise SystemExit(ops.reason)
    sys.stdout.write(f"{torch.cuda.get_device_name()}; {ops.reason}\n")
    for label, model in MODELS.items():
        for rows in arguments.rows:
            for name, (call, moved) in row_calls(ops, model, rows).items():
                report(f"{label} {rows} rows {name}", call, moved)
        for count in (0, 1, 64, 256):
            call, moved = copy_calls(ops, model, count)
            report(f"{label} copy_pages {count}", call, max(moved, 1))


if __name__ == "__main__":
    main()
