"""Runs: what each branch contributed to the tree, folded from the engine's event log.

A branch contributes the tokens from its fork position to its end: that is its run. Pruned branches
whose tokens live on below them stay as runs without a handle, as do tokens that a branch rolled
back from but its children still hold (a ghost run). Nothing here calls the engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dendrite_engine.trace import Event

UNKNOWN_TOKEN = -1
MAX_SPLIT_CHAR = 8  # tokens that one multi-byte character may be spread over


@dataclass(slots=True)
class Run:
    """The tokens that one branch added below its fork position.

    Attributes:
        key: the branch id; negative for a run whose tokens no branch of its own holds any more.
        parent: key of the run above, 0 at a root.
        start: absolute position of the first token of the run.
        tokens: token ids.
        logprobs: one a token, NaN where the token was not generated.
        texts: text of the leading tokens, filled on demand.
        alive: whether the branch still has its handle.
        children: keys of the runs forked from this one.
    """

    key: int
    parent: int
    start: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    alive: bool = True
    children: set[int] = field(default_factory=set)

    @property
    def end(self) -> int:
        """Absolute position after the last token."""
        return self.start + len(self.tokens)


class RunTree:
    """All runs, kept up to date by `apply`; subclasses read `dirty` and `stale`.

    Attributes:
        runs: key -> run.
        dirty: key -> whether its cuts may have moved; runs that a reader has to look at again.
        stale: keys whose pieces have to be recomputed.
    """

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}
        self.dirty: dict[int, bool] = {}
        self.stale: set[int] = set()
        self._next_ghost = -1

    def apply(self, event: Event) -> None:
        """Fold one event in; other kinds, and unknown branches, change nothing."""
        key, data = event.branch_id, event.data
        if event.kind == "prompt":
            self.add_root(key, data["tokens"])
        elif event.kind == "fork":
            self.add_fork(key, int(data["parent"]), int(data["position"]))
        elif key not in self.runs:
            return
        elif event.kind == "extend":
            self.extend(key, data["tokens"], data.get("logprobs"))
        elif event.kind == "rollback":
            self.rollback(key, int(data["to"]))
        elif event.kind == "prune":
            self.prune(key)

    def add_root(self, key: int, tokens: Sequence[int]) -> None:
        """A prompt; ids that are `UNKNOWN_TOKEN` can be set later by `set_tokens`."""
        run = Run(key, 0, 0, list(tokens), [math.nan] * len(tokens))
        self.runs[key] = run
        self._touch(run, cuts=True)

    def add_fork(self, key: int, parent: int, position: int) -> None:
        """Branch `key` forked from `parent` at `position`; attaches to the run that holds it."""
        above = self.runs.get(parent)
        if above is None:
            return
        above = self.holder(above, position)
        run = Run(key, above.key, min(position, above.end))
        self.runs[key] = run
        above.children.add(key)
        self._touch(run, cuts=True)
        self._touch(above, cuts=True)

    def extend(
        self, key: int, tokens: Sequence[int], logprobs: Sequence[float | None] | None
    ) -> None:
        """Append tokens to a run."""
        run = self.runs[key]
        run.tokens.extend(tokens)
        run.logprobs.extend(_floats(tokens, logprobs))
        self._touch(run, cuts=False)

    def rollback(self, key: int, to: int) -> None:
        """Cut a branch back to `to` tokens; what its children still hold becomes a ghost run."""
        run = self.runs[key]
        if to >= run.end:
            return
        floor = max(to, run.start)
        kept = [child for child in run.children if self.runs[child].start > floor]
        if kept:
            self._leave_ghost(run, floor, kept)
        self._truncate(run, floor)
        if to < run.start and run.parent:
            self._hang_at(run, to)

    def prune(self, key: int) -> None:
        """The branch lost its handle; its tokens stay only as far as children hold them."""
        run = self.runs.get(key)
        if run is not None:
            run.alive = False
            self._shrink(run)

    def set_tokens(
        self, key: int, tokens: Sequence[int], logprobs: Sequence[float | None] | None = None
    ) -> None:
        """Replace the tokens of a run by what its branch really holds (prompt ids, resync)."""
        run = self.runs[key]
        run.tokens = list(tokens)
        run.logprobs = _floats(tokens, logprobs)
        run.texts.clear()
        for child in run.children:
            self.runs[child].start = min(self.runs[child].start, run.end)
        self._touch(run, cuts=True)

    def touch(self, key: int) -> None:
        """Mark a run as changed (pages, status or search values moved)."""
        if key in self.runs:
            self.dirty.setdefault(key, False)

    def holder(self, run: Run, position: int) -> Run:
        """The run that holds the token before `position` on the path of `run`."""
        while run.parent and position <= run.start:
            run = self.runs[run.parent]
        return run

    def forgotten(self, key: int) -> None:
        """Hook: a run was dropped."""

    def _touch(self, run: Run, *, cuts: bool) -> None:
        if cuts:
            for child in run.children:  # the node above a child's first piece may be another now
                self.dirty[child] = True
                self.stale.add(child)
        self.dirty[run.key] = self.dirty.get(run.key, False) or cuts
        self.stale.add(run.key)

    def _leave_ghost(self, run: Run, start: int, kept: list[int]) -> None:
        """Move the tokens after `start` that the `kept` children hold into a run of their own."""
        # Where nothing of the run stays above the ghost, it hangs beside the run.
        parent = run.key if start > run.start or not run.parent else run.parent
        ghost = Run(self._next_ghost, parent, start, alive=False, children=set(kept))
        self._next_ghost -= 1
        last = max(self.runs[child].start for child in kept)
        ghost.tokens = run.tokens[start - run.start : last - run.start]
        ghost.logprobs = run.logprobs[start - run.start : last - run.start]
        run.children -= ghost.children
        for child in kept:
            self.runs[child].parent = ghost.key
        self.runs[ghost.key] = ghost
        self.runs[parent].children.add(ghost.key)
        self._touch(self.runs[parent], cuts=True)
        self._touch(ghost, cuts=True)

    def _hang_at(self, run: Run, position: int) -> None:
        """Attach an empty run further up, at `position` of the path it came from."""
        old = self.runs[run.parent]
        above = self.holder(old, position)
        old.children.discard(run.key)
        run.parent, run.start = above.key, position
        above.children.add(run.key)
        self._touch(run, cuts=True)
        self._touch(above, cuts=True)
        self._touch(old, cuts=True)
        self._shrink(old)

    def _truncate(self, run: Run, end: int) -> None:
        keep = end - run.start
        if keep < len(run.tokens):
            del run.tokens[keep:], run.logprobs[keep:]
            del run.texts[max(0, keep - MAX_SPLIT_CHAR) :]
        self._touch(run, cuts=True)

    def _shrink(self, run: Run) -> None:
        """Drop what nothing holds any more of a run without a handle, and of those above it."""
        while not run.alive:
            if run.children:
                self._truncate(run, max(self.runs[child].start for child in run.children))
                return
            self.dirty.pop(run.key, None)
            self.stale.discard(run.key)
            del self.runs[run.key]
            self.forgotten(run.key)
            if not run.parent:
                return
            above = self.runs[run.parent]
            above.children.discard(run.key)
            self._touch(above, cuts=True)
            run = above
        self._touch(run, cuts=True)


def _floats(tokens: Sequence[int], logprobs: Sequence[float | None] | None) -> list[float]:
    if logprobs is None:
        return [math.nan] * len(tokens)
    return [math.nan if value is None else float(value) for value in logprobs]
