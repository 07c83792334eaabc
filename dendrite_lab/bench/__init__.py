"""Benchmarks by name; `dendrite-lab bench NAME --json FILE` runs one.

Every run returns one JSON-serialisable report: machine, versions, command, and rows with medians
and spread. `benchmarks/make_report.py` turns the stored reports into BENCHMARKS.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.registry import Registry

BENCHMARKS: Registry[Callable[[Sequence[str]], dict[str, Any]]] = Registry(
    "benchmark",
    {
        "attention": "dendrite_lab.bench.gpu_attention:run",
        "beam": "dendrite_lab.bench.beam:run",
        "decode": "dendrite_lab.bench.gpu_decode:run",
        "deterministic": "dendrite_lab.bench.gpu_deterministic:run",
        "first-token": "dendrite_lab.bench.first_token:run",
        "fork": "dendrite_lab.bench.fork:run",
        "game24": "dendrite_lab.bench.game24_search:run",
        "gemm": "dendrite_lab.bench.gemm:run",
        "kv-attention": "dendrite_lab.bench.gpu_kv_attention:run",
        "kv-formats": "dendrite_lab.bench.kv_formats:run",
        "mask": "dendrite_lab.bench.mask:run",
        "memory": "dendrite_lab.bench.memory:run",
        "search": "dendrite_lab.bench.search:run",
        "search-overhead": "dendrite_lab.bench.search_overhead:run",
        "spec": "dendrite_lab.bench.spec:run",
        "tree": "dendrite_lab.bench.tree:run",
    },
)


def run(name: str, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark called `name` with its own arguments and return its report.

    Raises:
        UnknownName: no such benchmark; the message lists them.
    """
    return BENCHMARKS.get(name)(argv)


def stored(name: str) -> dict[str, Any]:
    """The report of the benchmark called `name` that BENCHMARKS.md is made from.

    Raises:
        InvalidArgument: no report of that name is stored.
    """
    here = Path(__file__).resolve().parent
    for folder in (here.parents[1] / "benchmarks" / "results", here / "results"):
        file = folder / f"{name}.json"
        if file.is_file():
            report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return report
    raise InvalidArgument(f"no stored report of the benchmark {name!r}")
