"""tree: tokens per second of many branches on one prefix, beside Hugging Face on the same prompts.

Hugging Face is given every advantage: its prefix is computed once and repeated for the batch
    outside the
timing, so only decode steps are compared. Its `generate` on the same prompts would prefill each
copy.
Ours are the same steps: all branches of one `Engine.submit`, timed between token events.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

from dendrite_engine import Engine, SamplingParams
from dendrite_lab.bench import gpu_tree, measure
from dendrite_lab.bench.gpu_engine import wants_device
from dendrite_lab.bench.workload import hugging_face, make_engine, prompt_ids


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines. `--shape` runs its GPU form."""
    if wants_device(argv):
        return gpu_tree.run(argv)
    parser = argparse.ArgumentParser(prog="dendrite-lab bench tree")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--prefix", type=int, default=2048)
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--hf-branches", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(list(argv))
    engine = make_engine(args.model, args.prefix + max(args.branches) * (args.tokens + 32))
    ids = prompt_ids(engine.tokenizer, args.prefix)
    root = engine.prompt(ids)
    peer = _Peer(engine, ids) if args.hf_branches else None
    rows: dict[int, dict[str, Any]] = {
        n: {"branches": n, "ours": [], "hf": []} for n in args.branches
    }
    for _ in range(args.repeats):  # interleaved, so that a slow spell of the machine hits both
        for count in args.branches:
            rows[count]["ours"].append(_ours(engine, root, count, args.tokens))
            if peer is not None and count in args.hf_branches:
                rows[count]["hf"].append(peer.decode(count, max(args.tokens // 4, 6)))
    engine.close()
    return measure.report(
        "tree", argv, [_row(row) for row in rows.values()], prefix=args.prefix, tokens=args.tokens
    )


def _row(row: dict[str, Any]) -> dict[str, Any]:
    out = {"branches": row["branches"], "tokens_per_s": measure.spread(row["ours"], 1)}
    if row["hf"]:
        out["hf_tokens_per_s"] = measure.spread(row["hf"], 1)
        out["times_hf"] = round(statistics.median(row["ours"]) / statistics.median(row["hf"]), 2)
    return out


def _ours(engine: Engine, root: Any, count: int, tokens: int) -> float:
    """Tokens per second from the first token event to the last."""
    sampling = SamplingParams(temperature=1.0, ignore_eos=True, max_tokens=tokens)
    made = root.fork(count)
    stamps = [time.perf_counter() for _ in engine.generate(made, sampling)]
    for branch in made:
        branch.prune()
    # The first event of each branch comes from the prefix's logits, without a forward pass.
    return (len(stamps) - count) / (stamps[-1] - stamps[count - 1])


class _Peer:
    """transformers with the prefix already in its cache."""

    def __init__(self, engine: Engine, ids: list[int]) -> None:
        import torch

        self._model = hugging_face(engine.model_path)
        with torch.inference_mode():
            out = self._model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        self._cache, self._last = out.past_key_values, out.logits[:, -1].argmax(-1)

    def decode(self, count: int, steps: int) -> float:
        """Tokens per second of `count` rows over `steps` decode steps; median step."""
        import copy

        import torch

        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(count)
        token = self._last.repeat(count)
        times = []
        with torch.inference_mode():
            for _ in range(steps + 1):
                start = time.perf_counter()
                out = self._model(token[:, None], past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1)
                times.append(time.perf_counter() - start)
        return count / statistics.median(times[1:])
