"""spec: tokens per second with guessed tokens, against plain decoding of the very same tokens.

Three kinds of text: lines that repeat, code that is to be edited, plain prose. One branch is
greedy; several branches are drawn at a low temperature, so that they differ. The ways take turns,
so that a slow spell of the machine hits all of them, and each run's tokens are compared with the
plain one's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine, PromptLookup, SamplingParams
from dendrite_engine.errors import DendriteError
from dendrite_lab.bench import measure
from dendrite_lab.bench.spec_acceptance import acceptance
from dendrite_lab.bench.workload import make_engine

_CODE = """\
class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
"""
_LOG = "".join(
    f"12:00:{second:02d} INFO worker {second % 3}: request served, status 200, 0 retries\n"
    for second in range(12)
)
_EDIT = "Rewrite this code with the class renamed to Wallet. Answer with the code only.\n"
TEXTS: dict[str, Any] = {
    "repetitive": _LOG,
    "code edit": [{"role": "user", "content": _EDIT + _CODE}],
    "prose": "Once upon a time, in a village by the sea, there lived a",
}
WAYS: dict[str, PromptLookup | None] = {
    "plain": None,
    "lookup": PromptLookup(),
    "lookup, tree of 3": PromptLookup(width=3),
    "lookup, siblings": PromptLookup(siblings=True),
}


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="dendrite-lab bench spec")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--texts", nargs="+", choices=list(TEXTS), default=list(TEXTS))
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.3, help="of several branches")
    args = parser.parse_args(list(argv))
    engine = make_engine(args.model, 4096 + 2 * max(args.branches) * (args.tokens + 64))
    rows: list[dict[str, Any]] = []
    for text in args.texts:
        for count in args.branches:
            temperature = args.temperature if count > 1 else 0.0
            params = SamplingParams(
                temperature=temperature, max_tokens=args.tokens, ignore_eos=True
            )
            rows += _measure(engine, params, text, count, args.repeats)
    engine.close()
    return measure.report("spec", argv, rows, tokens=args.tokens, acceptance=acceptance(args.model))


def _measure(
    engine: Engine, params: SamplingParams, text: str, count: int, repeats: int
) -> list[dict[str, Any]]:
    """One row a way."""
    ways = {name: way for name, way in WAYS.items() if count > 1 or name != "lookup, siblings"}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, dict[str, Any]] = {}
    for repeat in range(repeats):
        seeded = params.replace(seed=repeat)
        texts = {}
        for name, way in ways.items():
            rate, texts[name], found[name] = _once(engine, TEXTS[text], seeded, count, way)
            rates[name].append(rate)
        for name, tokens in texts.items():
            if tokens != texts["plain"]:
                raise DendriteError(f"{name} gave other tokens than plain decoding on {text!r}")
    plain = statistics.median(rates["plain"])
    return [
        {
            "text": text,
            "branches": count,
            "way": name,
            "tokens_per_s": measure.spread(rates[name], 1),
            "times_plain": round(statistics.median(rates[name]) / plain, 2),
            **found[name],
        }
        for name in ways
    ]


def _once(
    engine: Engine, text: Any, params: SamplingParams, count: int, way: PromptLookup | None
) -> tuple[float, list[list[int]], dict[str, Any]]:
    """Tokens per second of one run, its tokens, and what came of the guesses."""
    root = engine.prompt(text)  # a new one each time, so that its forks have the same draws
    forks = root.fork(count)
    before = engine.stats()
    start = time.perf_counter()
    done = engine.complete(forks, params, speculate=way)
    seconds = time.perf_counter() - start
    after = engine.stats()
    total, earlier = after.speculation.total, before.speculation.total
    proposed = total.proposed - earlier.proposed
    accepted = total.accepted - earlier.accepted
    root.prune(subtree=True)
    return (
        count * params.max_tokens / seconds,
        [completion.token_ids for completion in done],
        {
            "passes": after.steps - before.steps,
            "proposed": proposed,
            "accepted": accepted,
            "accept_rate": round(accepted / proposed, 2) if proposed else None,
        },
    )
