"""Every error that the engine raises on purpose.

All derive from `DendriteError`; those about a bad argument also derive from `ValueError`. A message
says what happened, gives the numbers, and says what to do.
"""

from __future__ import annotations


class DendriteError(Exception):
    """Base of every error raised by dendrite_engine and dendrite_lab."""


class InvalidArgument(DendriteError, ValueError):
    """An argument is outside what the call accepts; the message names it and gives the value."""


class EmptyPrompt(InvalidArgument):
    """A prompt has no tokens."""


class ContextTooLong(InvalidArgument):
    """The tokens would not fit the model's context.

    Attributes:
        num_tokens: tokens asked for.
        max_context: tokens that the model can hold.
    """

    def __init__(self, message: str, *, num_tokens: int = 0, max_context: int = 0) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens
        self.max_context = max_context


class UnknownName(InvalidArgument):
    """A registry was asked for a name it does not hold; the message lists those it does."""


class OutOfPages(DendriteError):
    """The page pool can't give the pages asked for, even after evicting every cached prefix.

    Nothing was changed. Prune branches, raise `kv_budget`, or ask for less.

    Attributes:
        need: pages asked for.
        free: pages on the free list.
        cached: pages held only by the prefix index (evictable).
        live: pages held by branches.
        budget: pages in the pool.
    """

    def __init__(
        self, need: int, free: int, cached: int, live: int, budget: int, hint: str = ""
    ) -> None:
        text = (
            f"out of pages: {need} needed, {free} free + {cached} cached of a budget of {budget} "
            f"({live} held by live branches); prune branches, or raise kv_budget / num_pages"
        )
        super().__init__(f"{text}. {hint}" if hint else text)
        self.need = need
        self.free = free
        self.cached = cached
        self.live = live
        self.budget = budget


class BudgetExceeded(DendriteError):
    """A hard limit set by the user (branches, nodes, tokens, seconds) was reached."""


class StaleBranch(DendriteError):
    """A branch was used after it was pruned, or given to an engine it does not belong to."""


class NoProgress(DendriteError):
    """No branch can advance; the message lists who holds the pages."""


class NumericError(DendriteError):
    """The model produced NaN or Inf logits for a branch; it was ended, nothing was sampled."""


class InvalidGrammar(InvalidArgument):
    """A grammar was refused when it was to be attached: malformed, unsatisfiable, too large or too
    slow to compile. Nothing was attached or allocated.
    """


class GrammarError(DendriteError):
    """The grammar of a branch can't say what may come next: its matcher failed or ran out of fuel,
    or the branch holds tokens that the grammar does not allow. Only that branch is concerned.
    """


class DeadEnd(GrammarError):
    """The grammar of a branch allows no token at all here; the branch was ended, nothing was
    sampled.
    """


class IntegrityError(DendriteError):
    """A recount of references disagrees with the books: a bug in the engine. Please report it."""


class ModelError(DendriteError):
    """A model directory can't be used: missing file, refused format, or unknown architecture."""


class DownloadError(ModelError):
    """A model is neither in the cache nor reachable over the network."""


class DeviceError(DendriteError):
    """The device failed (a CUDA error); the engine refuses further calls with the first error."""


class BackendUnavailable(DendriteError):
    """An attention backend can't run here; the text says why. The engine takes another one and
    reports it.
    """


class EngineClosed(DendriteError):
    """The engine was closed, or stopped by an earlier error that the message repeats."""


class SearchError(DendriteError):
    """A search was configured or driven in a way it can't serve."""


class SnapshotRejected(DendriteError):
    """A snapshot file can't be used; nothing was changed and no page was touched.

    Attributes:
        field: what is wrong with it: `format`, `kind`, `schema`, `length`, `checksum`, `model`, or
            the path of a value inside it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"snapshot rejected, {field}: {message}")
        self.field = field
