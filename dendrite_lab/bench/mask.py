"""mask: filling grammar masks and forking their state at 49k and 128k tokens, and what a decode
step with a grammar costs on top of one without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.config import GrammarLimits
from dendrite_engine.grammar import CONSTRAINTS, JsonSchema, Matcher, Regex
from dendrite_engine.grammar.base import ConstraintEngine
from dendrite_engine.grammar.service import ModelVocabulary
from dendrite_engine.models.hub import resolve_model
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_engine.sampling import SamplerState, SamplingRows
from dendrite_lab.bench import measure
from dendrite_lab.bench.workload import make_engine, prompt_ids

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"type": "string", "pattern": "^[0-9]{4}-[01][0-9]-[0-3][0-9]$"},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4},
        "home": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "number": {"type": "integer"}},
            "required": ["street", "number"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "born", "tags", "home"],
    "additionalProperties": False,
}
DOCUMENTS = (
    {"name": "Ada Lovelace", "born": "1815-12-10", "tags": ["red", "blue"],
     "home": {"street": "St James's Square", "number": 12}},
    {"name": "Grace Brewster Hopper", "born": "1906-12-09", "tags": [],
     "home": {"street": "West End Avenue", "number": 316}},
    {"name": "\u00c9milie du Ch\u00e2telet", "born": "1706-12-17", "tags": ["green"],
     "home": {"street": "Rue Traversi\u00e8re", "number": 3}},
)  # fmt: skip
WORDS = Regex("[A-Za-z ,.;:'\"?!()\\n0-9-]*")  # allows about half of the vocabulary, forces nothing


class Enlarged(ModelVocabulary):
    """A model's tokens and pairs of them, up to a size."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: tuple[int, ...]) -> None:
        super().__init__(tokenizer, size, eos_ids)
        real = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        plain = [text for token, text in enumerate(real) if token not in tokenizer.special_ids]
        rng, known = np.random.default_rng(0), set(real)
        while len(real) < size:
            left, right = rng.integers(len(plain), size=2)
            if (pair := plain[left] + plain[right]) not in known:
                known.add(pair)
                real.append(pair)
        self.token_bytes = real.__getitem__
        self.to_json = lambda: "no tokenizer.json has these tokens"


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="dendrite-lab bench mask")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 131072])
    parser.add_argument("--rounds", type=int, default=20, help="passes over the documents")
    parser.add_argument("--branches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=16, help="decode steps of one repetition")
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args(list(argv))
    tokenizer = Tokenizer(resolve_model(args.model))
    rows = [_fills(tokenizer, size, args.rounds) for size in args.vocabularies]
    engine = make_engine(args.model, 2048 + max(args.branches) * (args.tokens + 32))
    rows.append(_branch_forks(engine))
    rows += [_steps(engine, count, args.tokens, args.repeats) for count in args.branches]
    engine.close()
    return measure.report("mask", argv, rows)


# -- masks ------------------------------------------------------------------------------------


def _fills(tokenizer: Tokenizer, size: int, rounds: int) -> dict[str, Any]:
    eos = tuple(sorted(tokenizer.special_ids))[:1]
    real = size <= tokenizer.vocab_size
    vocabulary = (ModelVocabulary if real else Enlarged)(tokenizer, size, eos)
    runner = CONSTRAINTS.get("llguidance")(vocabulary, GrammarLimits())
    started = time.perf_counter()
    first = runner.compile(JsonSchema(SCHEMA))
    compile_ms = (time.perf_counter() - started) * 1e3
    texts = [tokenizer.encode(json.dumps(d, ensure_ascii=False)) for d in DOCUMENTS]
    fills, accepts, forks = _walk(runner, first, texts, rounds)
    return {
        "what": "masks", "vocabulary": size, "compile_ms": round(compile_ms, 2),
        "fill_us": measure.spread(fills, 1), "fill_p99_us": round(_quantile(fills, 0.99), 1),
        "fill_64_us": measure.spread(_together(runner, first, texts[0], 64), 0),
        "accept_us": measure.spread(accepts, 1), "fork_us": measure.spread(forks, 2),
    }  # fmt: skip


def _walk(
    runner: ConstraintEngine, first: Matcher, texts: Sequence[Sequence[int]], rounds: int
) -> tuple[list[float], list[float], list[float]]:
    """Microseconds of filling, accepting and forking at each token of each document."""
    out = np.zeros((1, runner.words), np.int32)
    fills: list[float] = []
    accepts: list[float] = []
    forks: list[float] = []
    for number in range(rounds + 1):
        for text in texts:
            matcher = first.fork()
            for token in text:
                times = (
                    _us(partial(runner.fill, [matcher], [0], out)),
                    _us(matcher.fork),
                    _us(partial(matcher.accept, [token])),
                )
                if number:  # the first round builds the lexer's states
                    for kept, value in zip((fills, forks, accepts), times, strict=True):
                        kept.append(value)
    return fills, accepts, forks


def _together(
    runner: ConstraintEngine, first: Matcher, text: Sequence[int], count: int
) -> list[float]:
    """Microseconds of one call that fills `count` masks at different places of a document."""
    matchers = [first.fork() for _ in range(count)]
    for place, matcher in enumerate(matchers):
        matcher.accept(text[: place % len(text)])
    out = np.zeros((count, runner.words), np.int32)
    rows = list(range(count))
    return [_us(partial(runner.fill, matchers, rows, out)) for _ in range(60)][10:]


def _branch_forks(engine: Engine) -> dict[str, Any]:
    """Branch.fork with and without a grammar."""
    root = engine.prompt(prompt_ids(engine.tokenizer, 1024))
    guided = root.fork()[0].constrain(JsonSchema(SCHEMA))
    found: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(15):
        for name, branch in (("without", root), ("with", guided)):
            found[name].append(_us(partial(branch.fork, 500)) / 500)
            for child in branch.children:
                if child is not guided:
                    child.prune()
    engine.prune_all()
    return {
        "what": "Branch.fork", "free_us": measure.spread(found["without"], 2),
        "constrained_us": measure.spread(found["with"], 2),
    }  # fmt: skip


# -- decode steps -----------------------------------------------------------------------------


def _steps(engine: Engine, count: int, tokens: int, repeats: int) -> dict[str, Any]:
    """What a decode step takes without a grammar and with one, in turns, and what the engine thread
    does for the grammar in it.
    """
    root = engine.prompt(prompt_ids(engine.tokenizer, 512))
    guided = root.fork()[0].constrain(WORDS)
    engine.complete(guided.fork(), SamplingParams(max_tokens=4))
    free_ms: list[float] = []
    guided_ms: list[float] = []
    with _Watched(engine._parts.decoder.guided) as watched:
        for _ in range(repeats):
            for parent, kept in ((root, free_ms), (guided, guided_ms)):
                kept += _step_times(engine, parent, count, tokens)
    stats = engine.stats()
    engine.prune_all()
    host_us, sampling_us = watched.median_us, _sampling_us(engine, count)
    return {
        "what": "decode step", "branches": count, "free_ms": measure.spread(free_ms, 2),
        "constrained_ms": measure.spread(guided_ms, 2), "grammar_us": round(host_us, 1),
        "sampling_us": round(sampling_us, 1),
        "overhead_percent": round((host_us + max(sampling_us, 0)) / min(free_ms) / 10, 2),
        "hidden_us": round(stats.mask_us_p50 * count, 1),
        "waited_us": round(stats.mask_wait_us_p50, 1),
    }  # fmt: skip


class _Watched:
    """Times what the engine thread does for grammars: reading tokens, starting and taking masks."""

    _NAMES = ("prepare", "masks", "read", "go_on")

    def __init__(self, guided: Any) -> None:
        self._guided = guided
        self._times: dict[str, list[float]] = {name: [] for name in self._NAMES}

    def __enter__(self) -> _Watched:
        for name in self._NAMES:
            setattr(self._guided, name, partial(self._timed, name, getattr(self._guided, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._NAMES:
            delattr(self._guided, name)

    def _timed(self, name: str, action: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter_ns()
        result = action(*args)
        if name != "masks" or result is not None:  # None: a step without a grammar
            self._times[name].append((time.perf_counter_ns() - start) / 1e3)
        return result

    @property
    def median_us(self) -> float:
        """Sum of the medians: each is called once a step."""
        return sum(statistics.median(times) for times in self._times.values() if times)


def _sampling_us(engine: Engine, count: int) -> float:
    """What masks add to the sampling of `count` rows, in microseconds."""
    sampler, vocab = engine._parts.decoder._sampler, engine.model_config.vocab_size
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(0))
    masks = np.full((count, -(-vocab // 32)), 0x5555_5555, np.int32)
    rows, found = np.arange(count), []
    for masked in (False, True):
        states = [
            SamplerState(SamplingParams(temperature=0.8), 0, i, masked=masked) for i in range(count)
        ]
        settings, bits = SamplingRows.of(states), masks if masked else None
        positions = np.zeros(count, np.int32)
        action = partial(sampler.begin, logits, rows, settings, positions, bits)
        found.append(statistics.median(measure.repeat(action, 41, warmup=5)) * 1e6)
    return found[1] - found[0]


def _step_times(engine: Engine, parent: Any, count: int, tokens: int) -> list[float]:
    """Milliseconds between the steps of one job, seen from the engine thread."""
    branches = parent.fork(count)
    last, marks = branches[-1].id, []

    def note(event: Any) -> None:
        if event.branch.id == last:
            marks.append(time.perf_counter())

    params = SamplingParams(temperature=0.8, max_tokens=tokens, ignore_eos=True)
    bias = {token: float("-inf") for token in engine.model_config.eos_token_ids}
    engine.submit(branches, params.replace(logit_bias=bias), on_event=note).result()
    for branch in branches:
        branch.prune()
    return [(b - a) * 1e3 for a, b in pairwise(marks[1:])]


def _us(action: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - start) / 1e3


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * q))]
