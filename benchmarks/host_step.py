"""host_step: what the engine thread spends per decoding step, without a model and without a device.

A fake runner and a fake sampler stand in for the device; pages, tree, scheduler, loop and reports
are real. Per step:

- critical: from "tokens known" to "next forward pass launched": the device has nothing to do.
- hidden: from there until the thread waits for the next tokens: sampling settings, reports.

And for a job of one token on branches that are forked inside another one, on an idle engine:

- fork_to_launch: from before the fork to "forward pass launched".
- known_to_back: from "tokens known" until the caller has them.

    python benchmarks/host_step.py --branches 1 64 256 --listen
"""

from __future__ import annotations

import argparse
import cProfile
import hashlib
import itertools
import pstats
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dendrite_engine.cache import make_core
from dendrite_engine.config import EngineConfig
from dendrite_engine.decoding import Decoder
from dendrite_engine.engine import Engine
from dendrite_engine.jobs import Job
from dendrite_engine.loop import StepLoop
from dendrite_engine.models.tokenizer import StreamDecoder
from dendrite_engine.sampling import SamplingRows
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.scheduler import Scheduler
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import Branch
from dendrite_engine.types import TokenEvent

VOCAB = 32_000


def _iterations_per_second() -> float:
    start = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)
    return 20_000 / (time.perf_counter() - start)


ITERATIONS_PER_SECOND = _iterations_per_second()


class Clock:
    """When steps were launched, waited for, and known, in s."""

    def __init__(self) -> None:
        self.launched: list[float] = []
        self.returned: list[float] = []
        self.waiting: list[float] = []
        self.known: list[float] = []


class FakeRunner:
    """Returns at once, as a runner does that only launches."""

    is_async = True
    last_ms = host_ms = 0.0
    steps = rows = graph_steps = 0
    logits_epoch = None
    failure = None

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._logits = torch.zeros(1024, 4)

    def run(self, plan: Any, drawn: Any = None) -> tuple[torch.Tensor, np.ndarray]:
        """The rows of a plan, in no time."""
        del drawn
        self._clock.launched.append(time.perf_counter())
        wanted = plan.logits_row
        distinct = np.unique(wanted[wanted >= 0])
        rows = np.where(wanted >= 0, np.searchsorted(distinct, wanted), -1)
        self._clock.returned.append(time.perf_counter())
        return self._logits[: len(distinct)], rows

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def diagnose(self, error: Exception) -> Exception:
        """An error is just that."""
        return error


class FakeTokens:
    """Tokens that the device has ready `seconds` after they were asked for."""

    def __init__(self, clock: Clock, tokens: np.ndarray, ready: float) -> None:
        self._clock, self._tokens, self._ready = clock, tokens, ready

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """Spin until they are ready, without the interpreter's lock, as CUDA does."""
        self._clock.waiting.append(time.perf_counter())
        left = self._ready - time.perf_counter()
        if left > 0:
            hashlib.pbkdf2_hmac("sha256", b"", b"", max(1, int(left * ITERATIONS_PER_SECOND)))
        logprobs = np.full(len(self._tokens), -1.0, np.float32)
        self._clock.known.append(time.perf_counter())
        return self._tokens, logprobs


class FakeSampler:
    """Draws from a fixed stream of tokens."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.vocab_size = VOCAB
        self._clock, self._seconds = clock, seconds
        self._stream = np.random.default_rng(0).integers(256, VOCAB, 1 << 20, dtype=np.int32)
        self._at = 0

    def begin(
        self, logits: torch.Tensor, rows: np.ndarray, settings: SamplingRows, positions: np.ndarray
    ) -> FakeTokens:
        """See TokenSampler.begin."""
        del logits, settings, positions
        self._at = (self._at + 1000) % (1 << 19)
        tokens = self._stream[self._at : self._at + len(rows)].copy()
        return FakeTokens(self._clock, tokens, time.perf_counter() + self._seconds)

    def begin_top(self, logits: torch.Tensor, rows: np.ndarray, k: int) -> FakeTokens:
        """No branch of this benchmark reports alternatives."""
        raise NotImplementedError


class FakeTokenizer:
    """Every token is a short word."""

    special_ids: frozenset[int] = frozenset()

    def stream(self) -> StreamDecoder:
        """A real decoder of fake bytes."""
        return StreamDecoder(self, self.special_ids)  # type: ignore[arg-type]

    def get(self, token_id: int) -> bytes:
        """Bytes of a token."""
        return b" word" if token_id else b""


class ModelFree(Engine):
    """An Engine with everything but a model."""

    def __init__(self, num_pages: int, seconds: float) -> None:
        self.config = EngineConfig(max_branches=1_000_000)
        self.core = make_core(num_pages, 16)
        self.trace = Trace()
        self.clock = Clock()
        self.model_config = SimpleNamespace(vocab_size=VOCAB)  # type: ignore[assignment]
        self.max_context = 1 << 20
        self._branches = {}
        self._next_id = itertools.count(1).__next__
        self._lock = threading.Lock()
        sampler = FakeSampler(self.clock, seconds)
        decoder = Decoder(
            self.core, sampler, FakeTokenizer(), self.trace,  # type: ignore[arg-type]
            eos_ids=[2], max_context=self.max_context, seed=0,
        )  # fmt: skip
        runner = FakeRunner(self.clock)
        self._loop = StepLoop(self.core, runner, Scheduler(4096, 512), decoder, self.trace)

    def root(self, num_tokens: int) -> Branch:
        """A branch of `num_tokens` tokens, computed."""
        handle, _ = self.core.create(np.arange(num_tokens, dtype=np.int32) % 1000)
        branch = Branch(self, handle)
        self._register(branch)
        self._compute([branch])
        return branch


def measure(branches: int, args: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps of one job, in us."""
    engine = ModelFree(branches * (args.tokens // 16 + 2) + 300, args.device_ms / 1e3)
    forks = engine.root(4096).fork(branches)
    clock = engine.clock
    for stamps in (clock.launched, clock.returned, clock.waiting, clock.known):
        stamps.clear()
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=args.tokens)
    each = [params] * branches
    if args.ragged:  # one more each step, in no order
        each = [
            params.replace(max_tokens=args.tokens - i * 37 % args.tokens) for i in range(branches)
        ]
    heard: list[TokenEvent] = []
    on_event = heard.append if args.listen else None
    busy = threading.Event()
    if args.busy:
        threading.Thread(target=_compute, args=(busy,), daemon=True).start()
    start = time.perf_counter()
    engine._start(Job(forks, each, on_event=on_event)).result()
    total = time.perf_counter() - start
    busy.set()
    engine.close()
    # The first tokens come from the logits of the root, without a forward pass.
    critical = [b - a for a, b in zip(clock.known, clock.launched, strict=False)]
    hidden = [b - a for a, b in zip(clock.returned, clock.waiting[1:], strict=False)]
    return {
        "critical": statistics.median(critical) * 1e6,
        "critical_p90": statistics.quantiles(critical, n=10)[-1] * 1e6,
        "hidden": statistics.median(hidden) * 1e6,
        "step": total / args.tokens * 1e6,
    }


def measure_short_jobs(branches: int, args: argparse.Namespace) -> dict[str, float]:
    """Medians over jobs of one token, in us."""
    engine = ModelFree(branches + 300, args.device_ms / 1e3)
    root, clock = engine.root(4093), engine.clock
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=1)
    before: list[float] = []
    after: list[float] = []
    for _ in range(args.jobs):
        start = time.perf_counter()
        forks = root.fork(branches, at=root.num_tokens - 7)
        engine.complete(forks, params)
        after.append(time.perf_counter() - clock.known[-1])
        before.append(clock.launched[-1] - start)
        for branch in forks:
            branch.prune()
    engine.close()
    return {
        "fork_to_launch": statistics.median(before) * 1e6,
        "known_to_back": statistics.median(after) * 1e6,
    }


def _compute(until: threading.Event) -> None:
    """A user's thread that never waits."""
    while not until.is_set():
        sum(range(1000))


def main(argv: Sequence[str] | None = None) -> None:
    """Print one line for each number of branches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--jobs", type=int, default=200, help="of one token each; 0: none")
    parser.add_argument("--device-ms", type=float, default=0.0, help="time of a step on the device")
    parser.add_argument("--listen", action="store_true", help="a callback hears every event")
    parser.add_argument("--ragged", action="store_true", help="branches end at different times")
    parser.add_argument("--busy", action="store_true", help="another Python thread computes")
    parser.add_argument("--profile", action="store_true", help="profile the engine thread")
    args = parser.parse_args(argv)
    profile = cProfile.Profile()
    if args.profile:
        threading.setprofile(lambda *_: (sys.setprofile(None), profile.enable()))
    for branches in args.branches:
        row = measure(branches, args)
        if args.jobs:
            row |= measure_short_jobs(branches, args)
        numbers = "  ".join(f"{name} {value:7.1f} us" for name, value in row.items())
        sys.stdout.write(f"{branches:4d} branches  {numbers}\n")
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
