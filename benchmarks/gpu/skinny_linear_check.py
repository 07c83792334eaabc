"""Checks and times skinny_linear on a GPU, beside cuBLAS.

    python benchmarks/gpu/skinny_linear_check.py --library build/cuda/libdendrite_cuda.so

Every product is compared with fp64, and its rows bitwise with those of a product of 16 rows. Times
are medians of replays of one CUDA graph with many calls, which go through enough copies of the
weight to keep it out of the L2 cache. `pdl` has programmatic edges between the calls, as in a
decode step; in `full` each call waits for the end of the one before it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = (
    "skinny_linear(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
    "skinny_linear_silu_mul(Tensor x, Tensor weight, Tensor(a!) out) -> ()",
    "silu_mul(Tensor gate_up, Tensor(a!) out) -> ()",
)
MODELS = {
    "1.1B": [(2560, 2048), (2048, 2048), (11264, 2048), (2048, 5632), (32000, 2048)],
    "8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)],
    "Qwen3-0.6B": [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)],
    "SmolLM2": [(960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576)],
}
ROWS = (1, 8, 16)
BANDWIDTH = 3.0e12  # bytes a second, about what a copy on an H100 moves
CACHE = 320 << 20  # bytes of weights that calls go through: several times the L2


_OWN: list[torch.library.Library] = []  # schemas live as long as their library object


class Shape(NamedTuple):
    """A weight: [outputs, inputs]."""

    outputs: int
    inputs: int

    @property
    def bytes(self) -> int:
        """Of the weight in 16 bits."""
        return self.outputs * self.inputs * 2


class Weights:
    """Random numbers that are cut into weights of any shape, scaled for sums of about one."""

    def __init__(self, dtype: torch.dtype) -> None:
        most = max(Shape(*shape).bytes for shapes in MODELS.values() for shape in shapes)
        self.flat = torch.empty(max(most, CACHE) // 2, dtype=dtype, device="cuda")
        self.flat.normal_(std=0.03)

    def views(self, shape: Shape, limit: int = 1 << 20) -> list[torch.Tensor]:
        """As many weights as CACHE holds, at least one."""
        size = shape.outputs * shape.inputs
        count = max(1, min(CACHE // 2 // size, limit))
        return list(self.flat[: count * size].view(count, *shape))


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def load(library: Path) -> None:
    """Make torch.ops.dendrite of the library, with the engine's schemas where they can be had."""
    sys.path.insert(0, str(ROOT / "engine"))
    try:
        from dendrite_engine.kernels import device_ops
    except ImportError as error:
        say(f"own schemas: {error}")
        for schema in SCHEMAS:
            _OWN.append(torch.library.Library("dendrite", "FRAGMENT"))
            _OWN[-1].define(schema)
        torch.ops.load_library(str(library))
        return
    result = device_ops.load_cuda(library.resolve())
    if not result.loaded:
        raise SystemExit(result.reason)
    say(f"{library}: {result.reason}")


def rows_of(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Random x."""
    return torch.randn(rows, inputs, device="cuda").to(dtype)


def check(shape: Shape, weights: Weights) -> tuple[float, bool]:
    """Largest relative error against fp64, and whether rows have the bits they have among 16."""
    weight = weights.views(shape, 1)[0]
    x = rows_of(16, shape.inputs, weight.dtype)
    expected = x.double() @ weight.double().T
    whole = torch.full((16, shape.outputs), float("nan"), device="cuda")
    torch.ops.dendrite.skinny_linear(x, weight, None, whole)
    worst, same = 0.0, True
    for rows in (1, 7, 8, 9, 16):
        out = torch.full((rows, shape.outputs), float("nan"), device="cuda")
        torch.ops.dendrite.skinny_linear(x[16 - rows :], weight, None, out)
        error = (out - expected[16 - rows :]).norm() / expected[16 - rows :].norm()
        worst = max(worst, float(error)) if error == error else float("nan")
        same = same and torch.equal(out, whole[16 - rows :])
    return worst, same


def captured(calls: list[Callable[[], object]], *, full: bool) -> torch.cuda.CUDAGraph:
    """A graph of the calls; `full` puts them on two streams in turn, which gives plain edges."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=streams[0]):
        for i, call in enumerate(calls):
            here, other = streams[i % 2], streams[1 - i % 2]
            if not full:
                call()
                continue
            if i > 0:
                here.wait_stream(other)
            with torch.cuda.stream(here):
                call()
        if full and len(calls) % 2 == 0:
            streams[0].wait_stream(streams[1])
    return graph


def microseconds(calls: list[Callable[[], object]], *, full: bool = False) -> float:
    """Median time of a call in a graph of them."""
    while len(calls) < 8:
        calls = calls * 2
    calls[0]()
    torch.cuda.synchronize()
    graph = captured(calls, full=full)
    times = []
    for replay in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay > 1:
            times.append(begin.elapsed_time(end))
    del graph
    return sorted(times)[len(times) // 2] * 1e3 / len(calls)


def ours(x: torch.Tensor, views: list[torch.Tensor]) -> list[Callable[[], object]]:
    """Calls of skinny_linear, one per weight."""
    op = torch.ops.dendrite.skinny_linear.default
    out = torch.empty(x.shape[0], views[0].shape[0], dtype=x.dtype, device="cuda")
    return [lambda w=w: op(x, w, None, out) for w in views]


def cublas(x: torch.Tensor, views: list[torch.Tensor]) -> list[Callable[[], object]]:
    """The same with cuBLAS."""
    return [lambda w=w: functional.linear(x, w) for w in views]


def gated(x: torch.Tensor, views: list[torch.Tensor]) -> list[Callable[[], object]]:
    """Calls of the gated product."""
    op = torch.ops.dendrite.skinny_linear_silu_mul.default
    out = torch.empty(x.shape[0], views[0].shape[0] // 2, dtype=x.dtype, device="cuda")
    return [lambda w=w: op(x, w, out) for w in views]


def gated_in_two(x: torch.Tensor, views: list[torch.Tensor]) -> list[Callable[[], object]]:
    """The same by a product and silu_mul."""
    product, silu = torch.ops.dendrite.skinny_linear.default, torch.ops.dendrite.silu_mul.default
    between = torch.empty(x.shape[0], views[0].shape[0], dtype=x.dtype, device="cuda")
    out = torch.empty(x.shape[0], views[0].shape[0] // 2, dtype=x.dtype, device="cuda")

    def call(w: torch.Tensor) -> None:
        product(x, w, None, between)
        silu(between, out)

    return [lambda w=w: call(w) for w in views]


def products(weights: Weights, models: list[str], rows: tuple[int, ...]) -> Iterator[str]:
    """Lines of the table of single products."""
    yield "outputs x inputs   rows   pdl us  full us  of 3 TB/s  cuBLAS us  cuBLAS/pdl"
    for shape in (Shape(*shape) for model in models for shape in MODELS[model]):
        for m in rows:
            x, views = rows_of(m, shape.inputs, weights.flat.dtype), weights.views(shape, 256)
            pdl = microseconds(ours(x, views))
            full = microseconds(ours(x, views), full=True)
            theirs = microseconds(cublas(x, views))
            part = shape.bytes / BANDWIDTH * 1e6 / pdl
            yield (
                f"{shape.outputs:7} x {shape.inputs:<6} {m:6} {pdl:8.2f} {full:8.2f} {part:9.0%}"
                f" {theirs:11.2f} {theirs / pdl:10.2f}"
            )


def gates(weights: Weights, models: list[str], rows: tuple[int, ...]) -> Iterator[str]:
    """Lines of the table of gated products: one kernel against two."""
    yield "gate_up (half x inputs) rows   gated us  product + silu_mul us"
    for shape in (Shape(*MODELS[model][2]) for model in models):
        for m in rows:
            x, views = rows_of(m, shape.inputs, weights.flat.dtype), weights.views(shape, 128)
            one, two = gated(x, views), gated_in_two(x, views)
            yield (
                f"{shape.outputs // 2:7} x {shape.inputs:<6} {m:11} {microseconds(one):10.2f}"
                f" {microseconds(two):12.2f}"
            )


def layers(weights: Weights, models: list[str], rows: tuple[int, ...]) -> Iterator[str]:
    """Lines of the table of whole layers: the four products of a layer behind one another."""
    yield "4 products of a layer  rows   floor us   pdl us  full us  cuBLAS us"
    for model in models:
        shapes = [Shape(*shape) for shape in MODELS[model][:4]]
        floor = sum(shape.bytes for shape in shapes) / BANDWIDTH * 1e6
        depth = max(1, min(64, CACHE // sum(shape.bytes for shape in shapes)))
        for m in rows:
            parts: dict[str, list[list[Callable[[], object]]]] = {"ours": [], "cublas": []}
            offset = 0
            for shape in shapes:
                size = shape.outputs * shape.inputs
                views = list(weights.flat[offset : offset + depth * size].view(depth, *shape))
                offset += depth * size
                x = rows_of(m, shape.inputs, weights.flat.dtype)
                parts["ours"].append(ours(x, views))
                parts["cublas"].append(cublas(x, views))
            chain = {
                name: [call for layer in zip(*calls, strict=True) for call in layer]
                for name, calls in parts.items()
            }
            times = [
                4 * microseconds(chain["ours"]),
                4 * microseconds(chain["ours"], full=True),
                4 * microseconds(chain["cublas"]),
            ]
            yield f"{model:22} {m:5} {floor:10.2f} " + " ".join(f"{t:8.2f}" for t in times)


def main() -> None:
    """Check everything, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rows", nargs="*", type=int, default=ROWS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    options = parser.parse_args()
    torch.manual_seed(0)
    load(options.library)
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    weights = Weights(getattr(torch, options.dtype))
    failed = False
    for model in options.models:
        for shape in (Shape(*shape) for shape in MODELS[model]):
            error, same = check(shape, weights)
            bad = not (error < 3e-5 and same)
            failed |= bad
            if bad:
                name = f"{shape.outputs} x {shape.inputs}"
                say(f"WRONG {name}: error {error:.1e}, same bits {same}")
    say("all products are right, rows bitwise the same" if not failed else "FAILED")
    for table in (products, gates, layers):
        for line in table(weights, options.models, tuple(options.rows)):
            say(line)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
