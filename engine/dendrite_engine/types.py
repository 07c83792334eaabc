"""Small value types that travel between the layers and to the user."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

FinishReason = Literal[
    "stop",  # a stop string or stop token id was produced, or the grammar is complete
    "eos",  # the model ended its turn
    "length",  # max_tokens was reached
    "cancelled",  # the job was cancelled
    "out_of_pages",  # the page pool could not hold the next token
    "context_full",  # the model's context is used up
    "dead_end",  # the branch's grammar allows no token here: nothing was sampled
    "grammar_error",  # the branch's grammar failed or ran out of fuel: nothing was sampled
    "numeric_error",  # NaN or Inf logits: nothing was sampled
    "stale",  # the branch was pruned while it generated
    "error",  # the step failed; `error` says why
]


class TokenAlternative(NamedTuple):
    """One candidate for a position.

    Attributes:
        token_id: vocabulary id.
        text: the token as text (may be part of a UTF-8 sequence; shown with U+FFFD then).
        logprob: natural log of the model's probability, before temperature and filters.
    """

    token_id: int
    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of one branch, as streamed by `Engine.generate`.

    Attributes:
        branch: the branch that advanced.
        token_id: the new token, or None when the branch ended without one.
        text: newly complete text; empty while a multi-byte character is still incomplete.
        logprob: log-probability of the token under the unmodified model.
        top: the `SamplingParams.logprobs` most likely tokens of this position.
        finish_reason: set on the last event of the branch.
        error: the exception behind `finish_reason` where there is one.
    """

    branch: Branch
    token_id: int | None
    text: str
    logprob: float | None = None
    top: tuple[TokenAlternative, ...] = ()
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(slots=True)
class Completion:
    """What one branch produced in one job.

    Attributes:
        branch: the branch, now holding these tokens.
        token_ids: the new tokens, in order.
        text: their text, special tokens left out.
        logprobs: one log-probability a token.
        finish_reason: why it ended.
        error: the exception behind it where there is one.
    """

    branch: Branch
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: Exception | None = None

    @property
    def cum_logprob(self) -> float:
        """Sum of the log-probabilities of the new tokens."""
        return sum(self.logprobs)


@dataclass(slots=True, eq=False)
class LogitsEpoch:
    """The time during which logits stay in a buffer that a later forward pass overwrites.

    Attributes:
        is_current: set to False by the runner just before it overwrites them.
    """

    is_current: bool = True


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What drafting has brought.

    Attributes:
        steps: times a branch's draft was verified.
        proposed: guessed tokens that were computed.
        accepted: those of them that the branch kept; each saved it one step.
        no_room: guesses left out because the page pool was full.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    no_room: int = 0

    @property
    def accept_rate(self) -> float:
        """Share of the guesses that were kept; 0 before the first."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def steps_saved(self) -> int:
        """Decode steps that branches did not have to wait for."""
        return self.accepted

    def plus(self, other: DraftCounts) -> DraftCounts:
        """Both together."""
        return DraftCounts(
            self.steps + other.steps,
            self.proposed + other.proposed,
            self.accepted + other.accepted,
            self.no_room + other.no_room,
        )


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What speculative decoding has brought to an engine.

    Attributes:
        total: all branches together.
        branches: by branch id, the last 1024 branches that were drafted for.
    """

    total: DraftCounts = field(default_factory=DraftCounts)
    branches: dict[int, DraftCounts] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A reading of the engine's counters. Pages are counts; bytes are K and V of all layers.

    Attributes:
        pages_total: the budget.
        pages_free: on the free list.
        pages_live: held by branches.
        pages_shared: live pages below which more than one branch hangs.
        pages_cached: held only by the prefix index; evicted when pages run short.
        refcount_histogram: branches below a page -> number of live pages.
        branches: live branch handles.
        segments: segments in the tree.
        forks: forks made so far.
        prunes: branches pruned so far.
        cow_copies: pages copied because a branch diverged inside them.
        evictions: cached pages given back so far.
        prefix_hit_tokens: prompt tokens that were found in the prefix index.
        kv_format: how pages store K and V.
        page_bytes: bytes of one page.
        bytes_total: bytes of the pool.
        bytes_live: bytes of the live pages.
        bytes_shared: bytes of the shared pages.
        bytes_saved: bytes that copies for every branch would take on top of bytes_live.
        steps: forward passes so far.
        tokens_computed: rows that went through the model.
        tokens_generated: tokens sampled.
        step_ms_p50: median time of the last 256 forward passes, in ms (0 before the first).
        step_ms_last: time of the last forward pass whose time is known, in ms.
        jobs_running: jobs that still generate.
        graph_steps: forward passes that were replays of captured CUDA graphs.
        host_ms_last: what the engine thread spent on launching the last forward pass, in ms.
        speculation: what guessed tokens were worth.
        mask_us_p50: median time of filling one grammar mask, over the last 256 fills, in
            microseconds; a fill of several branches counts as its time divided by their number.
        mask_wait_us_p50: median time that sampling waited for masks, in microseconds.
        tokens_forced: tokens that a grammar left no choice for, appended without sampling.
        grammars_cached: compiled grammars in the cache.
    """

    pages_total: int
    pages_free: int
    pages_live: int
    pages_shared: int
    pages_cached: int
    refcount_histogram: dict[int, int]
    branches: int
    segments: int
    forks: int
    prunes: int
    cow_copies: int
    evictions: int
    prefix_hit_tokens: int
    page_bytes: int
    bytes_live: int
    bytes_shared: int
    bytes_saved: int
    steps: int
    tokens_computed: int
    tokens_generated: int
    step_ms_p50: float
    step_ms_last: float
    jobs_running: int
    graph_steps: int = 0
    host_ms_last: float = 0.0
    kv_format: str = ""
    bytes_total: int = 0
    speculation: SpeculationStats = field(default_factory=SpeculationStats)
    mask_us_p50: float = 0.0
    mask_wait_us_p50: float = 0.0
    tokens_forced: int = 0
    grammars_cached: int = 0
