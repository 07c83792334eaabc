"""beam: beam search on the live tree, beside `generate(num_beams=...)` of transformers.

Our beams are branches: a beam forks where it splits and is pruned where it falls out, no K/V is
copied. Times are per generated token of the best beam, that is per step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine
from dendrite_engine.search import BeamSearch, Budget
from dendrite_lab.bench.gpu_engine import case_of, parser_of
from dendrite_lab.bench.gpu_jobs import Job, Result, host_notes, repeat, run_jobs, seconds
from dendrite_lab.bench.shapes import Shape, shape_of
from dendrite_lab.bench.synthetic import random_ids

CASES = ("4x256", "16x256", "128x300")


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = parser_of("beam")
    parser.add_argument("--cases", nargs="+", default=list(CASES), metavar="WIDTHxPROMPT")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args(list(argv))
    shape = shape_of(args.shape)
    cases = [case_of(text, "WIDTHxPROMPT") for text in args.cases]
    jobs = [_job(shape, width, prompt, args.tokens, args.repeats) for width, prompt in cases]
    need = max(2 * prompt + 3 * width * (args.tokens + 32) for width, prompt in cases)
    return run_jobs("beam", argv, args, jobs, need)


def _job(shape: Shape, width: int, prompt: int, tokens: int, repeats: int) -> Job:
    ids = random_ids(shape, prompt, 6)
    middle = prompt + tokens // 2
    unique = prompt + width * tokens // 2  # at most: beams share what they have in common
    return Job(
        f"beam search, {width} beams, prompt {prompt} + {tokens} tokens", "ms",
        functools.partial(_ours, ids, width, tokens, min(repeats, 3)),
        shape.decode_floor_ms(width, unique, middle),
        functools.partial(_peer, ids, width, tokens), ("hf",),
    )  # fmt: skip


def _ours(ids: list[int], width: int, tokens: int, repeats: int, engine: Engine) -> Result:
    root = engine.prompt(ids)
    steps: list[int] = []

    def once(_: int) -> float:
        algorithm = BeamSearch(width=width, max_tokens=tokens)
        elapsed = seconds(lambda: steps.append(_search(engine, root, algorithm)))
        return elapsed / max(steps[-1], 1) * 1e3

    values = repeat(once, repeats)
    notes = {"tokens_per_s": round(width / min(values) * 1e3), "steps": steps[-1]}
    root.prune(subtree=True)
    return Result(values, notes | host_notes(engine))


def _search(engine: Engine, root: Any, algorithm: BeamSearch) -> int:
    """Run a search to its end; returns the tokens of the best text."""
    result = engine.search(root, algorithm, Budget(tokens=10**9)).wait()
    result.prune()
    return len(result.token_ids)


def _peer(ids: list[int], width: int, tokens: int, other: Any) -> list[float]:
    return repeat(lambda _: seconds(lambda: other.beam(ids, width, tokens)) / tokens * 1e3, 2)
