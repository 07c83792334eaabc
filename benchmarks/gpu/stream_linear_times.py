"""Times stream_linear on a GPU for every plan, beside cuBLAS and skinny_linear.

    python benchmarks/gpu/stream_linear_times.py --library build/cuda/libdendrite_cuda.so

Calls are in one CUDA graph with programmatic edges and go through enough copies of the weight to
keep it out of the L2 cache; see skinny_linear_check.py. `auto` is the plan that the op takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from skinny_linear_check import (
    BANDWIDTH,
    MODELS,
    Shape,
    Weights,
    cublas,
    load,
    microseconds,
    ours,
    rows_of,
    say,
)

ROWS = (1, 8, 16, 32, 64, 128)
SPLITS = (1, 2, 3, 4, 5, 6)
SKINNY_ROWS = 16
LIMIT = 64  # copies of a weight


def stream(
    x: torch.Tensor, views: list[torch.Tensor], groups: int = 0, splits: int = 0
) -> list[Callable[[], object]]:
    """Calls of stream_linear, one per weight."""
    op = torch.ops.dendrite.stream_linear.default
    out = torch.empty(x.shape[0], views[0].shape[0], dtype=x.dtype, device="cuda")
    return [lambda w=w: op(x, w, None, out, groups, splits) for w in views]


def stream_gated(
    x: torch.Tensor, views: list[torch.Tensor], groups: int = 0, splits: int = 0
) -> list[Callable[[], object]]:
    """Calls of stream_linear_silu_mul, one per weight."""
    op = torch.ops.dendrite.stream_linear_silu_mul.default
    out = torch.empty(x.shape[0], views[0].shape[0] // 2, dtype=x.dtype, device="cuda")
    return [lambda w=w: op(x, w, out, groups, splits) for w in views]


def cublas_gated(x: torch.Tensor, views: list[torch.Tensor]) -> list[Callable[[], object]]:
    """The same by cuBLAS and silu_mul."""
    silu = torch.ops.dendrite.silu_mul.default
    out = torch.empty(x.shape[0], views[0].shape[0] // 2, dtype=x.dtype, device="cuda")
    product = torch.nn.functional.linear
    return [lambda w=w: silu(product(x, w), out) for w in views]


def plans(x: torch.Tensor, views: list[torch.Tensor], shape: Shape) -> dict[str, float]:
    """Microseconds of every plan that is worth a try."""
    times = {"auto": microseconds(stream(x, views))}
    for groups in (1, 2):
        tiles = -(-shape.outputs // (64 * groups))
        for splits in SPLITS:
            if splits > 1 and (tiles * splits > 320 or shape.inputs // 64 // splits < 3):
                continue
            times[f"{groups}x{splits}"] = microseconds(stream(x, views, groups, splits))
    return times


def lines(weights: Weights, models: list[str], rows: tuple[int, ...]) -> Iterator[str]:
    """A line for each product and number of rows."""
    yield "outputs x inputs   rows  floor  cuBLAS  skinny    auto | best plans (us)"
    for model in models:
        for shape in (Shape(*shape) for shape in MODELS[model]):
            for m in rows:
                x = rows_of(m, shape.inputs, weights.flat.dtype)
                views = weights.views(shape, LIMIT)
                theirs = microseconds(cublas(x, views))
                skinny = microseconds(ours(x, views)) if m <= SKINNY_ROWS else float("nan")
                times = plans(x, views, shape)
                best = sorted(times.items(), key=lambda item: item[1])[:4]
                yield (
                    f"{shape.outputs:7} x {shape.inputs:<6} {m:5}"
                    f" {shape.bytes / BANDWIDTH * 1e6:6.2f} {theirs:7.2f} {skinny:7.2f}"
                    f" {times['auto']:7.2f} | "
                    + "  ".join(f"{name} {time:.2f}" for name, time in best)
                )


def gated_lines(weights: Weights, models: list[str], rows: tuple[int, ...]) -> Iterator[str]:
    """A line for each gated product: one kernel against cuBLAS and silu_mul."""
    yield "gated: outputs x inputs  rows  cuBLAS+silu    auto | plans (us)"
    for model in models:
        shape = Shape(*MODELS[model][2])
        for m in rows:
            x, views = rows_of(m, shape.inputs, weights.flat.dtype), weights.views(shape, LIMIT)
            theirs = microseconds(cublas_gated(x, views))
            auto = microseconds(stream_gated(x, views))
            times = {
                f"{groups}x{splits}": microseconds(stream_gated(x, views, groups, splits))
                for groups in (1, 2)
                for splits in (1, 2)
            }
            yield (
                f"{shape.outputs:7} x {shape.inputs:<6} {m:5} {theirs:12.2f} {auto:7.2f} | "
                + "  ".join(f"{name} {time:.2f}" for name, time in times.items())
            )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    options = parser.parse_args()
    torch.manual_seed(0)
    load(options.library)
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    weights = Weights(torch.bfloat16)
    for table in (lines, gated_lines):
        for line in table(weights, options.models, tuple(options.rows)):
            say(line)


if __name__ == "__main__":
    main()
