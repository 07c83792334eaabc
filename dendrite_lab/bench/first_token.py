"""first-token: from fork() to the first new token of every child, beside one decode step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine, SamplingParams
from dendrite_lab.bench import gpu_first_token, measure
from dendrite_lab.bench.gpu_engine import wants_device
from dendrite_lab.bench.workload import make_engine, prompt_ids

ONE = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=1)


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first line. `--shape` runs its GPU form."""
    if wants_device(argv):
        return gpu_first_token.run(argv)
    parser = argparse.ArgumentParser(prog="dendrite-lab bench first-token")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--forks", type=int, nargs="+", default=[1, 6, 64])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args(list(argv))
    engine = make_engine(args.model, 2 * max(args.prefixes) + max(args.forks) * 64)
    rows: list[dict[str, Any]] = []
    for prefix in args.prefixes:
        root = engine.prompt(prompt_ids(engine.tokenizer, prefix - 3))
        rows += [
            {"prefix": prefix, "forks": count, **_case(engine, root, count, args.repeats)}
            for count in args.forks
        ]
        root.prune()
    engine.close()
    return measure.report("first-token", argv, rows)


def _case(engine: Engine, root: Any, count: int, repeats: int) -> dict[str, Any]:
    """From the end of the prefix (logits kept) and from inside it (one row recomputed)."""
    at_end, inside, step = [], [], []
    for _ in range(repeats + 1):
        at_end.append(_milliseconds(engine, root, count, None))
        inside.append(_milliseconds(engine, root, count, root.num_tokens - 7))
        step.append(_step_milliseconds(engine, root, count))
    return {
        "at_end_ms": measure.spread(at_end[1:], 2),
        "inside_ms": measure.spread(inside[1:], 2),
        "decode_step_ms": measure.spread(step[1:], 2),
    }


def _milliseconds(engine: Engine, root: Any, count: int, at: int | None) -> float:
    start = time.perf_counter()
    made = root.fork(count, at=at)
    engine.complete(made, ONE)
    elapsed = (time.perf_counter() - start) * 1e3
    for branch in made:
        branch.prune()
    return elapsed


def _step_milliseconds(engine: Engine, root: Any, count: int) -> float:
    made = root.fork(count)
    engine.complete(made, ONE)
    elapsed = measure.timed(lambda: engine.complete(made, ONE)) * 1e3
    for branch in made:
        branch.prune()
    return elapsed
