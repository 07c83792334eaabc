"""gemm: the matrix products of a decode step, packed (as the engine runs them) and plain."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dendrite_engine.models.linear import Linear, LinearFactory, PlainLinear
from dendrite_lab.bench import measure

if TYPE_CHECKING:
    import torch

COLD_BYTES = 100_000_000  # weights are read in turn, so that none is in a cache when it is used
SHAPES = {"qkv": (576, 960), "gate_up": (576, 3072), "down": (1536, 576), "lm_head": (576, 49152)}


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark on SmolLM2-135M's matrices; see the module's first line."""
    import torch

    parser = argparse.ArgumentParser(prog="dendrite-lab bench gemm")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args(list(argv))
    factory, out = LinearFactory(), []
    for name, (inputs, outputs) in SHAPES.items():
        copies = max(1, COLD_BYTES // (4 * inputs * outputs))
        weights = [torch.randn(outputs, inputs) for _ in range(copies)]
        kinds: dict[str, list[Linear]] = {
            "packed_us": [factory(weight) for weight in weights],
            "plain_us": [PlainLinear(weight) for weight in weights],
        }
        for rows in args.rows:
            x = torch.randn(rows, inputs)
            row: dict[str, Any] = {"matrix": name, "in": inputs, "out": outputs, "rows": rows}
            for label, linears in kinds.items():
                turn = itertools.cycle(linears)
                seconds = measure.repeat(_next_product(turn, x), args.repeats, warmup=copies)
                row[label] = measure.spread([s * 1e6 for s in seconds], 1)
            out.append(row)
    return measure.report("gemm", argv, out, linear=f"{factory.name}: {factory.reason}")


def _next_product(turn: Iterator[Linear], x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: next(turn)(x)
