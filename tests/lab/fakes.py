"""An engine without a model: canned words, real events, page sharing by lists. For lab tests."""

from __future__ import annotations

import itertools
import math
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from dendrite_engine.errors import InvalidArgument, StaleBranch
from dendrite_engine.trace import Trace
from dendrite_engine.types import Completion, TokenAlternative, TokenEvent

_TALE = "the small dragon said that it would never fly again , because the moon was made of cheese"
WORDS = tuple(_TALE.split(" "))


class FakeTokenizer:
    """One token a character run: ids are assigned as texts are seen."""

    def __init__(self):
        self._texts: list[str] = []
        self._ids: dict[str, int] = {}

    def encode(self, text, *, add_special_tokens=False):
        del add_special_tokens
        words = [w if i == 0 else " " + w for i, w in enumerate(text.split(" "))]
        return [self._id(word) for word in words if word]

    def _id(self, text):
        if text not in self._ids:
            self._ids[text] = len(self._texts)
            self._texts.append(text)
        return self._ids[text]

    def piece(self, token_id):
        return self._texts[token_id]

    def pieces(self, ids):
        return [self._texts[i] for i in ids]

    def decode(self, ids, *, skip_special=False):
        del skip_special
        return "".join(self.pieces(ids))


class FakeCore:
    """Pages shared by forks, copied when a shared partial page is written."""

    def __init__(self, num_pages=256, page_size=4):
        self.num_pages, self.page_size = num_pages, page_size
        self.tokens_of: dict[int, list[int]] = {}
        self.pages_of: dict[int, list[int]] = {}
        self._next = itertools.count(1)
        self._free = list(range(num_pages))[::-1]
        self.counts = {"pages_taken": 0, "cow_copies": 0, "forks": 0, "prunes": 0}

    def make(self, tokens, pages=()):
        handle = next(self._next)
        self.tokens_of[handle], self.pages_of[handle] = list(tokens), list(pages)
        return handle

    def take(self, handle, count):
        for _ in range(count):
            self.pages_of[handle].append(self._free.pop())
            self.counts["pages_taken"] += 1

    def append(self, handle, tokens):
        held, pages = self.tokens_of[handle], self.pages_of[handle]
        if tokens and len(held) % self.page_size and self.holders(pages[-1]) > 1:
            pages.pop()
            self.take(handle, 1)
            self.counts["cow_copies"] += 1
        held.extend(tokens)
        self.take(handle, math.ceil(len(held) / self.page_size) - len(pages))

    def cut(self, handle, count):
        pages = self.pages_of[handle]
        keep = math.ceil(count / self.page_size)
        gone = [page for page in pages[keep:] if self.holders(page) == 1]
        self.tokens_of[handle] = self.tokens_of[handle][:count]
        self.pages_of[handle] = pages[:keep]
        self._free.extend(gone)
        return len(gone)

    def holders(self, page):
        return sum(page in pages for pages in self.pages_of.values())

    def describe(self, handles):
        rows = []
        for handle in handles.tolist():
            if handle not in self.pages_of:
                raise StaleBranch(f"handle {handle} is stale")
            pages = self.pages_of[handle]
            count = len(self.tokens_of[handle])
            rows.append((count, count, len(pages), sum(self.holders(p) == 1 for p in pages), 1, 1))
        names = ("num_tokens", "num_computed", "pages", "owned_pages", "tail_refs", "segments")
        table = np.array(rows, np.int32).reshape(len(rows), len(names))
        return {name: table[:, i] for i, name in enumerate(names)}

    def segments(self, handle):
        return [(handle, 0, len(self.tokens_of[handle]), 1, list(self.pages_of[handle]))]

    def page_refs(self):
        return np.array([self.holders(page) for page in range(self.num_pages)], np.int32)

    def page_state(self):
        return (self.page_refs() > 0).astype(np.uint8)

    def refcount_histogram(self):
        values, counts = np.unique(self.page_refs(), return_counts=True)
        return {int(v): int(c) for v, c in zip(values, counts, strict=True) if v}

    def stats(self):
        refs = self.page_refs()
        live = int((refs > 0).sum())
        return {
            **self.counts,
            "pages_total": self.num_pages,
            "pages_free": self.num_pages - live,
            "pages_live": live,
            "pages_shared": int((refs > 1).sum()),
            "pages_cached": 0,
            "branches": len(self.pages_of),
        }


class FakeBranch:
    """The parts of `dendrite_engine` branches that the lab uses."""

    def __init__(self, engine, handle, parent=None):
        self.engine, self.handle, self.parent = engine, handle, parent
        self.id = engine.next_id()
        self.fork_position = 0 if parent is None else self.num_tokens
        self.logprobs = (
            list(parent.logprobs[: self.num_tokens]) if parent else [None] * self.num_tokens
        )
        self.is_generating = False
        engine._branches[self.id] = self

    @property
    def is_alive(self):
        return self.id in self.engine._branches

    @property
    def token_ids(self):
        if not self.is_alive:
            raise StaleBranch(f"branch {self.id} was pruned; its tokens and pages are gone")
        return list(self.engine.core.tokens_of[self.handle])

    @property
    def num_tokens(self):
        if self.handle not in self.engine.core.tokens_of:
            raise StaleBranch(f"branch {self.id} was pruned; its tokens and pages are gone")
        return len(self.engine.core.tokens_of[self.handle])

    @property
    def text(self):
        return self.engine.tokenizer.decode(self.token_ids)

    def fork(self, n=1, at=None):
        at = self.num_tokens if at is None else at
        if not 1 <= at <= self.num_tokens:
            raise InvalidArgument(f"fork: at must be a position in 1..{self.num_tokens}, got {at}")
        core, made = self.engine.core, []
        for _ in range(n):
            pages = core.pages_of[self.handle][: math.ceil(at / core.page_size)]
            made.append(FakeBranch(self.engine, core.make(self.token_ids[:at], pages), self))
            self.engine.trace.append("fork", made[-1].id, {"parent": self.id, "position": at})
        return made

    def extend(self, tokens, logprobs=None):
        ids = self.engine.tokenizer.encode(tokens) if isinstance(tokens, str) else list(tokens)
        self.engine.core.append(self.handle, ids)
        self.logprobs += logprobs or [None] * len(ids)
        data = {"tokens": ids, "logprobs": logprobs, "forced": logprobs is None}
        self.engine.trace.append("extend", self.id, data)
        return self

    def rollback(self, n):
        keep = self.num_tokens - n
        freed = self.engine.core.cut(self.handle, keep)
        del self.logprobs[keep:]
        self.engine.trace.append("rollback", self.id, {"to": keep})
        return freed

    def prune(self):
        if not self.is_alive:
            return 0
        del self.engine._branches[self.id]
        freed = self.engine.core.cut(self.handle, 0)
        del self.engine.core.pages_of[self.handle], self.engine.core.tokens_of[self.handle]
        self.engine.trace.append("prune", self.id, {"pages_freed": freed})
        return freed


@dataclass
class FakeJob:
    """A job that advances when `FakeEngine.step` is called."""

    branches: list
    params: list
    on_event: object = None
    done: bool = False
    cancelled: bool = False

    def cancel(self):
        self.cancelled = True


class FakeEngine:
    """Generates canned words, one token a branch for each `step()`, or on a thread by `run()`."""

    model_path = "fake-model"

    def __init__(self, **core):
        self.core = FakeCore(**core)
        self.tokenizer = FakeTokenizer()
        self.trace = Trace()
        self._branches = {}
        self.jobs: list[FakeJob] = []
        self.lock = threading.Lock()
        self.next_id = itertools.count(1).__next__
        self.generated = 0

    @property
    def branches(self):
        return [self._branches[key] for key in sorted(self._branches)]

    def branch(self, branch_id):
        if branch_id not in self._branches:
            raise StaleBranch(f"no live branch has id {branch_id}")
        return self._branches[branch_id]

    def prompt(self, prompt):
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        handle = self.core.make([])
        self.core.append(handle, ids)
        branch = FakeBranch(self, handle)
        branch.logprobs = [None] * len(ids)
        self.trace.append("prompt", branch.id, {"tokens": ids, "cached": 0})
        return branch

    def submit(self, branches, params, *, on_event=None, priority=0):
        del priority
        rows = params if isinstance(params, list) else [params] * len(branches)
        job = FakeJob(list(branches), [row.max_tokens for row in rows], on_event)
        for branch in branches:
            branch.is_generating = True
        self.trace.append("job", 0, {"state": "start", "branches": [b.id for b in branches]})
        self.jobs.append(job)
        return job

    def step(self):
        """One token for every branch that generates; returns whether anything still does."""
        for job in [job for job in self.jobs if not job.done]:
            for index, branch in enumerate(job.branches):
                self._advance(job, index, branch)
            job.done = not any(branch.is_generating for branch in job.branches)
        return any(not job.done for job in self.jobs)

    def _advance(self, job, index, branch):
        if not branch.is_generating:
            return
        reason = "cancelled" if job.cancelled else None if branch.is_alive else "stale"
        token = None
        if reason is None:
            word = WORDS[(branch.id * 7 + branch.num_tokens * 3) % len(WORDS)]
            token = self.tokenizer.encode("a " + word)[1]
            branch.extend([token], [-0.1 - (token % 5)])
            self.generated += 1
            job.params[index] -= 1
            reason = "length" if job.params[index] <= 0 else None
        if reason is not None:
            branch.is_generating = False
        if job.on_event is not None:
            job.on_event(TokenEvent(branch, token, "", None, (), reason))

    def finish(self):
        """Run all jobs to their end."""
        while self.step():
            pass

    def top_tokens(self, branches, k):
        ids = [self.tokenizer.encode("a " + word)[1] for word in WORDS[:k]]
        row = [TokenAlternative(t, self.tokenizer.piece(t), -0.5 - i) for i, t in enumerate(ids)]
        return [row for _ in branches]

    def complete(self, branches, params):
        self.submit(branches, params)
        self.finish()
        return [Completion(branch) for branch in branches]

    def stats(self):
        core = self.core.stats()
        return SimpleNamespace(
            **{name: core[name] for name in ("pages_total", "pages_free", "pages_live")},
            **{name: core[name] for name in ("pages_shared", "pages_cached", "branches")},
            cow_copies=core["cow_copies"],
            page_bytes=1024,
            bytes_total=1024 * 64,
            kv_format="fp32",
            bytes_live=core["pages_live"] * 1024,
            bytes_shared=core["pages_shared"] * 1024,
            bytes_saved=0,
            refcount_histogram=self.core.refcount_histogram(),
            tokens_generated=self.generated,
            step_ms_last=1.0,
            step_ms_p50=1.0,
            jobs_running=sum(not job.done for job in self.jobs),
        )
