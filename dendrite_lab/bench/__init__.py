"""Benchmarks by name; `dendrite-lab bench NAME --json FILE` runs one.

Every run returns one JSON-serialisable report: machine, versions, command, and rows with medians
and spread. `benchmarks/make_report.py` turns the stored reports into BENCHMARKS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dendrite_engine.registry import Registry

BENCHMARKS: Registry[Callable[[Sequence[str]], dict[str, Any]]] = Registry(
    "benchmark",
    {
        "first-token": "dendrite_lab.bench.first_token:run",
        "fork": "dendrite_lab.bench.fork:run",
        "gemm": "dendrite_lab.bench.gemm:run",
        "memory": "dendrite_lab.bench.memory:run",
        "search": "dendrite_lab.bench.search:run",
        "tree": "dendrite_lab.bench.tree:run",
    },
)


def run(name: str, argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark called `name` with its own arguments and return its report.

    Raises:
        UnknownName: no such benchmark; the message lists them.
    """
    return BENCHMARKS.get(name)(argv)
