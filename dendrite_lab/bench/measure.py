"""What all benchmarks share: timing, spread, and a description of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "numpy", "transformers", "llama-cpp-python", "flashinfer-python", "vllm", "sglang",
    "dendrite-lab",
)  # fmt: skip


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float | int]:
    """Median, minimum, maximum and count of repeated measurements."""
    data = sorted(values)
    return {
        "median": round(statistics.median(data), digits),
        "min": round(data[0], digits),
        "max": round(data[-1], digits),
        "n": len(data),
    }


def timed(action: Callable[[], object]) -> float:
    """Seconds that one call of `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def repeat(action: Callable[[], object], times: int, warmup: int = 1) -> list[float]:
    """Seconds of `times` calls after `warmup` untimed ones."""
    for _ in range(warmup):
        action()
    return [timed(action) for _ in range(times)]


def report(
    name: str, argv: Sequence[str], rows: list[dict[str, Any]], **extra: Any
) -> dict[str, Any]:
    """A benchmark's result: who measured what, where, with which versions."""
    return {
        "benchmark": name,
        "command": shlex.join(["dendrite-lab", "bench", name, *map(_without_folder, argv)]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        **extra,
    }


def _without_folder(argument: str) -> str:
    """Where a file lies says nothing to others; its name does."""
    return Path(argument).name if "/" in argument else argument


def machine() -> dict[str, Any]:
    """CPU, cores in use and memory; the GPU where there is one."""
    import torch

    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "isa": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, where installed."""
    found = {"python": platform.python_version()}
    installed = {d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name}
    found.update({name: installed[name] for name in PACKAGES if name in installed})
    return found


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
