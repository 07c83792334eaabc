"""kv-formats: decode steps at a long context, for pages of each format, with the real model.

Every branch has its own context (nothing is shared), so attention reads as much as it can. All
engines exist at once and take turns, so that a slow spell of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dendrite_engine import Engine, SamplingParams
from dendrite_lab.bench import measure
from dendrite_lab.bench.workload import make_engine, prompt_ids

FORMATS = ("fp32", "bf16", "fp8_e4m3", "k8v4", "tq4", "tq3", "tq2")


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="dendrite-lab bench kv-formats")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(list(argv))
    most = max(args.branches)
    room = most * (args.context + args.repeats * len(args.branches) * args.tokens + 64)
    engines = {
        name: make_engine(args.model, room, kv_format=name, prefix_cache=False, device=args.device)
        for name in args.formats
    }
    ids = prompt_ids(next(iter(engines.values())).tokenizer, args.context + most)
    roots = {
        name: [engine.prompt(ids[i : i + args.context]) for i in range(most)]
        for name, engine in engines.items()
    }
    rows = [_measure(engines, roots, count, args.tokens, args.repeats) for count in args.branches]
    return measure.report(
        "kv-formats", argv, [entry for row in rows for entry in row], context=args.context
    )


def _measure(
    engines: dict[str, Engine], roots: dict[str, list[Any]], count: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """One row a format: milliseconds of a decode step of `count` branches."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            times[name] += _steps(engine, roots[name][:count], tokens)
    plain = statistics.median(times[next(iter(engines))])
    return [
        {
            "branches": count,
            "format": name,
            "step_ms": measure.spread(times[name], 1),
            "times_first": round(plain / statistics.median(times[name]), 2),
            "kib_per_token": round(engine.stats().page_bytes / 16 / 1024, 1),
        }
        for name, engine in engines.items()
    ]


def _steps(engine: Engine, branches: list[Any], tokens: int) -> list[float]:
    """Milliseconds between the tokens of one branch, the first step left out."""
    sampling = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=tokens)
    stamps = [
        time.perf_counter()
        for event in engine.generate(branches, sampling)
        if event.branch is branches[0]
    ]
    return [1e3 * (b - a) for a, b in pairwise(stamps[1:])]
