"""Times tree attention of several builds of the library beside each other, without FlashInfer.

    python benchmarks/gpu/attention_times.py --libraries build/variants/a.so build/variants/b.so@1

Each library is loaded by a process of its own. `a.so@1` takes variant 1 of the backend whatever
the tree. Times are medians of replays of a CUDA graph, in us (see gpu_timing); the relative
error against fp32 attention on some rows is shown where it is larger than that of bf16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "engine")]

HEADS = ("16x1x128", "32x8x128", "32x32x128", "32x4x64")
MORE_TREES = ("1,64; 4096,128", "1,64; 32768,128", "1; 4096")
GOOD = 6e-3  # relative error; bf16 gives 2e-3 .. 5e-3


class Build(NamedTuple):
    """One column."""

    text: str
    library: Path
    variant: int | None  # None: as the engine chooses

    @classmethod
    def parse(cls, text: str) -> Build:
        """From "library.so[@variant]"."""
        library, _, variant = text.partition("@")
        return cls(text, Path(library), int(variant) if variant else None)

    @property
    def name(self) -> str:
        """What its column is called."""
        return self.library.stem + ("" if self.variant is None else f"@{self.variant}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--libraries", nargs="+", required=True)
    parser.add_argument("--trees", nargs="+", default=["fasttree", *MORE_TREES])
    parser.add_argument("--heads", nargs="+", default=list(HEADS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--times", action="store_true", help="ranges too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(build: Build, args: argparse.Namespace) -> None:
    """Measure all cases with one build; one line of JSON for each, on stdout."""
    import torch

    from dendrite_engine.kernels import device_ops
    from dendrite_lab.bench import gpu_ours
    from dendrite_lab.bench.gpu_attention_case import Heads, make_case, relative_error
    from dendrite_lab.bench.gpu_timing import microseconds
    from dendrite_lab.bench.gpu_trees import SUITES, parse_tree, plan_tree

    _install(build, device_ops, gpu_ours)
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    for text in [tree for name in args.trees for tree in SUITES.get(name, (name,))]:
        planned = plan_tree(parse_tree(text))
        for heads in map(Heads.parse, args.heads):
            found: dict[str, Any] = {"case": f"{planned.tree.name} | {heads.name}"}
            try:
                case = make_case(planned, heads, device, dtype)
                found["floor"] = case.floor_us
                ours = gpu_ours.ours(case, deterministic=args.deterministic)
                found["times"] = microseconds(ours.call, case.copies, device, args.repeats)
                found["error"] = relative_error(case, ours.call(0))
            except Exception as failure:  # the other cases still count
                found["trouble"] = f"{type(failure).__name__}: {str(failure)[:200]}"
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


def _install(build: Build, device_ops: Any, gpu_ours: Any) -> None:
    """Make the engine's backend use this build."""
    from dendrite_engine.attention import device_tree

    loaded = device_ops.load_cuda(build.library.resolve())
    if not loaded.loaded:
        raise SystemExit(f"{build.library}: {loaded.reason}")
    gpu_ours.device_kernels = lambda: device_ops.DeviceKernels("cuda", loaded.reason)
    if build.variant is not None:
        device_tree.DeviceTreeAttention._choose = lambda *_: build.variant


def _child(text: str) -> dict[str, dict[str, Any]]:
    """Results of one build by case, measured in a process of its own."""
    start = time.perf_counter()
    options = [option for option in sys.argv[1:] if option != "--child"]
    first = options.index("--libraries")
    last = next(
        (i for i in range(first + 1, len(options)) if options[i].startswith("--")), len(options)
    )
    command = [*options[:first], *options[last:], "--libraries", text, "--child"]
    done = subprocess.run(  # noqa: S603
        [sys.executable, __file__, *command], stdout=subprocess.PIPE, text=True, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    took = time.perf_counter() - start
    sys.stderr.write(f"{text}: {len(rows)} cases in {took:.0f} s, exit {done.returncode}\n")
    return {row["case"]: row for row in rows}


def _median(row: dict[str, Any] | None) -> float | None:
    return sorted(row["times"])[len(row["times"]) // 2] if row and "times" in row else None


def _cell(row: dict[str, Any] | None, ranges: bool) -> str:
    median = _median(row)
    if row is None or median is None:
        return "-"
    spread = f" ({min(row['times']):.1f}-{max(row['times']):.1f})" if ranges else ""
    error = "" if row["error"] <= GOOD else f" WRONG {row['error']:.1g}"
    return f"{median:.1f}{spread}{error}"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    """Print the table, and what of it is wrong or did not run."""
    args = _arguments()
    builds = [Build.parse(text) for text in args.libraries]
    if args.child:
        measure(builds[0], args)
        return
    results = [_child(build.text) for build in builds]
    width = max(12, *(len(build.name) + 2 for build in builds)) + (14 if args.times else 0)
    cases = list(dict.fromkeys(case for result in results for case in result))
    _say(f"{'case':<62}{'floor':>8}" + "".join(f"{build.name:>{width}}" for build in builds))
    for case in cases:
        rows = [result.get(case) for result in results]
        floor = next((row["floor"] for row in rows if row and "floor" in row), 0.0)
        cells = "".join(f"{_cell(row, args.times):>{width}}" for row in rows)
        _say(f"{case:<62}{floor:>8.1f}{cells}")
    _say(
        f"{'geometric mean of the times over those of the first':<70}"
        + "".join(f"{_ratio(results[0], result, cases):>{width}}" for result in results)
    )
    for build, result in zip(builds, results, strict=True):
        for case, row in result.items():
            if "trouble" in row:
                _say(f"{build.name}: {case}: {row['trouble']}")


def _ratio(first: dict[str, Any], other: dict[str, Any], cases: list[str]) -> str:
    product, count = 1.0, 0
    for case in cases:
        a, b = _median(first.get(case)), _median(other.get(case))
        if a and b:
            product, count = product * b / a, count + 1
    return f"{product ** (1 / count):.3f}" if count else "-"


if __name__ == "__main__":
    main()
