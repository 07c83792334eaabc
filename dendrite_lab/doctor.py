"""What `dendrite-lab doctor` reports: versions, kernels in use, memory, model cache, hints."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from dendrite_lab import __version__

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf",
    "llguidance", "jupyterlab", "jupyter-server", "ipykernel", "ipywidgets", "jupyterlab-widgets",
    "anywidget", "plotly",
)  # fmt: skip
CPU_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COMM_NOTE = (
    "ipykernel {version} routes a widget's messages to the thread that last published to it; "
    "dendrite-lab overrides that so that clicks are answered while a cell runs"
)
OLD_KERNEL_NOTE = (
    "ipykernel {version} has no subshells: clicks are answered between cells, not while one runs; "
    "version 7 or later answers them at once"
)


def examine() -> dict[str, Any]:
    """Return what was found, as plain JSON values.

    Keys: `dendrite-lab`, `python`, `platform`, `packages`, `cpu`, `memory`, `kernels`, `cuda`,
    `cache`, `browser`, `notes` (worth knowing) and `problems` (something needed is missing).
    """
    notes: list[str] = []
    problems: list[str] = []
    packages = {name: _version(name) for name in PACKAGES}
    problems += [f"{name} is not installed" for name, found in packages.items() if found is None]
    findings = {
        "dendrite-lab": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": packages,
        "cpu": _cpu(),
        "memory": _memory(),
        "kernels": _kernels(notes, problems),
        "cuda": _cuda(),
        "cache": _cache(notes),
        "browser": _browser(notes),
    }
    notes += _kernel_notes(packages["ipykernel"])
    return {**findings, "notes": notes, "problems": problems}


def format_text(findings: dict[str, Any]) -> str:
    """Return findings as aligned lines for a terminal."""
    lines: list[str] = []
    for section, value in findings.items():
        if section in ("notes", "problems"):
            continue
        if isinstance(value, dict):
            lines.append(section)
            lines += [f"  {name:<20} {_show(entry)}" for name, entry in value.items()]
        else:
            lines.append(f"{section:<22} {_show(value)}")
    lines += [f"note: {note}" for note in findings["notes"]]
    lines += [f"PROBLEM: {problem}" for problem in findings["problems"]]
    if not findings["problems"]:
        lines.append("no problems found")
    return "\n".join(lines)


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = _proc_cpuinfo()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model or platform.processor() or "unknown",
        "features": [name for name in CPU_FEATURES if name in flags],
        "cores usable": usable,
        "threads of torch": _torch_threads(),
    }


def _proc_cpuinfo() -> tuple[str, set[str]]:
    """Model name and feature flags as Linux lists them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    model, flags = "", set[str]()
    if not path.is_file():
        return model, flags
    for line in path.read_text("utf-8", "replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags.update(value.split())
    return model, flags


def _torch_threads() -> int | None:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    return torch.get_num_threads()


def _memory() -> dict[str, Any]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):  # not POSIX
        return {"total": None, "available": None}
    available = None
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        available = max(os.sysconf("SC_AVPHYS_PAGES") * page, _mem_available())
    return {"total": _gib(total), "available": None if available is None else _gib(available)}


def _mem_available() -> int:
    """Linux counts reclaimable page cache here, which the plain number of free pages leaves out."""
    path = Path("/proc/meminfo")
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _kernels(notes: list[str], problems: list[str]) -> dict[str, str]:
    """Which page core and which kernels an engine would get here, and why."""
    if importlib.util.find_spec("torch") is None:
        return {}
    from dendrite_engine import kernels
    from dendrite_engine.cache import core_implementation, make_core

    found = {}
    try:
        name, reason = core_implementation(make_core(1))
        found["page core"] = f"{name}: {reason}"
        ops = kernels.load("auto")
        found["cpu kernels"] = f"{ops.name}: {ops.reason}"
        found["gpu kernels"] = _gpu_kernels()
    except ImportError as error:
        problems.append(f"the engine can't be loaded: {error}")
        return found
    if "reference" in (name, ops.name):
        notes.append("a native module is missing, so slow Python stands in; run `make setup`")
    return found


def _gpu_kernels() -> str:
    """Whether the library of GPU kernels loads, and why not."""
    from dendrite_engine.kernels.device_ops import load_cuda

    result = load_cuda()
    return f"{'loaded' if result.loaded else 'not loaded'}: {result.reason}"


def _cuda() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"available": False}
    import torch

    available = torch.cuda.is_available()
    devices = range(torch.cuda.device_count()) if available else ()
    return {
        "built into torch": torch.version.cuda,
        "available": available,
        "devices": [torch.cuda.get_device_name(index) for index in devices],
    }


def _cache(notes: list[str]) -> dict[str, Any]:
    from dendrite_engine.models.builtin import BUILTIN_MODELS, builtin_directory, is_complete
    from dendrite_engine.models.hub import cache_directory

    cache = cache_directory()
    found: dict[str, Any] = {"folder": str(cache)}
    for model in BUILTIN_MODELS.values():
        present = is_complete(builtin_directory(model, cache))
        found[model.name] = "present" if present else "not fetched yet"
        if not present:
            notes.append(f"`dendrite-lab fetch {model.name}` fetches the model (93 MB, once)")
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    found["free disk"] = _gib(shutil.disk_usage(existing).free)
    return found


def _browser(notes: list[str]) -> dict[str, Any]:
    from dendrite_lab.launch import has_browser

    tested = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    opens = has_browser()
    if not opens:
        notes.append(
            "no graphical browser here: `dendrite-lab lab` prints a URL; from another machine "
            "reach it with `ssh -L 8888:localhost:8888 HOST`"
        )
    if tested is None:
        notes.append("no Chromium or Chrome on PATH: the browser test of `make test` can't run")
    return {"can be opened": opens, "for the browser test": tested}


def _kernel_notes(version: str | None) -> list[str]:
    if version is None:
        return []
    note = COMM_NOTE if int(version.split(".")[0]) >= 7 else OLD_KERNEL_NOTE
    return [note.format(version=version)]
