"""Branch: a handle to one path of the live tree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dendrite_engine.errors import InvalidArgument, StaleBranch
from dendrite_engine.sampling import child_key
from dendrite_engine.tree.guided import GuidedBranch

if TYPE_CHECKING:
    import torch

    from dendrite_engine.tree.host import BranchHost
    from dendrite_engine.types import LogitsEpoch

MAX_FORKS_PER_CALL = 65_536


class LogitsRow(NamedTuple):
    """Next-token logits of a branch while it held `num_tokens` tokens."""

    num_tokens: int
    tensor: torch.Tensor  # fp32 [R, vocab]
    row: int
    epoch: LogitsEpoch | None = None  # None: the tensor is never overwritten

    @property
    def is_current(self) -> bool:
        """Whether the tensor still holds these logits; copy the row to keep them longer."""
        return self.epoch is None or self.epoch.is_current


class Branch(GuidedBranch):
    """A handle to one path of the live tree: its tokens, and their K/V in shared pages.

    Made by `Engine.prompt` and `Branch.fork`, never directly. A branch lives until `prune`; the
    engine keeps it until then, whether or not Python code still refers to it.

    Attributes:
        engine: the engine that owns it.
        id: small integer, unique in the engine and never reused.
        parent: the branch it was forked from, or None.
        depth: forks between it and its prompt.
        fork_position: tokens it shared with its parent when it was made (0 for a prompt).
        label: free text for people; shown by the explorer.
    """

    __slots__ = (
        "__weakref__",
        "_busy",
        "_children",
        "_core",
        "_guide",
        "_handle",
        "_key",
        "_logits",
        "_num_forks",
        "_ordinal",
        "depth",
        "engine",
        "fork_position",
        "id",
        "label",
        "parent",
    )

    def __init__(self, engine: BranchHost, handle: int, parent: Branch | None = None) -> None:
        self.engine: Any = engine
        self._core = engine.core
        self._handle: int = handle
        self.parent = parent
        self.id = engine._new_branch_id()
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.fork_position = 0 if parent is None else self._core.num_tokens(handle)
        self.label = ""
        self._children: dict[int, Branch] | None = None
        self._num_forks = 0
        self._ordinal = 0
        self._key: int | None = None
        self._busy = False
        self._logits: LogitsRow | None = None
        self._guide: Any = None if parent is None else parent._guide  # grammar, see tree.guided

    # -- verbs --------------------------------------------------------------------------------

    def fork(self, n: int = 1, at: int | None = None) -> list[Branch]:
        """Make `n` children that share this branch's tokens and pages.

        O(1) in context length: no page is taken and no byte copied. A child that later diverges
        inside a page copies that one page.

        Args:
            n: number of children, at least 1.
            at: fork after this many tokens instead of at the end: 1..num_tokens. O(pages of one
                segment).

        Raises:
            StaleBranch: this branch was pruned.
            InvalidArgument: n or at is out of range.
            BudgetExceeded: the engine's `max_branches` would be exceeded.
        """
        if n == 1 and at is None and n is not True:
            return [self._fork_at_end()]
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_FORKS_PER_CALL:
            raise InvalidArgument(
                f"fork: n must be an integer in 1..{MAX_FORKS_PER_CALL}, got {n!r}"
            )
        if at is None:
            return [self._fork_at_end() for _ in range(n)]
        self._check_alive()
        held = self.num_tokens
        if not isinstance(at, int) or isinstance(at, bool) or not 1 <= at <= held:
            raise InvalidArgument(f"fork: at must be a position in 1..{held}, got {at!r}")
        logits = self._logits if at == held else None
        return [self._adopt(self._core.fork_at(self._handle, at), logits) for _ in range(n)]

    def extend(
        self, tokens: str | Sequence[int], logprobs: Sequence[float] | None = None
    ) -> Branch:
        """Append forced tokens (text is encoded first); their K/V are computed when next needed.

        Returns this branch. Takes the pages for all of them or none.

        Args:
            tokens: text, or token ids.
            logprobs: one log-probability per token, for tokens that an algorithm chose itself; they
                count as generated then.

        Raises:
            StaleBranch: this branch was pruned.
            InvalidArgument: nothing to append, an id outside the vocabulary, or the branch is
                generating.
            ContextTooLong: the model's context would be exceeded.
            GrammarError: the branch's grammar does not allow them; nothing was changed.
            OutOfPages: the pool can't hold them; nothing was changed.
        """
        self._check_idle("extend")
        ids = self.engine.tokenizer.encode(tokens) if isinstance(tokens, str) else tokens
        ids = self.engine._check_tokens(ids, self.num_tokens)
        values = None if logprobs is None else [float(value) for value in logprobs]
        if values is not None and (len(values) != len(ids) or not all(map(math.isfinite, values))):
            raise InvalidArgument(
                f"extend: logprobs must be {len(ids)} finite numbers, one per token, got {logprobs}"
            )
        guide = None if self._guide is None else self.engine.grammars.after(self, ids)
        self._core.append(
            self._handle, ids, None if values is None else np.array(values, np.float32)
        )
        self._logits, self._guide = None, guide
        data = {"tokens": ids, "logprobs": values, "forced": values is None}
        self.engine.trace.append("extend", self.id, data)
        return self

    def rollback(self, n: int) -> int:
        """Drop the last `n` tokens of this branch; other branches that share them keep them.

        Returns the number of pages freed.

        Raises:
            StaleBranch: this branch was pruned.
            InvalidArgument: n is not in 1..num_tokens-1, or the branch is generating.
        """
        self._check_idle("rollback")
        held = self.num_tokens
        if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n < held:
            raise InvalidArgument(f"rollback: n must be an integer in 1..{held - 1}, got {n!r}")
        self._logits = None
        freed: int = self._core.rollback(self._handle, n)
        if self._guide is not None:
            self._guide = self._guide.cut(held - n)
        self.engine.trace.append("rollback", self.id, {"to": held - n})
        return freed

    def prune(self, *, subtree: bool = False) -> int:
        """Drop this branch and free the pages that only it held; returns how many.

        Children keep their tokens and pages. Pruning a dead branch again does nothing. A generating
        branch ends with finish_reason "stale". Cost: the segments and pages freed.

        Args:
            subtree: prune every descendant as well.
        """
        freed = 0
        if subtree:
            for branch in reversed(self.descendants()):
                freed += branch.prune()
        if not self.engine._unregister(self):
            return freed
        pages: int = self._core.prune(self._handle)
        self._logits = self._guide = None
        if self.parent is not None and self.parent._children is not None:
            self.parent._children.pop(self.id, None)
        self.engine.trace.append("prune", self.id, {"pages_freed": pages})
        return freed + pages

    # -- what it holds ------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        """Whether the branch can still be used."""
        return self.id in self.engine._branches

    @property
    def handle(self) -> int:
        """The core's handle, for the read-only views of `engine.core` (segments, page_tables)."""
        return self._handle

    @property
    def is_generating(self) -> bool:
        """Whether a running job advances this branch."""
        return self._busy

    @property
    def num_tokens(self) -> int:
        """Tokens on the path from the root to the end of this branch."""
        try:
            held: int = self._core.num_tokens(self._handle)
        except StaleBranch:
            raise self._stale() from None
        return held

    @property
    def token_ids(self) -> list[int]:
        """All token ids, prompt included."""
        return self._tokens(0)

    @property
    def own_token_ids(self) -> list[int]:
        """Token ids after `fork_position`."""
        return self._tokens(self.fork_position)

    @property
    def text(self) -> str:
        """All of its text, prompt and special tokens included."""
        text: str = self.engine.tokenizer.decode(self.token_ids)
        return text

    @property
    def own_text(self) -> str:
        """Text of the tokens after `fork_position`, special tokens left out."""
        text: str = self.engine.tokenizer.decode(self.own_token_ids, skip_special=True)
        return text

    @property
    def logprobs(self) -> list[float | None]:
        """One entry per token: its log-probability when it was generated, None when it was
        given.
        """
        self._check_alive()
        # evaluators read long branches often: all values leave the array in one call
        values = self._core.logprobs(self._handle).tolist()
        return [value if value == value else None for value in values]

    @property
    def cum_logprob(self) -> float:
        """Sum of the log-probabilities of all generated tokens on the path."""
        return sum(value for value in self.logprobs if value is not None)

    @property
    def children(self) -> tuple[Branch, ...]:
        """Live branches forked from this one, oldest first."""
        return tuple(self._children.values()) if self._children else ()

    def descendants(self) -> list[Branch]:
        """Every live branch below this one, parents before children."""
        found: list[Branch] = []
        stack = list(reversed(self.children))
        while stack:
            branch = stack.pop()
            found.append(branch)
            stack.extend(reversed(branch.children))
        return found

    @property
    def pages(self) -> int:
        """Pages that hold its tokens, shared ones included."""
        return self._describe("pages")

    @property
    def owned_pages(self) -> int:
        """Pages that pruning it now would free."""
        return self._describe("owned_pages")

    @property
    def path_key(self) -> int:
        """64-bit key of its path of forks; with seed and position it fixes every draw."""
        chain: list[Branch] = []
        branch: Branch | None = self
        while branch is not None and branch._key is None:
            chain.append(branch)
            branch = branch.parent
        key = 0 if branch is None else branch._key or 0
        for link in reversed(chain):
            key = 0 if link.parent is None else child_key(key, link.fork_position, link._ordinal)
            link._key = key
        return key

    def __repr__(self) -> str:
        if not self.is_alive:
            return f"Branch(id={self.id}, pruned)"
        parent = "" if self.parent is None else f", parent={self.parent.id}"
        return f"Branch(id={self.id}, tokens={self.num_tokens}{parent})"

    # -- inside -------------------------------------------------------------------------------

    def _fork_at_end(self) -> Branch:
        """The O(1) path; written out because it is called hundreds of thousands of times a
        second.
        """
        engine = self.engine
        try:
            handle = self._core.fork(self._handle)
        except StaleBranch:
            raise self._stale() from None
        child = Branch.__new__(Branch)
        child.engine = engine
        child._core = self._core
        child._handle = handle
        child.parent = self
        child.depth = self.depth + 1
        child.id = child_id = engine._next_id()
        child.fork_position = position = self._core.num_tokens(handle)
        child.label = ""
        child._children = None
        child._num_forks = 0
        child._ordinal = self._num_forks
        child._key = None
        child._busy = False
        child._logits = self._logits
        child._guide = self._guide
        engine._register(child)
        self._num_forks += 1
        children = self._children
        if children is None:
            self._children = {child_id: child}
        else:
            children[child_id] = child
        engine.trace._append(
            (perf_counter_ns(), "fork", child_id, {"parent": self.id, "position": position})
        )
        return child

    def _adopt(self, handle: int, logits: LogitsRow | None) -> Branch:
        """Wrap a core handle that was forked inside this branch, or at its end with its logits."""
        child = Branch(self.engine, handle, parent=self)
        child._ordinal = self._num_forks
        self.engine._register(child)
        self._num_forks += 1
        child._logits = logits
        if child._guide is not None:
            child._guide = child._guide.cut(child.fork_position)
        if self._children is None:
            self._children = {}
        self._children[child.id] = child
        data = {"parent": self.id, "position": child.fork_position}
        self.engine.trace.append("fork", child.id, data)
        return child

    def _tokens(self, start: int) -> list[int]:
        try:
            ids: list[int] = self._core.tokens(self._handle, start).tolist()
        except StaleBranch:
            raise self._stale() from None
        return ids

    def _describe(self, column: str) -> int:
        self._check_alive()
        return int(self._core.describe(np.array([self._handle], np.int64))[column][0])

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise self._stale()

    def _check_idle(self, verb: str) -> None:
        self._check_alive()
        if self._busy:
            raise InvalidArgument(
                f"{verb}: branch {self.id} is generating; cancel its job, or fork it and work on "
                "the fork"
            )

    def _stale(self) -> StaleBranch:
        return StaleBranch(f"branch {self.id} was pruned; its tokens and pages are gone")
