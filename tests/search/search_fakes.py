"""A deterministic engine of a few lines: a Markov chain instead of a model, page books, a call log.

Same API as the real engine as far as search uses it (see `Engine`, `Branch`). Pages are counted as
the real core does: shared by forks, copied when a fork writes into a shared partial page.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from dendrite_engine.errors import EngineClosed, InvalidArgument, OutOfPages, StaleBranch
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.trace import Trace
from dendrite_engine.types import Completion, TokenAlternative

EOS = 0


def unit(*key: object) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


class FakeTokenizer:
    """Token n is the word `wn`; the end token is special."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [int(word.removeprefix("w")) for word in text.split()]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        return " ".join(f"w{i}" for i in ids if not (skip_special and i == EOS))


class FakeBranch:
    """A branch whose pages are a list of page ids shared with its forks."""

    def __init__(self, engine: FakeEngine, parent: FakeBranch | None, tokens: list[int]) -> None:
        self.engine = engine
        self.parent = parent
        self.id = next(engine.ids)
        self.depth = 0 if parent is None else parent.depth + 1
        self.fork_position = 0 if parent is None else len(tokens)
        self._num_forks = 0
        # an int where a search has set it
        self._key: object = () if parent is None else (parent._key, parent._num_forks)
        self.label = ""
        if parent is not None:
            parent._num_forks += 1
        self._ids = tokens
        self._logprobs: list[float | None] = [None] * len(tokens)
        self._pages: list[int] = []

    @property
    def is_alive(self) -> bool:
        return self.id in self.engine.live

    @property
    def num_tokens(self) -> int:
        self.check()
        return len(self._ids)

    @property
    def token_ids(self) -> list[int]:
        self.check()
        return list(self._ids)

    def _tokens(self, start: int) -> list[int]:
        self.check()
        return self._ids[start:]

    @property
    def logprobs(self) -> list[float | None]:
        self.check()
        return list(self._logprobs)

    @property
    def text(self) -> str:
        return self.engine.tokenizer.decode(self.token_ids)

    @property
    def path_key(self) -> object:
        return self._key

    def check(self) -> None:
        if not self.is_alive:
            raise StaleBranch(f"branch {self.id} was pruned")

    def fork(self, n: int = 1, at: int | None = None) -> list[FakeBranch]:
        self.check()
        if n < 1:
            raise InvalidArgument(f"fork: n must be at least 1, got {n}")
        return [self._fork(len(self._ids) if at is None else at) for _ in range(n)]

    def _fork(self, at: int) -> FakeBranch:
        child = FakeBranch(self.engine, self, self._ids[:at])
        child._logprobs = self._logprobs[:at]
        child._pages = self._pages[: self.engine.pages_for(at)]
        self.engine.hold(child._pages)
        self.engine.live[child.id] = child
        self.engine.log.append(("fork", 1))
        self.engine.trace.append("fork", child.id, {"parent": self.id, "position": at})
        return child

    def append(self, token_id: int, logprob: float | None) -> None:
        """One token; takes a page, or copies a shared partial one."""
        self.check()
        engine, used = self.engine, len(self._ids) % self.engine.config.page_size
        if used and engine.refs[self._pages[-1]] > 1:
            fresh = engine.take_page()
            engine.drop([self._pages.pop()])
            self._pages.append(fresh)
        elif not used:
            self._pages.append(engine.take_page())
        self._ids.append(token_id)
        self._logprobs.append(logprob)

    def extend(self, tokens, logprobs=None) -> FakeBranch:
        for token, value in zip(tokens, logprobs or [None] * len(tokens), strict=True):
            self.append(token, value)
        return self

    def rollback(self, n: int) -> int:
        del self._ids[-n:], self._logprobs[-n:]
        keep = self.engine.pages_for(len(self._ids))
        gone, self._pages = self._pages[keep:], self._pages[:keep]
        return self.engine.drop(gone)

    def prune(self, *, subtree: bool = False) -> int:
        if self.engine.live.pop(self.id, None) is None:
            return 0
        self.engine.log.append(("prune", 1))
        return self.engine.drop(self._pages)


class FakeJob:
    """Runs when its result is asked for, a token of every branch at a time."""

    def __init__(
        self, engine: FakeEngine, branches: list[FakeBranch], params: list[SamplingParams]
    ) -> None:
        self.engine = engine
        self.rows = [(Completion(b), p, []) for b, p in zip(branches, params, strict=True)]
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()

    def result(self, timeout: float | None = None) -> list[Completion]:
        while left := [row for row in self.rows if row[0].finish_reason is None]:
            self.engine.before_forward(len(left))
            if self.engine.closed:
                raise EngineClosed("the engine was closed")
            self.engine.log.append(("forward", len(left)))
            for completion, params, _ in left:
                if self.cancelled.is_set():
                    completion.finish_reason = "cancelled"
                else:
                    self._advance(completion, params)
        return [row[0] for row in self.rows]

    def _advance(self, completion: Completion, params: SamplingParams) -> None:
        branch = completion.branch
        try:
            token, logprob = self.engine.draw(branch, params)
            branch.append(token, logprob)
        except (OutOfPages, StaleBranch) as error:
            stale = isinstance(error, StaleBranch)
            completion.finish_reason = "stale" if stale else "out_of_pages"
            completion.error = error
            return
        completion.token_ids.append(token)
        completion.logprobs.append(logprob)
        completion.text = self.engine.tokenizer.decode(completion.token_ids)
        if token == EOS and not params.ignore_eos:
            completion.finish_reason = "eos"
        elif any(completion.text.endswith(stop) for stop in params.stop):
            completion.finish_reason = "stop"
        elif branch.num_tokens >= self.engine.max_context:
            completion.finish_reason = "context_full"
        elif len(completion.token_ids) >= params.max_tokens:
            completion.finish_reason = "length"


class FakeEngine:
    """A Markov chain over `vocab` tokens; token 0 ends a text.

    Args:
        vocab: number of tokens.
        seed: of the chain and of sampling.
        eos: how likely the end token is: its logit.
        logits: replaces the chain: logits by the tokens of the branch.
    """

    def __init__(
        self,
        vocab: int = 8,
        *,
        seed: int = 0,
        eos: float = -2.0,
        num_pages: int = 100_000,
        page_size: int = 4,
        max_context: int = 4096,
        logits: Callable[[list[int]], list[float]] | None = None,
    ) -> None:
        self.config = SimpleNamespace(
            page_size=page_size, seed=seed, device="cpu", dtype="float32", kv_format="fp32"
        )
        self.fingerprint = f"chain of {vocab}, {seed}"
        self.model_path = Path("chain")
        self.model_config = SimpleNamespace(vocab_size=vocab, eos_token_ids=(EOS,))
        self.max_context = max_context
        self.tokenizer = FakeTokenizer()
        self.trace = Trace()
        self.ids = itertools.count(1)
        self.live: dict[int, FakeBranch] = {}
        self.refs: dict[int, int] = {}
        self.num_pages = num_pages
        self.next_page = itertools.count()
        self.log: list[tuple[str, int]] = []
        self.closed = False
        self.before_forward: Callable[[int], None] = lambda rows: None
        self._eos = eos
        self._logits = logits or self._chain

    # -- the engine's API -----------------------------------------------------------------------

    def prompt(self, tokens: Sequence[int], *, namespace: str = "") -> FakeBranch:
        branch = FakeBranch(self, None, [])
        self.live[branch.id] = branch
        return branch.extend(tokens)

    @property
    def branches(self) -> list[FakeBranch]:
        return [self.live[i] for i in sorted(self.live)]

    def submit(self, branches, params, *, on_event=None, priority: int = 0, values=None) -> FakeJob:
        if self.closed:
            raise EngineClosed("the engine was closed")
        for branch in branches:
            branch.check()
        rows = [params] * len(branches) if isinstance(params, SamplingParams) else list(params)
        self.log.append(("submit", len(branches)))
        return FakeJob(self, list(branches), rows)

    def complete(self, branches, params) -> list[Completion]:
        return self.submit(branches, params).result()

    def top_tokens(self, branches, k: int) -> list[list[TokenAlternative]]:
        if self.closed:
            raise EngineClosed("the engine was closed")
        if not 1 <= k <= self.model_config.vocab_size:
            raise InvalidArgument(f"k must be in 1..{self.model_config.vocab_size}, got {k}")
        for branch in branches:
            branch.check()
        self.before_forward(len(branches))
        self.log.append(("top_tokens", len(branches)))
        rows = []
        for branch in branches:
            logprobs = self.logprobs_after(branch.token_ids)
            order = sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))[:k]
            rows.append([TokenAlternative(i, f"w{i}", logprobs[i]) for i in order])
        return rows

    def extend(self, branches, tokens, logprobs) -> None:
        self.log.append(("extend", len(branches)))
        for branch, ids, values in zip(branches, tokens, logprobs, strict=True):
            branch.extend(ids, values)

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(pages_live=len(self.refs), pages_total=self.num_pages)

    # -- the chain ------------------------------------------------------------------------------

    def _chain(self, tokens: list[int]) -> list[float]:
        key = (self.config.seed, *tokens[-2:])
        logits = [3.0 * unit(*key, token) for token in range(self.model_config.vocab_size)]
        logits[EOS] = self._eos
        return logits

    def logprobs_after(self, tokens: list[int]) -> list[float]:
        logits = self._logits(tokens)
        top = max(logits)
        norm = top + math.log(math.fsum(math.exp(x - top) for x in logits))
        return [x - norm for x in logits]

    def draw(self, branch: FakeBranch, params: SamplingParams) -> tuple[int, float]:
        logprobs = self.logprobs_after(branch.token_ids)
        if params.temperature == 0:
            bias = params.logit_bias or {}
            token = max(range(len(logprobs)), key=lambda i: (logprobs[i] + bias.get(i, 0.0), -i))
            return token, logprobs[token]
        weights = [math.exp(x / params.temperature) for x in logprobs]
        seed = self.config.seed if params.seed is None else params.seed
        u = unit(seed, branch._key, branch.num_tokens) * math.fsum(weights)
        for token, edge in enumerate(itertools.accumulate(weights)):
            if u < edge:
                return token, logprobs[token]
        return len(weights) - 1, logprobs[-1]

    # -- pages ----------------------------------------------------------------------------------

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size)

    def take_page(self) -> int:
        if len(self.refs) >= self.num_pages:
            raise OutOfPages(1, 0, 0, len(self.refs), self.num_pages)
        page = next(self.next_page)
        self.refs[page] = 1
        return page

    def hold(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.refs[page] += 1

    def drop(self, pages: Sequence[int]) -> int:
        freed = 0
        for page in pages:
            self.refs[page] -= 1
            if not self.refs[page]:
                del self.refs[page]
                freed += 1
        return freed

    def check_integrity(self) -> None:
        """Recount page references from the live branches."""
        held: dict[int, int] = {}
        for branch in self.live.values():
            for page in branch._pages:
                held[page] = held.get(page, 0) + 1
        if held != self.refs:
            raise AssertionError(f"page books {self.refs} disagree with the recount {held}")
