"""memory: pages that branches on a shared prefix take, with the real model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine, SamplingParams
from dendrite_lab.bench import measure
from dendrite_lab.bench.workload import make_engine, prompt_ids


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first line."""
    parser = argparse.ArgumentParser(prog="dendrite-lab bench memory")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--prefix", type=int, default=4091, help="not a multiple of 16: a part page"
    )
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 6, 64])
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args(list(argv))
    engine = make_engine(args.model, args.prefix + max(args.branches) * (args.tokens + 32))
    root = engine.prompt(prompt_ids(engine.tokenizer, args.prefix))
    rows = [_branches(engine, root, count, args.tokens) for count in args.branches]
    page_bytes = engine.stats().page_bytes
    engine.close()
    return measure.report("memory", argv, rows, prefix=args.prefix, page_bytes=page_bytes)


def _branches(engine: Engine, root: Any, count: int, tokens: int) -> dict[str, Any]:
    sampling = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=1)
    alone = engine.stats().pages_live
    made = root.fork(count)
    forked = engine.stats()
    engine.complete(made, sampling)
    diverged = engine.stats()
    engine.complete(made, sampling.replace(max_tokens=tokens - 1))
    grown = engine.stats()
    copies = count * -(-(root.num_tokens + tokens) // engine.config.page_size)
    for branch in made:
        branch.prune()
    return {
        "branches": count,
        "pages_one_branch": alone,
        "pages_after_fork": forked.pages_live,
        "pages_after_first_token": diverged.pages_live,
        "pages_per_divergence": (diverged.pages_live - forked.pages_live) / count,
        f"pages_after_{tokens}_tokens": grown.pages_live,
        "pages_if_copied": copies,
        "mib": round(grown.bytes_live / 2**20, 1),
        "mib_if_copied": round(copies * grown.page_bytes / 2**20, 1),
    }
