"""search-overhead: what a search costs besides the model, and what it saves over text in, text out.

Two parts. `mcts`: 500 simulations over a prompt of 1K tokens; the time that is not spent in forward
passes, in percent. Everything counts that is not a pass: select, fork, sampling, evaluation,
pruning and the hand-over between the threads. `tree of thought`: two thoughts a node, four levels,
all kept: 30 generations of 32 tokens on a prompt of 1K tokens; ours against transformers'
`generate`, which prefills the whole text of every thought again, as a search over text does.
`one_by_one` is a call for each thought, `by_level` one call for all thoughts of a level.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from dendrite_engine import Branch, Budget, Engine, SamplingParams
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.runner import ModelRunner
from dendrite_engine.search import MCTS, TreeOfThought
from dendrite_lab.bench import measure
from dendrite_lab.bench.workload import hugging_face, make_engine, prompt_ids

DEPTH, WIDTH = 4, 2
GENERATIONS = sum(WIDTH**level for level in range(1, DEPTH + 1))


class ForwardClock:
    """Adds up the time of forward passes.

    Attributes:
        seconds: spent in passes so far.
        passes: how many.
    """

    def __init__(self) -> None:
        self.seconds, self.passes = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count every pass of a CPU engine while this is open."""
        plain = ModelRunner.run

        def timed(runner: ModelRunner, *args: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(runner, *args)
            finally:
                self.seconds += time.perf_counter() - start
                self.passes += 1

        with mock.patch.object(ModelRunner, "run", timed):
            yield


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines.

    Raises:
        InvalidArgument: an option is not positive.
    """
    parser = argparse.ArgumentParser(prog="dendrite-lab bench search-overhead")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--parallel", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--tokens-per-node", type=int, default=8)
    parser.add_argument("--thought-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hf-repeats", type=int, default=1, help="0 leaves transformers out")
    args = parser.parse_args(list(argv))
    for name in ("prefix", "simulations", "tokens_per_node", "thought_tokens", "repeats"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise InvalidArgument(f"--{option} must be at least 1, got {getattr(args, name)}")
    engine = _engine(args)
    ids = prompt_ids(engine.tokenizer, args.prefix)
    root = engine.prompt(ids)
    engine.complete(root.fork(4), SamplingParams(max_tokens=4))  # warm up
    rows = [_mcts_row(engine, root, parallel, args) for parallel in args.parallel]
    rows.append(_thought_row(engine, root, args))
    engine.close()
    return measure.report("search-overhead", argv, rows, prefix=args.prefix)


def _engine(args: argparse.Namespace) -> Engine:
    per_node = 2 * args.tokens_per_node + 32
    return make_engine(args.model, args.prefix + args.simulations * per_node)


def _mcts_row(
    engine: Engine, root: Branch, parallel: int, args: argparse.Namespace
) -> dict[str, Any]:
    totals, outside, per_pass, tokens = [], [], [], 0
    for seed in range(args.repeats):
        search = MCTS(
            width=4, tokens_per_node=args.tokens_per_node, parallel=parallel, seed=seed,
            sampling=SamplingParams(temperature=1.0, ignore_eos=True),
        )  # fmt: skip
        clock = ForwardClock()
        with clock.running():
            start = time.perf_counter()
            result = engine.search(root, search, Budget(iterations=args.simulations)).wait()
            seconds = time.perf_counter() - start
        tokens = result.tokens
        result.prune()
        totals.append(seconds)
        outside.append(100.0 * (1.0 - clock.seconds / seconds))
        per_pass.append(1e3 * clock.seconds / clock.passes)
    return {
        "search": "mcts",
        "parallel": parallel,
        "generations": args.simulations,
        "tokens": tokens,
        "seconds": measure.spread(totals, 2),
        "forward_ms": measure.spread(per_pass, 1),
        "outside_percent": measure.spread(outside, 2),
    }


def _thought_row(engine: Engine, root: Branch, args: argparse.Namespace) -> dict[str, Any]:
    """Ours before, between and after the runs of the peer, so that a slow spell hits both."""
    runs = [_thoughts(engine, root, seed, args) for seed in range(args.repeats)]
    peers: dict[str, list[float]] = {"one_by_one": [], "by_level": []}
    model = hugging_face(engine.model_path) if args.hf_repeats else None
    for seed in range(args.hf_repeats):
        for name, seconds in peers.items():
            at_once = name == "by_level"
            ids = root.token_ids
            seconds.append(_hf_seconds(model, ids, args.thought_tokens, seed, at_once))
            runs.append(_thoughts(engine, root, seed, args))
    ours = measure.spread([seconds for seconds, _ in runs], 2)
    row: dict[str, Any] = {
        "search": "tree of thought",
        "parallel": None,
        "generations": GENERATIONS,
        "tokens": GENERATIONS * args.thought_tokens,
        "seconds": ours,
        "outside_percent": measure.spread([outside for _, outside in runs], 2),
    }
    for name, seconds in peers.items():
        if seconds:
            row[f"hf_{name}_seconds"] = hf = measure.spread(seconds, 2)
            row[f"times_hf_{name}"] = round(hf["median"] / ours["median"], 2)
    return row


def _thoughts(
    engine: Engine, root: Branch, seed: int, args: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of one run, and percent of them outside forward passes."""
    search = TreeOfThought(
        width=WIDTH, breadth=WIDTH ** (DEPTH - 1), max_depth=DEPTH, seed=seed,
        tokens_per_node=args.thought_tokens,
        sampling=SamplingParams(temperature=1.0, ignore_eos=True),
    )  # fmt: skip
    clock = ForwardClock()
    with clock.running():
        start = time.perf_counter()
        result = engine.search(root, search).wait()
        seconds = time.perf_counter() - start
    if result.nodes != GENERATIONS:
        raise InvalidArgument(f"expected {GENERATIONS} thoughts, the search made {result}")
    result.prune()
    return seconds, 100.0 * (1.0 - clock.seconds / seconds)


def _hf_seconds(model: Any, ids: Sequence[int], tokens: int, seed: int, at_once: bool) -> float:
    """The same tree by `generate`: every thought begins with a prefill of all before it."""
    import torch

    torch.manual_seed(seed)
    level = torch.tensor([list(ids)])
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(DEPTH):
            texts = level.repeat_interleave(WIDTH, dim=0)
            calls = [texts] if at_once else list(texts.split(1))
            level = torch.cat([_generate(model, call, tokens) for call in calls])
    return time.perf_counter() - start


def _generate(model: Any, ids: Any, tokens: int) -> Any:
    return model.generate(
        ids, attention_mask=ids.new_ones(ids.shape), do_sample=True, temperature=1.0, top_k=0,
        min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0,
    )  # fmt: skip
