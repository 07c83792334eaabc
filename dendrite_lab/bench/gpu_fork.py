"""fork on a GPU: many forks one after the other with a token each, and what a fork takes in memory.

A peer's fork is a new request on a prompt that its cache knows, with one token of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine
from dendrite_lab.bench.gpu_engine import parser_of
from dendrite_lab.bench.gpu_jobs import ONE, Job, Peer, Result, repeat, run_jobs, seconds
from dendrite_lab.bench.shapes import Shape, shape_of
from dendrite_lab.bench.synthetic import random_ids

BACK = 7


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = parser_of("fork")
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--forks", type=int, default=500)
    parser.add_argument("--branches", type=int, default=64, help="whose memory is counted")
    args = parser.parse_args(list(argv))
    shape = shape_of(args.shape)
    jobs = _jobs(shape, args.prefix, args.forks, args.repeats)
    memory: list[dict[str, Any]] = []
    ids = random_ids(shape, args.prefix - 3, 2)
    counting = Job(
        f"fork of {args.branches} branches, pages counted", "ms",
        functools.partial(_count_memory, ids, args.branches, memory),
    )  # fmt: skip
    tokens = args.prefix + args.branches * 64 + 1024
    report = run_jobs("fork", argv, args, [*jobs, counting], tokens)
    report["memory"] = memory
    return report


def _jobs(shape: Shape, prefix: int, forks: int, repeats: int) -> list[Job]:
    ids = random_ids(shape, prefix - 3, 2)
    many = f"{forks} x (fork {{}} + 1 token) on {prefix} tokens, one after the other"
    ours = functools.partial(_sequential, ids, forks, min(repeats, 3))
    floor = forks * shape.decode_floor_ms(1, prefix, prefix) / 1e3
    peer = functools.partial(_peer, ids, shape.vocab, forks)
    return [
        Job(many.format("at the end"), "s", functools.partial(ours, None)),
        Job(many.format("inside"), "s", functools.partial(ours, BACK), floor, peer),
    ]


def _sequential(
    ids: list[int], forks: int, repeats: int, back: int | None, engine: Engine
) -> Result:
    root = engine.prompt(ids)
    at = None if back is None else root.num_tokens - back

    def once(_: int) -> float:
        start = time.perf_counter()
        for _ in range(forks):
            branch = root.fork(1, at=at)[0]
            engine.complete(branch, ONE)
            branch.prune()
        return time.perf_counter() - start

    values = repeat(once, repeats)
    root.prune()
    return Result(values, {"ms_each": round(1e3 * min(values) / forks, 3)})


def _peer(ids: list[int], vocab: int, forks: int, other: Peer) -> list[float]:
    other.generate([ids], 1)

    def once(number: int) -> float:
        def all_of_them() -> None:
            for i in range(forks):
                other.generate([[*ids, (number * forks + i) % (vocab - 2)]], 1)

        return seconds(all_of_them)

    return [once(number) for number in range(1, 3)]


def _count_memory(
    ids: list[int], count: int, memory: list[dict[str, Any]], engine: Engine
) -> Result:
    """Pages and bytes before and after a fork, after the first divergence, and copies made."""
    root = engine.prompt(ids)
    before, device_before = engine.stats(), _device_bytes()
    start = time.perf_counter()
    made = root.fork(count)
    elapsed = (time.perf_counter() - start) * 1e3
    forked, device_forked = engine.stats(), _device_bytes()
    engine.complete(made, ONE)
    engine.complete(made, ONE)  # the first token's K/V is stored when the second is computed
    diverged = engine.stats()
    memory.append({
        "branches": count,
        "context": root.num_tokens,
        "bytes_at_fork": forked.bytes_live - before.bytes_live,
        "device_bytes_at_fork": device_forked - device_before,
        "pages_per_divergence": (diverged.pages_live - forked.pages_live) / count,
        "page_copies_per_divergence": (diverged.cow_copies - forked.cow_copies) / count,
        "page_bytes": before.page_bytes,
        "bytes_if_copied": count * before.bytes_live,
    })  # fmt: skip
    for branch in made:
        branch.prune()
    root.prune()
    return Result([elapsed])


def _device_bytes() -> int:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
