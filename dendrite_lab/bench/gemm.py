"""gemm: the matrix products of a decode step, packed (as the engine runs them) and plain."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from dendrite_engine.models.linear import LinearFactory, PlainLinear
from dendrite_lab.bench import measure

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
        weight = torch.randn(outputs, inputs)
        packed, plain = factory(weight), PlainLinear(weight)
        for rows in args.rows:
            x = torch.randn(rows, inputs)
            row: dict[str, Any] = {"matrix": name, "in": inputs, "out": outputs, "rows": rows}
            for label, linear in (("packed_us", packed), ("plain_us", plain)):
                seconds = measure.repeat(functools.partial(linear, x), args.repeats, warmup=3)
                row[label] = measure.spread([s * 1e6 for s in seconds], 1)
            out.append(row)
    return measure.report("gemm", argv, out, linear=f"{factory.name}: {factory.reason}")
