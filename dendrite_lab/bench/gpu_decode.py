"""decode: time per token of one branch, and from a prompt to its first token, beside the floor.

Random weights of a real shape, tokens sampled at temperature 1 from the whole vocabulary. Peers run
the same work in the same run. A decode step reads all weights and the branch's K/V once.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine
from dendrite_lab.bench.gpu_engine import parser_of
from dendrite_lab.bench.gpu_jobs import (
    ONE,
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

HF_TOKENS = 25  # its time a token is the same for every one, and long


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = parser_of("decode")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--prompts", type=int, nargs="*", default=[4096])
    args = parser.parse_args(list(argv))
    shape = shape_of(args.shape)
    jobs = [_decode(shape, context, args.tokens, args.repeats) for context in args.contexts]
    jobs += [_prefill(shape, count, args.repeats) for count in args.prompts]
    longest = max([context + args.tokens for context in args.contexts] + [*args.prompts, 0])
    return run_jobs("decode", argv, args, jobs, 3 * (longest + 64))


def _decode(shape: Shape, context: int, tokens: int, repeats: int) -> Job:
    """From the first new token to the last, by the tokens between."""
    ids = random_ids(shape, context, 1)

    def ours(engine: Engine) -> Result:
        root = engine.prompt(ids)
        values = repeat(lambda _: _ms_per_token(engine, root, tokens), repeats)
        notes = host_notes(engine)
        root.prune(subtree=True)
        return Result(values, notes)

    def peer(other: Peer) -> list[float]:
        count = min(tokens, HF_TOKENS) if other.name == "hf" else tokens

        def once(_: int) -> float:
            one = seconds(lambda: other.generate([ids], 1))
            return (seconds(lambda: other.generate([ids], count)) - one) / (count - 1) * 1e3

        return repeat(once, min(repeats, 3))

    middle = context + tokens // 2
    return Job(
        f"decode, 1 branch, context {context}..{context + tokens}", "ms", ours,
        shape.decode_floor_ms(1, middle, middle), peer, ("hf", "vllm", "sglang"),
    )  # fmt: skip


def _ms_per_token(engine: Engine, root: Any, tokens: int) -> float:
    branch = root.fork(1)[0]
    params = TOKENS.replace(max_tokens=tokens)
    stamps = [time.perf_counter() for _ in engine.generate(branch, params)]
    branch.prune()
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1) * 1e3


def _prefill(shape: Shape, count: int, repeats: int) -> Job:
    """A prompt that nobody has seen, to its first token."""
    prompt = functools.partial(random_ids, shape, count)

    def ours(engine: Engine) -> Result:
        def once(number: int) -> float:
            ids = prompt(1000 + number)
            start = time.perf_counter()
            branch = engine.prompt(ids)
            engine.complete(branch, ONE)
            elapsed = (time.perf_counter() - start) * 1e3
            branch.prune()
            return elapsed

        values = repeat(once, repeats)
        return Result(values, {"tokens_per_s": round(count / statistics.median(values) * 1e3)})

    def peer(other: Peer) -> list[float]:
        return repeat(
            lambda n: seconds(lambda: other.generate([prompt(2000 + n)], 1)) * 1e3, repeats
        )

    return Job(
        f"prompt of {count} tokens to the first token", "ms", ours, shape.prefill_floor_ms(count),
        peer, ("hf", "vllm", "sglang"),
    )  # fmt: skip
