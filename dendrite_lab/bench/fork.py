"""fork: time, pages and bytes of a fork at growing context; peers in the same run.

The page-and-tree bookkeeping is real at every length; no K/V tensor stands behind the long ones, as
a fork never touches K/V (the `memory` and `first-token` benchmarks run with the real model).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dendrite_engine.cache import make_core
from dendrite_engine.engine import Engine
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import Branch
from dendrite_lab.bench import gpu_fork, measure
from dendrite_lab.bench.gpu_engine import wants_device

CONTEXTS = (1024, 4096, 16384, 65536, 131072)


class Bookkeeping(Engine):
    """An Engine with pages and tree but no model: `Branch.fork` runs the same code."""

    def __init__(self, num_pages: int, max_branches: int = 1_000_000) -> None:
        from dendrite_engine.config import EngineConfig

        self.config = EngineConfig(max_branches=max_branches)
        self.core = make_core(num_pages, 16)
        self.trace = Trace()
        self._branches = {}
        self._next_id = itertools.count(1).__next__

    def root(self, num_tokens: int) -> Branch:
        """A root branch of `num_tokens` tokens."""
        handle, _ = self.core.create(np.arange(num_tokens, dtype=np.int32) % 1000)
        branch = Branch(self, handle)
        self._register(branch)
        return branch


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines. `--shape` runs its GPU form."""
    if wants_device(argv):
        return gpu_fork.run(argv)
    parser = argparse.ArgumentParser(prog="dendrite-lab bench fork")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--forks", type=int, default=2000, help="forks per repetition")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument(
        "--gguf", type=Path, help="model for llama.cpp, if llama-cpp-python is there"
    )
    args = parser.parse_args(list(argv))
    rows = [_at(context, args.forks, args.repeats) for context in args.contexts]
    peers = [] if args.no_peers else _peers(args.repeats, args.gguf)
    return measure.report("fork", argv, rows, peers=peers)


def _at(context: int, forks: int, repeats: int) -> dict[str, Any]:
    engine = Bookkeeping(context // 16 + 8)
    root = engine.root(context - 5)  # the last page is partly filled, as it mostly is
    before = engine.core.stats()
    fork_us, pair_us, many_ms, core_ns = [], [], [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        made = [root.fork(1) for _ in range(forks)]
        fork_us.append((time.perf_counter() - start) / forks * 1e6)
        _prune(made)
        start = time.perf_counter()
        for _ in range(forks):
            root.fork(1)[0].prune()
        pair_us.append((time.perf_counter() - start) / forks * 1e6)
        start = time.perf_counter()
        made = [root.fork(500)]
        many_ms.append((time.perf_counter() - start) * 1e3)
        _prune(made)
        core_ns.append(_core_pair_ns(engine, root, forks))
        engine.trace = root.engine.trace = Trace()
    after = engine.core.stats()
    return {
        "context": context,
        "fork_us": measure.spread(fork_us[1:]),
        "fork_prune_us": measure.spread(pair_us[1:]),
        "fork_500_ms": measure.spread(many_ms[1:]),
        "core_fork_prune_ns": measure.spread(core_ns[1:], 1),
        "pages_taken": after["pages_taken"] - before["pages_taken"],
        "bytes_copied": after["cow_copies"] - before["cow_copies"],
    }


def _prune(made: list[list[Branch]]) -> None:
    for branches in made:
        for branch in branches:
            branch.prune()


def _core_pair_ns(engine: Bookkeeping, root: Branch, forks: int) -> float:
    fork, prune, handle = engine.core.fork, engine.core.prune, root._handle
    start = time.perf_counter()
    for _ in range(forks):
        prune(fork(handle))
    return (time.perf_counter() - start) / forks * 1e9


def _peers(repeats: int, gguf: Path | None) -> list[dict[str, Any]]:
    rows = [_deepcopy(min(repeats, 7))]
    return [*rows, _llama_cpp(gguf)] if gguf is not None else rows


def _deepcopy(repeats: int) -> dict[str, Any]:
    """copy.deepcopy of a transformers cache: 4096 tokens of SmolLM2-135M's shape, fp32."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(30):
        kv = torch.randn(1, 3, 4096, 64)
        cache.update(kv, kv.clone(), layer)
    seconds = measure.repeat(lambda: copy.deepcopy(cache), repeats)
    return {
        "peer": "transformers: copy.deepcopy(DynamicCache)",
        "context": 4096,
        "fork_us": measure.spread([s * 1e6 for s in seconds], 1),
        "bytes_copied": 30 * 2 * 3 * 4096 * 64 * 4,
    }


def _llama_cpp(gguf: Path) -> dict[str, Any]:
    """llama_memory_seq_cp over 4096 tokens; needs llama-cpp-python."""
    from dendrite_lab.bench.llama_peer import seq_cp_microseconds

    return {
        "peer": "llama.cpp: llama_memory_seq_cp (kv_unified)",
        "context": 4096,
        "fork_us": measure.spread(seq_cp_microseconds(gguf, 4096), 1),
        "bytes_copied": 0,
    }
