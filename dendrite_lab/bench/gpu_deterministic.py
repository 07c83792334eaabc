"""deterministic: what `deterministic=True` costs a decode step and a prompt, and whether it holds.

Two engines with the same weights, the mode off and on, take turns. Then one branch is decoded again
and again, greedily, beside random neighbours: other branches of the same tree and of another one,
forked at random places, in random number, sampling at random temperatures. With the mode on, its
tokens and log-probabilities must come out the same to the last bit; with it off, the number of
different results is reported as the control.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from dendrite_engine import Engine, SamplingParams
from dendrite_lab.bench import measure
from dendrite_lab.bench.gpu_engine import open_engine, parser_of
from dendrite_lab.bench.gpu_jobs import TOKENS, say, seconds, without_folders
from dendrite_lab.bench.shapes import Shape, shape_of
from dendrite_lab.bench.synthetic import random_ids

MODES = {"off": False, "on": True}


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = parser_of("deterministic")
    parser.add_argument("--branches", type=int, nargs="+", default=[64])
    parser.add_argument("--prefix", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=128, help="steps that are timed")
    parser.add_argument(
        "--again", type=int, default=1000, help="repeats of one branch; a fifth with the mode off"
    )
    parser.add_argument("--again-tokens", type=int, default=8)
    parser.add_argument("--neighbours", type=int, default=63, help="at most")
    args = parser.parse_args(list(argv))
    shape = shape_of(args.shape)
    need = 2 * args.prefix + max(*args.branches, args.neighbours + 1) * (args.tokens + 48)
    with ExitStack() as stack:
        engines = {
            name: stack.enter_context(open_engine(args, need, deterministic=mode))
            for name, mode in MODES.items()
        }
        reports = {name: without_folders(engine.report()) for name, engine in engines.items()}
        rows = [_steps(shape, engines, args, count) for count in args.branches]
        rows.append(_prompts(shape, engines, args))
        again = [
            _again(shape, name, engine, args, args.again if MODES[name] else -(-args.again // 5))
            for name, engine in engines.items()
        ]
    return measure.report(
        "deterministic", argv, rows, again=again, shape=args.shape, engine=reports["on"]
    )


def _steps(
    shape: Shape, engines: dict[str, Engine], args: argparse.Namespace, count: int
) -> dict[str, Any]:
    """Time of a decode step, the engines taking turns, so that a slow spell hits both."""
    ids = random_ids(shape, args.prefix, 3)
    roots = {name: engine.prompt(ids) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    params = TOKENS.replace(max_tokens=args.tokens)
    for number in range(args.repeats + 1):
        for name, engine in engines.items():
            made = roots[name].fork(count)
            elapsed = seconds(functools.partial(engine.complete, made, params))
            if number:
                times[name].append(elapsed / args.tokens * 1e3)
            for branch in made:
                branch.prune()
    for root in roots.values():
        root.prune()
    context = args.prefix + args.tokens // 2
    floor = shape.decode_floor_ms(count, args.prefix + count * args.tokens // 2, context)
    return _row(f"decode step, {count} branches on {args.prefix} tokens", times, floor)


def _prompts(shape: Shape, engines: dict[str, Engine], args: argparse.Namespace) -> dict[str, Any]:
    """Time from a prompt that nobody has seen to its first token."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(args.repeats + 1):
        ids = random_ids(shape, args.prefix, 1000 + number)
        for name, engine in engines.items():
            elapsed = seconds(functools.partial(_first_token, engine, ids))
            if number:
                times[name].append(elapsed * 1e3)
    floor = shape.prefill_floor_ms(args.prefix)
    return _row(f"prompt of {args.prefix} tokens to the first token", times, floor)


def _first_token(engine: Engine, ids: list[int]) -> None:
    branch = engine.prompt(ids)
    engine.complete(branch, TOKENS.replace(max_tokens=1))
    branch.prune()


def _row(work: str, times: dict[str, list[float]], floor: float) -> dict[str, Any]:
    off, on = (measure.spread(times[name]) for name in MODES)
    row = {
        "work": work,
        "unit": "ms",
        "off": off,
        "on": on,
        "slower_percent": round(100 * (on["median"] / off["median"] - 1), 1),
        "floor": round(floor, 3),
    }
    say(f"{work}: off {off['median']} ms, on {on['median']} ms")
    return row


def _again(
    shape: Shape, name: str, engine: Engine, args: argparse.Namespace, repeats: int
) -> dict[str, Any]:
    """Different results of one branch over many repeats beside random neighbours."""
    rng = np.random.default_rng(5)
    root = engine.prompt(random_ids(shape, args.prefix // 4 - 3, 4))
    other = engine.prompt(random_ids(shape, args.prefix // 3, 5))
    greedy = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=args.again_tokens)
    seen: dict[tuple[Any, ...], int] = {}
    at = root.num_tokens - 5  # inside: the first token's logits are computed anew each time
    for _ in range(repeats):
        subject = root.fork(1, at=at)[0]
        neighbours = _neighbours(rng, (root, other), int(rng.integers(0, args.neighbours + 1)))
        params = [
            TOKENS.replace(
                max_tokens=int(rng.integers(1, args.again_tokens + 1)),
                temperature=float(rng.uniform(0.2, 1.5)),
            )
            for _ in neighbours
        ]
        place = int(rng.integers(0, len(neighbours) + 1))
        branches, settings = list(neighbours), list(params)
        branches.insert(place, subject)
        settings.insert(place, greedy)
        done = engine.complete(branches, settings)[place]
        result = (*done.token_ids, *(float(value).hex() for value in done.logprobs))
        seen[result] = seen.get(result, 0) + 1
        for branch in branches:
            branch.prune()
    root.prune()
    other.prune()
    say(f"{repeats} repeats, mode {name}: {len(seen)} different results")
    tokens = {result[: args.again_tokens] for result in seen}
    return {
        "mode": name,
        "repeats": repeats,
        "neighbours": f"0..{args.neighbours}",
        "tokens": args.again_tokens,
        "different_results": len(seen),
        "different_tokens": len(tokens),
    }


def _neighbours(rng: np.random.Generator, roots: Sequence[Any], count: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(count):
        root = roots[int(rng.integers(0, len(roots)))]
        made += root.fork(1, at=int(rng.integers(root.num_tokens // 2, root.num_tokens + 1)))
    return made
