"""Writes BENCHMARKS.md from the reports in benchmarks/results/*.json. Run: python
benchmarks/make_report.py

Reports called gpu-*.json make the part about GPUs (gpu_tables.py). With --check it fails when
BENCHMARKS.md is not what the stored reports give.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_tables

ROOT = Path(__file__).resolve().parent.parent
TITLES = {
    "fork": "Fork: bookkeeping at growing context",
    "memory": "Memory: pages of branches on one prefix",
    "tree": "Tree decode: many branches on one prefix",
    "first-token": "First token after a fork",
    "search": "Search: MCTS against greedy and best-of-N",
    "gemm": "Matrix products of a decode step",
}
INTRODUCTION = """\
Made by `python benchmarks/make_report.py` from the reports in `benchmarks/results/`; each section
names the command that measured it. Values are medians (min .. max).
"""
NOTES = {
    "fork": """\
`fork_us` is one `Branch.fork(1)` from Python; `fork_500_ms` is `Branch.fork(500)`;
`core_fork_prune_ns` is the native pair without the Python handle. Peers copy or mark every
token.""",
    "memory": "`pages_if_copied` is what the same branches would hold without sharing.",
    "tree": """\
Decode steps only. Hugging Face gets its prefix cache for free: computed once, repeated for the
batch outside the timing.""",
    "first-token": """\
`at_end_ms`: fork at the end of a prefix whose logits are kept, no forward pass needed. `inside_ms`:
fork 7 tokens before the end; one row is recomputed for all children together. `decode_step_ms`: one
step of the same number of branches.""",
    "search": """\
`twister`: a line in which many of the first ten words begin with a letter (score: share of them;
solved: half). `words`: one sentence with four given words. Each method has 600 tokens (greedy needs
fewer); best-of-N and MCTS rank by the same value. The settings were chosen on half of the twister's
letters; the notebook 02_mcts_live shows both halves.""",
    "gemm": "SmolLM2-135M's matrices, fp32: weights packed once, and plain `torch` calls.",
}


def main(argv: list[str]) -> int:
    """Write BENCHMARKS.md, or with --check compare it."""
    text = render()
    target = ROOT / "BENCHMARKS.md"
    if "--check" in argv:
        return 0 if target.exists() and target.read_text(encoding="utf-8") == text else 1
    target.write_text(text, encoding="utf-8")
    return 0


def render() -> str:
    """BENCHMARKS.md as text."""
    parts = [
        "# Benchmarks\n",
        INTRODUCTION,
    ]
    results = sorted((ROOT / "benchmarks/results").glob("*.json"))
    loaded = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in results}
    reports = [report for name, report in loaded.items() if not name.startswith("gpu-")]
    order = list(TITLES)
    reports.sort(key=lambda r: order.index(r["benchmark"]) if r["benchmark"] in order else 99)
    parts += [section(report) for report in reports]
    on_gpu = [report for name, report in loaded.items() if name.startswith("gpu-")]
    if on_gpu:
        parts.append(gpu_tables.render(on_gpu))
    return "\n".join(parts)


def section(report: dict[str, Any]) -> str:
    """One benchmark as Markdown."""
    name, machine = report["benchmark"], report["machine"]
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    where = f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}"
    where += f", {machine['memory_gib']} GiB"
    lines = [
        f"## {TITLES.get(name, name)}\n",
        f"`{report['command']}` on {report['date']}: {where}; {versions}.\n",
    ]
    if name in NOTES:
        lines.append(NOTES[name] + "\n")
    lines.append(table(report["rows"]))
    if report.get("peers"):
        lines += ["Peers, same run:\n", table(report["peers"])]
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; columns in the order they first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A value as text; a spread as median (min .. max)."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{value['median']:,} ({value['min']:,} .. {value['max']:,})"
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
