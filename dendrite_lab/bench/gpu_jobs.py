"""Pieces of work that our engine and the peers do in one run, and the table that comes of them."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dendrite_engine import Engine, SamplingParams
from dendrite_lab.bench import gpu_peers, measure
from dendrite_lab.bench.gpu_engine import model_directory, open_engine, release
from dendrite_lab.bench.gpu_peers import Peer
from dendrite_lab.bench.shapes import shape_of

HIGHER_IS_BETTER = ("tokens/s",)
TOKENS = SamplingParams(temperature=1.0, ignore_eos=True)
_PATH = re.compile(r"(?:/[\w.+-]+)+/([\w.+-]+)")
ONE = TOKENS.replace(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Result:
    """What our engine measured: repeated values, and single facts about them."""

    values: list[float]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """One row of a table.

    Attributes:
        work: what is done.
        unit: "ms", "s" or "tokens/s".
        ours: does it on our engine.
        floor: the best value that the device allows, in the unit.
        peer: does it on a peer, or None.
        peers: names of the peers that can.
    """

    work: str
    unit: str
    ours: Callable[[Engine], Result]
    floor: float | None = None
    peer: Callable[[Any], list[float]] | None = None
    peers: tuple[str, ...] = ("vllm", "sglang")


def run_jobs(
    name: str,
    argv: Sequence[str],
    args: argparse.Namespace,
    jobs: Sequence[Job],
    tokens: int,
    **options: Any,
) -> dict[str, Any]:
    """Do all jobs on our engine, whose pool holds `tokens`, then on each peer; return the report.

    A peer that can't start or fails is named with the reason under `troubles`.
    """
    results, engine_report = _run_ours(args, jobs, tokens, options)
    release()
    peers, troubles = _run_peers(args, jobs)
    rows = [_row(job, results[job.work], peers) for job in jobs]
    return measure.report(
        name, argv, rows, shape=args.shape, engine=engine_report, troubles=troubles
    )


def _run_ours(
    args: argparse.Namespace, jobs: Sequence[Job], tokens: int, options: Mapping[str, Any]
) -> tuple[dict[str, Result], dict[str, str]]:
    """Results by work, and what ran. Nothing of the engine is left when this returns."""
    results: dict[str, Result] = {}
    with open_engine(args, tokens, **options) as engine:
        for job in jobs:
            results[job.work] = job.ours(engine)
            say(_line(job, "ours", results[job.work].values, results[job.work].notes))
        return results, without_folders(engine.report())


def _run_peers(
    args: argparse.Namespace, jobs: Sequence[Job]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    """Values by peer and work, and what went wrong by peer (and work)."""
    wanted = gpu_peers.installed() if args.peers is None else args.peers
    found: dict[str, dict[str, list[float]]] = {}
    troubles: dict[str, str] = {}
    shape = shape_of(args.shape)
    for name in wanted:
        todo = [job for job in jobs if job.peer is not None and name in job.peers]
        if not todo:
            continue
        found[name] = {}
        try:
            with model_directory(shape) as path:
                peer = gpu_peers.open_peer(name, path, shape.max_context)
        except Exception as error:  # someone else's engine: report and go on
            troubles[name] = _short(error)
            continue
        for job in todo:
            values, trouble = _on_peer(job, peer)
            found[name][job.work] = values
            if trouble:
                troubles[f"{name}, {job.work}"] = trouble
        peer.close()
        release()
    return found, troubles


def _on_peer(job: Job, peer: Peer) -> tuple[list[float], str]:
    try:
        values = job.peer(peer) if job.peer is not None else []
    except Exception as error:  # someone else's engine: report and go on
        return [], _short(error)
    say(_line(job, peer.name, values, {}))
    return values, ""


def _line(job: Job, who: str, values: Sequence[float], notes: Mapping[str, Any]) -> str:
    found = measure.spread(values)
    floor = "" if job.floor is None else f", floor {job.floor:.3f}"
    more = "".join(f", {name} {value}" for name, value in notes.items())
    return (
        f"{job.work:<66} {who:<6} {found['median']} {job.unit} "
        f"({found['min']} .. {found['max']}){floor}{more}"
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _row(
    job: Job, result: Result, peers: Mapping[str, Mapping[str, Sequence[float]]]
) -> dict[str, Any]:
    ours = measure.spread(result.values)
    row: dict[str, Any] = {"work": job.work, "unit": job.unit, "ours": ours}
    if job.floor is not None:
        row["floor"] = round(job.floor, 3)
        row["of_floor"] = _times(ours["median"], job.floor, job.unit)
    best: float | None = None
    for name, values in peers.items():
        if values.get(job.work):
            row[name] = measure.spread(values[job.work])
            median = float(row[name]["median"])
            better = best is None or (median > best) == (job.unit in HIGHER_IS_BETTER)
            best = median if better else best
    if best is not None:
        row["times_peer"] = _times(best, float(ours["median"]), job.unit)
    return row | result.notes


def _times(slow: float, fast: float, unit: str) -> float | None:
    """How many times faster `fast` is than `slow`."""
    a, b = (fast, slow) if unit in HIGHER_IS_BETTER else (slow, fast)
    return round(a / b, 2) if b else None


def without_folders(report: Mapping[str, str]) -> dict[str, str]:
    """A report for others: of a path only the file's name."""
    return {key: _PATH.sub(r"\1", text) for key, text in report.items()}


def repeat(action: Callable[[int], float], times: int) -> list[float]:
    """Values of `times` calls after an untimed one; each call is told its number."""
    return [action(number) for number in range(times + 1)][1:]


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def host_notes(engine: Engine) -> dict[str, Any]:
    """Median time of the last forward passes on the device, and host time of the last step."""
    stats = engine.stats()
    values = {"forward_ms": stats.step_ms_p50, "host_ms": stats.host_ms_last}
    return {name: round(value, 3) for name, value in values.items() if value}


def say(line: str) -> None:
    """Progress, on stderr: stdout may be the report."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


__all__ = [
    "ONE", "TOKENS", "Job", "Peer", "Result", "host_notes", "repeat", "run_jobs", "say", "seconds",
    "without_folders",
]  # fmt: skip
