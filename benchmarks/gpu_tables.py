"""The GPU part of BENCHMARKS.md, from the reports in benchmarks/results/gpu-*.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Report = dict[str, Any]
Row = dict[str, Any]

WORK_ORDER = ("decode", "first-token", "fork", "tree", "beam")
PEER_NAMES = {"hf": "Hugging Face", "vllm": "vLLM", "sglang": "SGLang"}
INTRODUCTION = """\
Random weights of real shapes, bf16, page size 16. Values are medians (min .. max). The floor is the
larger of two times at one H100's measured rates: all weights and every live K/V token read once at
3.0 TB/s, and the arithmetic at 790 TFLOP/s; `of floor` says how many times above it we are. Peers
ran in the same process on the same machine as our numbers beside them; an empty cell was not
measured there. Numbers of other machines or days are not in these tables.
"""
WORK_NOTE = """\
Branch rows are wall time from the request to the last token of the last branch, forks and
detokenising included; the prefix was computed before, for the peers as well. "At the end" of a
prefix its next-token logits are kept; "inside" one row is recomputed. A peer's fork is a new
request on a prompt that its prefix cache knows."""
ATTENTION_NOTE = """\
Kernel time of one layer inside a CUDA graph; calls rotate over copies of K and V that outgrow the
L2 cache. A tree is written as nodes of each level; tokens of a node of each level; every leaf is a
query. FlashInfer is given its best variant for each tree: flat decode on CUDA or tensor cores, and
its cascade with all levels or with the two that read least. `fa2` is a cascade that FlashInfer does
not offer as such, put together from its FA2 kernels. Planning on the host (`host`) is not in the
times. Results are checked against fp32 attention; `error` is the relative error of ours."""
KV_NOTE = """\
Attention of one layer alone over pages of each format, timed as above: branches with contexts of
their own (64 of them), which is bound by memory, and branches below a shared prefix, which is not.
Codes are random. `GB` and `TB/s` count K and V of every token once, scales included; a large copy
reaches {copy} TB/s. `times unquantised`: against our kernel on pages of the compute dtype."""
STORE_NOTE = """\
The store: RoPE, quantising and writing one token of each branch. `share of step`: of a layer's
decode step, whose products count at their floor, so that the share is rather too large."""
DETERMINISTIC_NOTE = """\
`deterministic=True` against the default, the two engines taking turns. Below: one branch decoded
greedily again and again beside random neighbours; results are tokens and log-probabilities,
compared to the last bit."""
MEMORY_NOTE = "What a fork takes, and what each branch takes when it first goes its own way."


def render(reports: Sequence[Report]) -> str:
    """The GPU part as Markdown; empty without reports."""
    if not reports:
        return ""
    parts = ["# On a GPU\n", INTRODUCTION, _measured_by(reports)]
    parts += [
        section
        for make in (_work, _attention, _kv_attention, _deterministic, _memory)
        if (section := make(reports))
    ]
    return "\n".join(parts)


def _measured_by(reports: Iterable[Report]) -> str:
    """Machines and commands, each said once."""
    lines: dict[str, list[str]] = {}
    for report in reports:
        machine = report["machine"]
        versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        where = f"{machine.get('gpu', 'no GPU')}, {machine['cpu']}; {versions}"
        lines.setdefault(where, []).append(f"- `{report['command']}` on {report['date']}")
    return "\n".join(f"{where}:\n\n" + "\n".join(run) + "\n" for where, run in lines.items())


def _work(reports: Sequence[Report]) -> str:
    rows = []
    for name in WORK_ORDER:
        of_name = [report for report in reports if report["benchmark"] == name]
        rows += [_work_row(row, report) for report in of_name for row in report["rows"]]
    if not rows:
        return ""
    return "\n".join(["## Decoding, forks and branches\n", WORK_NOTE + "\n", table(rows)])


def _work_row(row: Row, report: Report) -> Row:
    unit, attention = row["unit"], report.get("engine", {}).get("attention", "").partition(":")[0]
    other = f" (attention: {attention})" if attention not in ("", "tree") else ""
    out: Row = {"work": row["work"] + other, "shape": report["shape"]}
    out["ours"] = f"{cell(row['ours'])} {unit}"
    out["floor"] = f"{number(row['floor'])} {unit}" if row.get("floor") else None
    out["of floor"] = row.get("of_floor")
    peers = [(PEER_NAMES[key], row[key]) for key in PEER_NAMES if row.get(key)]
    out["peers"] = "; ".join(f"{name} {cell(value)}" for name, value in peers) or None
    out["times peer"] = row.get("times_peer")
    out["in decode steps"] = row.get("in_decode_steps")
    out["forward ms"] = row.get("forward_ms")
    out["host ms a step"] = row.get("host_ms")
    return out


def _attention(reports: Sequence[Report]) -> str:
    parts: list[str] = []
    for report in reports:
        if report["benchmark"] != "attention" or not report["rows"]:
            continue
        if report.get("summary"):
            parts += ["Speed-up over FlashInfer:\n", table(report["summary"])]
        parts.append(table([_attention_row(row) for row in report["rows"]]))
        left_out = report.get("skipped")
        if left_out:
            parts.append(f"Left out for want of time: {'; '.join(left_out)}.\n")
    return "\n".join(["## Tree attention\n", ATTENTION_NOTE + "\n", *parts]) if parts else ""


def _attention_row(row: Row) -> Row:
    out: Row = {key: row.get(key) for key in ("tree", "heads", "queries", "tokens")}
    out["floor us"], out["ours us"] = row["floor_us"], row["ours_us"]
    for kind in ("flat", "cascade", "cascade_fa2"):
        name = {"cascade_fa2": "fa2"}.get(kind, kind)
        value = row.get(f"{kind}_us")
        out[f"{name} us"] = None if value is None else value["median"]
    out["times peer"], out["times best"] = row["times_peer"], row["times_best"]
    hosts = [row.get(f"{kind}_host_us") for kind in ("ours", "flat", "cascade")]
    out["host us (ours, flat, cascade)"] = ", ".join("-" if v is None else number(v) for v in hosts)
    out["error"] = row["error"]
    return out


def _kv_attention(reports: Sequence[Report]) -> str:
    found = [report for report in reports if report["benchmark"] == "kv-attention"]
    if not found:
        return ""
    note = KV_NOTE.format(copy=number(found[0]["copy_tb_per_s"]))
    parts = ["## Page formats on the GPU\n", note + "\n"]
    parts.append(table([_kv_row(row) for report in found for row in report["rows"]]))
    stores = [_store_row(row) for report in found for row in report["store"]]
    return "\n".join([*parts, *([STORE_NOTE + "\n", table(stores)] if stores else [])])


def _kv_row(row: Row) -> Row:
    out: Row = {key: row[key] for key in ("tree", "heads", "format")}
    out |= {"GB": row["bytes"] / 1e9, "us": row["us"], "TB/s": row.get("tb_per_s")}
    out["times unquantised"] = row.get("times_unquantised")
    return {**out, "error": row.get("error"), "trouble": row.get("trouble")}


def _store_row(row: Row) -> Row:
    share = row.get("share_of_step")
    return {
        "heads": row["heads"], "branches": row["branches"], "format": row["format"],
        "us": row["store_us"], "times unquantised": row["times_unquantised"],
        "share of step": None if share is None else f"{100 * share:.1f} %",
    }  # fmt: skip


def _deterministic(reports: Sequence[Report]) -> str:
    found = [report for report in reports if report["benchmark"] == "deterministic"]
    if not found:
        return ""
    steps = [{"shape": report["shape"], **row} for report in found for row in report["rows"]]
    again = [{"shape": report["shape"], **row} for report in found for row in report["again"]]
    return "\n".join(
        ["## Deterministic mode\n", DETERMINISTIC_NOTE + "\n", table(steps), table(again)]
    )


def _memory(reports: Sequence[Report]) -> str:
    rows = [
        {"shape": report["shape"], **row}
        for report in reports
        if report["benchmark"] == "fork"
        for row in report.get("memory", [])
    ]
    return "\n".join(["## Memory of a fork\n", MEMORY_NOTE + "\n", table(rows)]) if rows else ""


def table(rows: Sequence[Row], show: Callable[[Any], str] | None = None) -> str:
    """Rows as a Markdown table; columns in the order they first appear, without empty ones."""
    show = show or cell
    names = dict.fromkeys(key for row in rows for key in row)
    columns = [name for name in names if any(row.get(name) is not None for row in rows)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(show(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    """A value as text; a spread as median (min .. max)."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        low, high = number(value["min"]), number(value["max"])
        return f"{number(value['median'])} ({low} .. {high})"
    return number(value) if isinstance(value, (int, float)) else str(value)


def number(value: float) -> str:
    """Four digits are enough of a measured value; whole numbers stay whole."""
    if isinstance(value, int) or value == int(value) or abs(value) >= 1000:
        return f"{round(value):,}"
    return f"{value:.4g}"
