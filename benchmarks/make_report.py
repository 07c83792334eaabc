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
    "beam": "Beam search: prompt to result",
    "search": "Search: MCTS against greedy and best-of-N",
    "search-overhead": "Search: what it costs besides the model, and against prefilling again",
    "game24": "Search: the Game of 24",
    "spec": "Speculative decoding: guessed tokens against plain decoding",
    "gemm": "Matrix products of a decode step",
    "mask": "Grammar: masks, forks, and what a constrained step costs",
    "kv-formats": "Page formats: decode steps at a long context",
    "quality": "Page formats: what they cost",
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
    "beam": """\
fp32, prefill included, prompts that neither side has seen, `generate(num_beams=width)` on the same
prompts. `same_text`: runs in which both found the same best text. `pages`: the most that were live,
beside what the beams would hold without sharing.""",
    "search": """\
`twister`: a line in which many of the first ten words begin with a letter (score: share of them;
solved: half). `words`: one sentence with four given words. Each method has 600 tokens (greedy needs
fewer); best-of-N and MCTS rank by the same value. The settings were chosen on half of the twister's
letters; the notebook 02_mcts_live shows both halves.""",
    "search-overhead": """\
`outside_percent`: time of a search that was not spent in forward passes (select, fork, sampling,
evaluation, pruning, the hand-over between threads). `tree of thought`: 2 thoughts a node, 4 levels,
all kept, 32 tokens each; `hf_one_by_one` and `hf_by_level`: the same tree by transformers'
`generate`, a call for each thought or for each level, which prefills the whole text again. The
machine did other work as well, so seconds are high and their ratio is rough.""",
    "game24": """\
Puzzles are made by the benchmark's seed. `greedy` and `best of N` (the verifier picks) write
freely; the searches choose among legal moves, depth-first, a verifier looking one step ahead. `the
same, model not asked` takes moves in the order of the rules: on this task a model of this size adds
nothing to the search, whose time goes into ranking moves.""",
    "spec": """\
Every way gives the very tokens of plain decoding; the benchmark fails otherwise. One branch is
greedy, several are drawn at temperature 0.3. `passes`: forward passes of the last repeat,
`proposed` and `accepted`: its guessed tokens, counted over all paths of a tree. A run of one repeat
beside other work on the same cores has exact counts but rough rates: where no guess was accepted,
`times_plain` shows how rough.""",
    "kv-formats": """\
Every branch has a context of its own, so attention reads as much as it can. `times_first`: against
fp32 pages in the same run.""",
    "quality": """\
Against fp32 pages, teacher-forced on the same windows, the latter half of each scored; every scored
token attends through pages of the format. `ppl_percent`: change of perplexity with its 95 %
interval. `kl`: mean KL divergence of the next token in nats. `gate`: the limits for this model in
`dendrite_lab/quality/metrics.py`. `+ safe`: `kv_center=True, kv_first_page="bf16"`. `tq4/fp32`: K
only, `fp32/tq4`: V only. `needle`: codes of five digits found again in 256 and 512 tokens.
`diverges_after`: tokens until greedy text differs from fp32's, median of 8. `attention_error`:
relative L2 error of the attention output, mean over layers, for the same K and V.""",
    "mask": """\
Along JSON documents under their schema: `fill_us` is the mask of one branch, `fill_64_us` one call
that fills 64 of them, `accept_us` reading a token, `fork_us` the deep copy at the first divergence.
The larger vocabulary is made up: the real tokens and pairs of them. `Branch.fork` copies a
reference. Steps: the same branches with and without a grammar in turns, under one that forces
nothing. `grammar_us` is what the engine thread does for it in a step, waiting included
(`waited_us`); `sampling_us` what masks add to sampling (they may leave it less to do); `hidden_us`
the fills, on a thread beside the forward pass. `overhead_percent`: both against the fastest step
without a grammar; step times as such differ by more than that from run to run on a shared
machine.""",
    "gemm": "SmolLM2-135M's matrices, fp32: weights packed once, and plain `torch` calls.",
}


ACCEPTANCE = """\
Probability that a sampled guess of a draft model is kept, computed from both models' distributions,
mean over the positions of a text. The draft models are the model without some of its layers.
`same_draws` keeps plain decoding's tokens, `rejection` only their distribution.
"""


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
    lines.append(table(quality_rows(report) if name == "quality" else report["rows"]))
    if name == "quality":
        lines.insert(1, f"Text: {report['text']}.\n")
    if report.get("acceptance"):
        lines += [ACCEPTANCE, table(report["acceptance"])]
    if report.get("peers"):
        lines += ["Peers, same run:\n", table(report["peers"])]
    return "\n".join(lines)


def quality_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns of a quality report that fit on a page."""
    rows = []
    for row in report["rows"]:
        name = row["format"]
        hits = [r["hit"] for r in report["needle"] if r["format"] == name]
        places = sorted(r["position"] for r in report["divergence"] if r["format"] == name)
        errors = report["attention"].get(name, [])
        spread = f"{row['perplexity_percent']:+.2f} +- {row['perplexity_percent_ci95']:.2f}"
        rows.append(
            {
                "format": name,
                "context": row["context"],
                "smaller": row["ratio"],
                "ppl": round(row["perplexity"], 3),
                "ppl_percent": spread,
                "kl": float(f"{row['kl_mean']:.3g}"),
                "kl_p99": float(f"{row['kl_p99']:.3g}"),
                "top1_percent": round(row["top1_percent"], 2),
                "gate": row["gate"],
                "needle": f"{sum(hits)}/{len(hits)}" if hits else None,
                "diverges_after": places[len(places) // 2] if places else None,
                "attention_error": round(sum(errors) / len(errors), 4) if errors else None,
            }
        )
    reference = [r["hit"] for r in report["needle"] if r["format"] == "fp32"]
    if reference:
        rows.insert(0, {"format": "fp32", "needle": f"{sum(reference)}/{len(reference)}"})
    return rows


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
