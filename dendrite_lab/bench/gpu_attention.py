"""attention: tree attention of one layer, beside FlashInfer on the same pages, and the floor.

Kernel only, in a CUDA graph of several calls; where all K/V fit in the L2 cache, calls rotate over
copies of them. Every result is compared with fp32 attention on sampled rows. `times_peer` is the
better of FlashInfer's flat decode and its cascade over ours; `times_best` also counts its cascade
put together from FA2 kernels, which FlashInfer does not offer as such.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument
from dendrite_lab.bench import gpu_flashinfer, gpu_ours, measure
from dendrite_lab.bench.gpu_attention_case import (
    Case,
    Heads,
    Maker,
    distance,
    make_case,
    relative_error,
)
from dendrite_lab.bench.gpu_timing import microseconds
from dendrite_lab.bench.gpu_trees import FASTTREE, SUITES, parse_tree, plan_tree

if TYPE_CHECKING:
    import torch

HEADS = ("16x1x128", "32x8x128", "32x32x128", "32x4x64")
PEER_KINDS = {
    "flat": ("flat", "flat-tc", "prefill"),
    "cascade": ("cascade", "cascade-2"),
    "cascade_fa2": ("cascade-fa2", "cascade-fa2-2"),
}
OFFERED = ("flat", "cascade")  # what a user of FlashInfer would call
WRONG = 2e-2  # relative error above which a result counts as wrong; bf16 gives 2e-3 .. 5e-3


@dataclass(frozen=True, slots=True)
class Measured:
    """One contestant on one case: times in us, or why there are none."""

    times: list[float]
    host_us: float = 0.0
    error: float = math.nan
    trouble: str = ""

    @property
    def median(self) -> float:
        """Median time, infinite where it does not run or is wrong."""
        right = self.times and self.error <= WRONG
        return float(measure.spread(self.times, 4)["median"]) if right else math.inf


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    import torch

    args = _arguments(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    heads = [Heads.parse(text) for text in args.heads]
    trouble = "left out" if args.no_peers else gpu_flashinfer.available()
    peers = trouble is None
    compile_s = gpu_flashinfer.compile_all(heads, device, dtype) if peers else 0.0
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    start = time.perf_counter()
    _say(_heading())
    for text in _trees(args.trees):
        planned = plan_tree(parse_tree(text), args.page_size)
        for one in heads:
            name = f"{planned.tree.name} | {one.name}"
            if args.budget_s and time.perf_counter() - start > args.budget_s:
                skipped.append(name)
                continue
            row = _row(make_case(planned, one, device, dtype), args, peers)
            rows.append(row)
            _say(_line(row))
    summary = summarise(rows)
    for entry in summary:
        _say("  ".join(f"{key} {value}" for key, value in entry.items()))
    return measure.report(
        "attention", argv, rows, summary=summary, skipped=skipped, dtype=args.dtype,
        flashinfer=trouble or "measured", flashinfer_compile_s=round(compile_s, 1),
    )  # fmt: skip


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dendrite-lab bench attention")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (the twin)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--trees", nargs="+", default=["all"], help=f"trees, or of {', '.join(SUITES)}"
    )
    parser.add_argument("--heads", nargs="+", default=list(HEADS), metavar="QxKVxDIM")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="ours with fixed cuts")
    parser.add_argument(
        "--budget-s", type=float, default=0.0, help="start no case after so many seconds"
    )
    args = parser.parse_args(list(argv))
    if args.repeats < 1:
        raise InvalidArgument(f"--repeats must be at least 1, got {args.repeats}")
    return args


def _trees(names: Sequence[str]) -> list[str]:
    return [tree for name in names for tree in SUITES.get(name, (name,))]


def _row(case: Case, args: argparse.Namespace, peers: bool) -> dict[str, Any]:
    tree = case.planned.tree
    makers: dict[str, Maker] = {
        "ours": lambda case: gpu_ours.ours(case, deterministic=args.deterministic)
    }
    if peers:
        makers |= gpu_flashinfer.contestants(case)
    outputs: dict[str, torch.Tensor] = {}
    found = {
        name: _measure(case, make, args.repeats, outputs, name) for name, make in makers.items()
    }
    row: dict[str, Any] = {
        "tree": tree.name,
        "heads": case.heads.name,
        "queries": len(tree.contexts),
        "tokens": tree.unique_tokens,
        "copies": case.copies,
        "floor_us": round(case.floor_us, 1),
        "ours_us": _spread(found["ours"]),
        "ours_host_us": round(found["ours"].host_us),
    }
    medians = {"ours": found["ours"].median}
    for kind, names in PEER_KINDS.items():
        of_kind = [found[name] for name in names if name in found]
        if of_kind:
            best = min(of_kind, key=lambda one: one.median)
            medians[kind] = best.median
            row[f"{kind}_us"] = _spread(best)
            row[f"{kind}_host_us"] = round(best.host_us)
    row["times_peer"] = _ratio(medians, OFFERED)
    row["times_best"] = _ratio(medians, tuple(PEER_KINDS))
    row["error"] = _digits(found["ours"].error)
    row["troubles"] = {name: one.trouble for name, one in found.items() if one.trouble}
    row["variants"] = {
        name: {"us": round(one.median, 2), "error": _digits(one.error)}
        for name, one in found.items()
        if one.median < math.inf
    }
    other = next((outputs[name] for name in ("flat-tc", "prefill") if name in outputs), None)
    if "ours" in outputs and other is not None:
        row["distance_to_flashinfer"] = _digits(distance(outputs["ours"], other))
    return row


def _measure(case: Case, make: Maker, repeats: int, outputs: dict[str, Any], name: str) -> Measured:
    try:
        contestant = make(case)
        times = microseconds(contestant.call, case.copies, case.device, repeats)
        outputs[name] = contestant.call(0).clone()
        error = relative_error(case, outputs[name])
    except Exception as failure:  # one contestant's trouble must not hide the others' numbers
        return Measured([], trouble=f"{type(failure).__name__}: {str(failure)[:300]}")
    trouble = "" if error <= WRONG else f"wrong: relative error {error:.2g}"
    return Measured(times, contestant.host_us, error, trouble)


def _spread(measured: Measured) -> dict[str, float | int] | None:
    return measure.spread(measured.times, 1) if measured.median < math.inf else None


def _ratio(medians: dict[str, float], kinds: Sequence[str]) -> float | None:
    peers = [medians[kind] for kind in kinds if medians.get(kind, math.inf) < math.inf]
    if not peers or medians["ours"] == math.inf:
        return None
    return round(min(peers) / medians["ours"], 2)


def _digits(value: float) -> float | None:
    return float(f"{value:.2g}") if math.isfinite(value) else None


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and minimum of the speed-ups: FastTree's trees, all trees, prompts."""
    groups: dict[str, Callable[[dict[str, Any]], bool]] = {
        "FastTree trees": lambda row: row["tree"] in FASTTREE,
        "all trees": lambda row: not row["tree"].startswith("prompt"),
        "prompts": lambda row: row["tree"].startswith("prompt"),
    }
    out = []
    for name, belongs in groups.items():
        entry: dict[str, Any] = {"trees": name}
        for key in ("times_peer", "times_best"):
            values = [row[key] for row in rows if belongs(row) and row.get(key)]
            if values:
                mean = math.exp(sum(map(math.log, values)) / len(values))
                entry |= {f"{key}_mean": round(mean, 2), f"{key}_min": min(values)}
                entry["cases"] = len(values)
        if len(entry) > 1:
            out.append(entry)
    return out


def _heading() -> str:
    columns = ("queries", "tokens", "floor", "ours", "flat", "cascade", "fa2", "xpeer", "xbest")
    return f"{'tree, heads':<56}" + "".join(f"{column:>9}" for column in columns) + "    error"


def _line(row: dict[str, Any]) -> str:
    def median(key: str) -> str:
        value = row.get(key)
        return f"{value['median']:.1f}" if value else "-"

    cells = [
        str(row["queries"]), str(row["tokens"]), f"{row['floor_us']:.1f}", median("ours_us"),
        *(median(f"{kind}_us") for kind in PEER_KINDS),
        *(str(row[key] or "-") for key in ("times_peer", "times_best")),
    ]  # fmt: skip
    line = f"{row['tree'] + ', ' + row['heads']:<56}" + "".join(f"{cell:>9}" for cell in cells)
    troubles = "".join(f"\n    {name}: {text}" for name, text in row["troubles"].items())
    return f"{line}  {row['error']}{troubles}"


def _say(line: str) -> None:
    """Progress, on stderr: stdout may be the report."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
