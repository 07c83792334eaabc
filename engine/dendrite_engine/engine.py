"""Engine: the facade over model, pages and tree."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dendrite_engine.build import Parts, build_parts
from dendrite_engine.config import EngineConfig
from dendrite_engine.errors import (
    BudgetExceeded,
    ContextTooLong,
    InvalidArgument,
    StaleBranch,
)
from dendrite_engine.jobs import EventCallback, Job
from dendrite_engine.requests import (
    Params,
    Prompt,
    check_params,
    check_tokens,
    drain,
    encode_prompt,
    open_guessing,
    wait_for,
)
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.snapshots.host import SavesBranches
from dendrite_engine.trace import Trace
from dendrite_engine.tree.branch import Branch
from dendrite_engine.types import Completion, EngineStats, TokenAlternative, TokenEvent

if TYPE_CHECKING:
    from dendrite_engine.models.config import ModelConfig
    from dendrite_engine.models.tokenizer import Tokenizer
    from dendrite_engine.search.budget import Budget
    from dendrite_engine.search.handle import SearchHandle
    from dendrite_engine.speculation.base import Speculation

DEFAULT_MODEL = "smollm2-135m-instruct"


class Engine(SavesBranches):
    """A language model whose unit of work is a tree of branches.

    Make one with `Engine.from_pretrained`. All methods may be called from any thread; the model
    runs on one thread of its own. Engines are independent of each other.

    Attributes:
        config: the settings.
        model_config: shape and arithmetic of the model.
        model_path: local directory the weights came from.
        tokenizer: text to ids and back.
        trace: append-only log of everything that happened.
        core: the page pool and segment tree (native, or its Python twin).
        max_context: tokens a branch may hold.
        grammars: compiles and attaches grammars, see `Branch.constrain`.

    Example:
        >>> engine = Engine.from_pretrained()                              # doctest: +SKIP
        >>> a, b = engine.prompt("Once upon a time").fork(2)               # doctest: +SKIP
        >>> for event in engine.generate([a, b], SamplingParams(max_tokens=8)):  # doctest: +SKIP
        ...     print(event.branch.id, event.text)
    """

    def __init__(self, parts: Parts, config: EngineConfig) -> None:
        self.config = config
        self.model_config: ModelConfig = parts.model_config
        self.model_path: Path = parts.model_path
        self.tokenizer: Tokenizer = parts.tokenizer
        self.trace: Trace = parts.trace
        self.core = parts.core
        self.max_context = parts.max_context
        self.grammars = parts.grammars
        self._parts = parts
        self._loop = parts.loop
        self._branches: dict[int, Branch] = {}
        self._next_id = itertools.count(1).__next__
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, parts.loop.stop)

    @classmethod
    def from_pretrained(cls, model: str | Path = DEFAULT_MODEL, **options: Any) -> Engine:
        """Load a model and make its page pool.

        Args:
            model: "smollm2-135m-instruct" (the built-in default, fetched once), a local Hugging
                Face directory, or a hub id. Weights are read from safetensors only; code in a model
                repository is never run.
            **options: fields of `EngineConfig`.

        Raises:
            ModelError: the model can't be used (missing, refused format, unknown architecture).
            DownloadError: it is neither cached nor reachable.
            InvalidArgument: an option is unknown or out of range.
        """
        known = EngineConfig.__dataclass_fields__
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise InvalidArgument(
                f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        config = EngineConfig(**options)
        return cls(build_parts(model, config), config)

    # -- branches -----------------------------------------------------------------------------

    def prompt(self, prompt: Prompt, *, namespace: str = "", priority: int = 0) -> Branch:
        """A new root branch holding `prompt`, prefilled; reuses the longest cached prefix.

        Args:
            prompt: text, token ids, or chat messages (dicts with "role" and "content").
            namespace: prompts only reuse pages of prompts in the same namespace.
            priority: of the prefill against other running jobs.

        Raises:
            EmptyPrompt, ContextTooLong, InvalidArgument: the prompt can't be used.
            OutOfPages: the pool can't hold it; nothing was changed.
        """
        ids = self._check_tokens(encode_prompt(prompt, self.tokenizer), 0)
        self._check_branch_budget()
        handle, cached = self.core.create(ids, namespace)
        branch = Branch(self, handle)
        self._register(branch)
        self.trace.append("prompt", branch.id, {"tokens": ids, "cached": cached})
        try:
            self._compute([branch], priority=priority)
        except BaseException:
            branch.prune()
            raise
        return branch

    @property
    def branches(self) -> list[Branch]:
        """Every live branch, oldest first."""
        return [branch for _, branch in sorted(self._branches.copy().items())]

    def branch(self, branch_id: int) -> Branch:
        """The live branch of this id.

        Raises:
            StaleBranch: it was pruned, or there never was one.
        """
        branch = self._branches.get(branch_id)
        if branch is None:
            raise StaleBranch(f"no live branch has id {branch_id!r}")
        return branch

    def prune_all(self) -> int:
        """Prune every live branch; returns the pages freed."""
        return sum(branch.prune() for branch in reversed(self.branches))

    # -- generation ---------------------------------------------------------------------------

    def submit(
        self,
        branches: Branch | Sequence[Branch],
        params: Params = None,
        *,
        on_event: EventCallback | None = None,
        priority: int = 0,
        values: Sequence[float] | None = None,
        speculate: Speculation | None = None,
    ) -> Job:
        """Start generating on `branches`, all in one batch per step, and return at once.

        Args:
            branches: live branches of this engine, each at most once and not already generating.
            params: one SamplingParams for all, or one per branch.
            on_event: called with every TokenEvent on the engine thread; it must only enqueue.
            priority: higher runs first when not everything fits one step.
            values: one number per branch; among equally patient branches, higher runs first.
            speculate: how to guess tokens, as in `PromptLookup()`; they are the same, but sooner.

        Raises:
            StaleBranch: a branch was pruned or belongs to another engine.
            InvalidArgument: a branch is listed twice or already generating, or params do not match.
        """
        targets = [branches] if isinstance(branches, Branch) else list(branches)
        rows = check_params(params, len(targets), self.model_config.vocab_size)
        for branch in targets:
            self._check_own(branch)
            if branch.num_tokens >= self.max_context:
                raise ContextTooLong(
                    f"branch {branch.id} holds {branch.num_tokens} tokens, the whole context of "
                    f"{self.max_context}; roll it back first",
                    num_tokens=branch.num_tokens,
                    max_context=self.max_context,
                )
        if values is not None and len(values) != len(targets):
            raise InvalidArgument(f"{len(targets)} branches but {len(values)} values")
        options: dict[str, Any] = {"on_event": on_event, "priority": priority, "values": values}
        return self._start(Job(targets, rows, guessing=open_guessing(speculate, self), **options))

    def generate(
        self, branches: Branch | Sequence[Branch], params: Params = None, **options: Any
    ) -> Iterator[TokenEvent]:
        """Generate on `branches` and yield each TokenEvent as it comes, with the options of
        `submit`. Leaving the loop early cancels the job; the branches keep what they have.
        """
        events: queue.SimpleQueue[TokenEvent | None] = queue.SimpleQueue()
        job = self.submit(branches, params, on_event=events.put, **options)
        job.add_done_callback(lambda _: events.put(None))
        return drain(job, events)

    async def agenerate(
        self, branches: Branch | Sequence[Branch], params: Params = None, **options: Any
    ) -> AsyncIterator[TokenEvent]:
        """`generate` for asyncio, with the same options."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent | None] = asyncio.Queue()

        def put(event: TokenEvent | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        job = self.submit(branches, params, on_event=put, **options)
        job.add_done_callback(lambda _: put(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            job.result()
        finally:
            job.cancel()

    def complete(
        self, branches: Branch | Sequence[Branch], params: Params = None, **options: Any
    ) -> list[Completion]:
        """Generate on `branches` with the options of `submit`, wait, and return what came."""
        return wait_for(self.submit(branches, params, **options))

    def top_tokens(self, branches: Sequence[Branch], k: int) -> list[list[TokenAlternative]]:
        """The `k` most likely next tokens of each branch, most likely first; one forward at most.

        Of a branch with a grammar only tokens that it allows, which may be fewer than `k`.

        Raises:
            InvalidArgument: k is not in 1..vocab_size.
            GrammarError: a branch's grammar can't say what it allows.
            StaleBranch: a branch was pruned or belongs to another engine.
        """
        most = self.model_config.vocab_size
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= most:
            raise InvalidArgument(f"k must be in 1..{most}, got {k!r}")
        for branch in branches:
            self._check_own(branch)
        return self._compute(branches, top_k=k, masks=self.grammars.masks(branches)).alternatives

    def extend(
        self,
        branches: Sequence[Branch],
        tokens: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float] | None] | None = None,
    ) -> None:
        """`Branch.extend` for several branches; stops at the first that fails."""
        values = [None] * len(branches) if logprobs is None else list(logprobs)
        if not len(branches) == len(tokens) == len(values):
            raise InvalidArgument(
                f"{len(branches)} branches but {len(tokens)} token lists and {len(values)} of "
                "log-probabilities"
            )
        for branch, ids, row in zip(branches, tokens, values, strict=True):
            self._check_own(branch)
            branch.extend(ids, row)

    def search(
        self,
        root: Branch,
        algorithm: Any,
        budget: Budget | None = None,
        *,
        evaluator: Callable[[Sequence[Branch]], Any] | None = None,
        params: SamplingParams | None = None,
        **options: Any,
    ) -> SearchHandle:
        """Start a search from `root` and return its handle at once; see `search`."""
        from dendrite_engine.search import start_search

        self._check_own(root)
        return start_search(
            self, root, algorithm, budget, evaluator=evaluator, params=params, **options
        )

    def resume_search(self, path: str | Path, **options: Any) -> SearchHandle:
        """Go on with a search that `SearchHandle.save` wrote; see `search.resume_search`."""
        from dendrite_engine.search import resume_search

        return resume_search(self, path, **options)

    # -- state --------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """A reading of all counters; cheap."""
        return self._parts.read_stats()

    def check_integrity(self) -> None:
        """Recount every reference and, in debug mode, every page checksum.

        Raises:
            IntegrityError: the first thing that does not add up.
        """
        self.core.check_integrity()
        if self._parts.guard is not None:
            self._loop.call(self._parts.verify_guard)

    def report(self) -> dict[str, str]:
        """Which implementation runs each part, and why."""
        return self._parts.read_report()

    @property
    def is_closed(self) -> bool:
        """Whether the engine was closed; branches can be read, but nothing is computed any more."""
        return self._loop.is_closed

    def close(self) -> None:
        """End the engine thread; running jobs fail with EngineClosed. Safe to call twice."""
        self._finalizer.detach()  # it would keep all of this in memory
        self._loop.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        stats = self.core.stats()
        return (
            f"Engine({self.model_path.name}, {stats['branches']} branches, "
            f"{stats['pages_live']} of {stats['pages_total']} pages live)"
        )

    # -- inside (BranchHost) ------------------------------------------------------------------

    def _new_branch_id(self) -> int:
        return self._next_id()

    def _register(self, branch: Branch) -> None:
        branches = self._branches
        if len(branches) >= self.config.max_branches:
            self.core.prune(branch._handle)
            self._check_branch_budget()
        branches[branch.id] = branch

    def _unregister(self, branch: Branch) -> bool:
        """True for the one caller that ends the branch's life."""
        return self._branches.pop(branch.id, None) is not None

    def _check_branch_budget(self) -> None:
        if len(self._branches) >= self.config.max_branches:
            raise BudgetExceeded(
                f"max_branches: {self.config.max_branches} branches are live already; prune some"
            )

    def _check_tokens(self, token_ids: Sequence[int], held: int) -> list[int]:
        """Ids as a list, inside the vocabulary and within the context."""
        return check_tokens(token_ids, held, self.model_config.vocab_size, self.max_context)

    def _check_own(self, branch: Branch) -> None:
        if not isinstance(branch, Branch):
            raise InvalidArgument(f"expected a Branch, got {type(branch).__name__}")
        if branch.engine is not self:
            raise StaleBranch(f"branch {branch.id} belongs to another engine")
        branch._check_alive()

    def _compute(self, branches: Sequence[Branch], **options: Any) -> Job:
        """Make next-token logits available for `branches` and wait."""
        job = self._start(Job(branches, None, **options))
        for completion in wait_for(job):
            if completion.error is not None:
                raise completion.error
        return job

    def _start(self, job: Job) -> Job:
        with self._lock:
            seen: set[int] = set()
            for branch in job.branches:
                if branch.id in seen:
                    raise InvalidArgument(f"branch {branch.id} is listed twice")
                seen.add(branch.id)
                if branch._busy:
                    raise InvalidArgument(
                        f"branch {branch.id} is already generating; wait for its job, cancel it, "
                        "or fork"
                    )
            for branch in job.branches:
                branch._busy = True
        try:
            self._loop.submit(job)
        except BaseException:
            for branch in job.branches:
                branch._busy = False
            raise
        return job
