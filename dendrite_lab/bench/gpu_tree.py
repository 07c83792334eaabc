"""tree on a GPU: tokens per second of many branches on one prefix, forks included.

Wall time from the request to the last token of the last branch: `root.fork(n)` and
`engine.complete(...)`, detokenised. The prefix is computed before, as it is in the peers' caches.
The floor reads the weights and every live K/V token once a step.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine
from dendrite_lab.bench.gpu_engine import case_of, parser_of
from dendrite_lab.bench.gpu_jobs import (
    TOKENS,
    Job,
    Peer,
    Result,
    host_notes,
    repeat,
    run_jobs,
    seconds,
)
from dendrite_lab.bench.shapes import Shape, shape_of
from dendrite_lab.bench.synthetic import random_ids

CASES = ("64x4096", "64x32768", "256x4096", "6x4096")


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = parser_of("tree")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="BRANCHESxPREFIX")
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args(list(argv))
    shape = shape_of(args.shape)
    cases = [case_of(text, "BRANCHESxPREFIX") for text in args.cases]
    jobs = [_job(shape, count, prefix, args.tokens, args.repeats) for count, prefix in cases]
    need = max(prefix + count * (args.tokens + 32) for count, prefix in cases)
    return run_jobs("tree", argv, args, jobs, need + max(prefix for _, prefix in cases))


def _job(shape: Shape, count: int, prefix: int, tokens: int, repeats: int) -> Job:
    ids = random_ids(shape, prefix, 3)
    floor = count * tokens / shape.branches_floor_ms(count, prefix, tokens) * 1e3
    return Job(
        f"{count} branches x {tokens} tokens on a shared prefix of {prefix}", "tokens/s",
        functools.partial(_ours, ids, count, tokens, repeats), floor,
        functools.partial(_peer, ids, shape.vocab, count, tokens),
    )  # fmt: skip


def _ours(ids: list[int], count: int, tokens: int, repeats: int, engine: Engine) -> Result:
    root = engine.prompt(ids)
    params = TOKENS.replace(max_tokens=tokens)

    def once(_: int) -> float:
        made: list[Any] = []

        def request() -> None:
            made.extend(root.fork(count))
            engine.complete(made, params)

        elapsed = seconds(request)
        for branch in made:
            branch.prune()
        return count * tokens / elapsed

    values = repeat(once, repeats)
    notes = {"ms_per_step": round(count / statistics.median(values) * 1e3, 3)} | host_notes(engine)
    root.prune()
    return Result(values, notes)


def _peer(ids: list[int], vocab: int, count: int, tokens: int, other: Peer) -> list[float]:
    other.generate([ids], 1)

    def once(number: int) -> float:
        prompts = [[*ids, (number * count + i) % (vocab - 2)] for i in range(count)]
        return count * tokens / seconds(lambda: other.generate(prompts, tokens))

    return repeat(once, 3)
