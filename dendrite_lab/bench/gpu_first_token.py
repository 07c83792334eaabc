"""first-token on a GPU: from fork() to the first new token of every child.

At the end of a prefix its next-token logits are kept, so no forward pass is needed; inside it one
row is recomputed for all children together. Beside it one decode step of as many branches: a fork
should cost no more. A peer's fork is a new request on a prompt that its cache knows, with one
token of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine
from dendrite_lab.bench.gpu_engine import parser_of
from dendrite_lab.bench.gpu_jobs import ONE, TOKENS, Job, Peer, Result, repeat, run_jobs, seconds
from dendrite_lab.bench.shapes import Shape, shape_of
from dendrite_lab.bench.synthetic import random_ids

STEPS = 32  # of which a decode step's time is the mean
BACK = 7  # tokens before the end, where a fork is inside the prefix


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = parser_of("first-token")
    parser.add_argument("--prefixes", type=int, nargs="+", default=[4096])
    parser.add_argument("--forks", type=int, nargs="+", default=[1, 6, 64])
    args = parser.parse_args(list(argv))
    shape, repeats = shape_of(args.shape), 2 * args.repeats
    jobs: list[Job] = []
    for prefix in args.prefixes:
        for count in args.forks:
            jobs += _of(shape, prefix, count, repeats)
    pages = max(args.prefixes) + max(args.forks) * (STEPS + 48)
    report = run_jobs("first-token", argv, args, jobs, 2 * pages)
    _compare_with_a_step(report["rows"])
    return report


def _of(shape: Shape, prefix: int, count: int, repeats: int) -> list[Job]:
    ids = random_ids(shape, prefix - 3, 2)  # the last page is partly filled, as it mostly is
    floor = shape.decode_floor_ms(count, prefix + count, prefix)
    where = f"{count} on {prefix} tokens"
    fork = functools.partial(_ours, ids, count, repeats)
    return [
        Job(f"decode step, {where}", "ms", functools.partial(_step, ids, count, repeats), floor),
        Job(f"fork at the end + first token, {where}", "ms", functools.partial(fork, None)),
        Job(
            f"fork inside + first token, {where}", "ms", functools.partial(fork, BACK),
            floor, functools.partial(_peer, ids, shape.vocab, count, min(repeats, 5)),
        ),
    ]  # fmt: skip


def _ours(ids: list[int], count: int, repeats: int, back: int | None, engine: Engine) -> Result:
    root = engine.prompt(ids)

    def once(_: int) -> float:
        start = time.perf_counter()
        made = root.fork(count, at=None if back is None else root.num_tokens - back)
        engine.complete(made, ONE)
        elapsed = (time.perf_counter() - start) * 1e3
        for branch in made:
            branch.prune()
        return elapsed

    values = repeat(once, repeats)
    root.prune()
    return Result(values)


def _step(ids: list[int], count: int, repeats: int, engine: Engine) -> Result:
    """One of many steps of one job: what every further token costs."""
    root = engine.prompt(ids)

    def once(_: int) -> float:
        made = root.fork(count)
        engine.complete(made, ONE)
        elapsed = seconds(lambda: engine.complete(made, TOKENS.replace(max_tokens=STEPS)))
        for branch in made:
            branch.prune()
        return elapsed / STEPS * 1e3

    values = repeat(once, repeats)
    root.prune()
    return Result(values)


def _peer(ids: list[int], vocab: int, count: int, repeats: int, other: Peer) -> list[float]:
    other.generate([ids], 1)

    def once(number: int) -> float:
        last = [(number * count + i) % (vocab - 2) for i in range(count)]
        return seconds(lambda: other.generate([[*ids, token] for token in last], 1)) * 1e3

    return repeat(once, repeats)


def _compare_with_a_step(rows: list[dict[str, Any]]) -> None:
    """Add to each fork what it took in decode steps of as many branches."""
    steps = {
        row["work"].partition(", ")[2]: row["ours"]["median"]
        for row in rows
        if row["work"].startswith("decode step")
    }
    for row in rows:
        kind, _, where = row["work"].partition(", ")
        if kind.startswith("fork") and steps.get(where):
            row["in_decode_steps"] = round(row["ours"]["median"] / steps[where], 2)
