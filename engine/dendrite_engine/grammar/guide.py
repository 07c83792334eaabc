"""The grammar of a branch: which one, from where on, and what its matcher knows already.

The state of a grammar is a function of the tokens it has read, so a branch only needs to remember
the grammar and where it starts. Everything else is a memory of work done: a **snapshot** is a
matcher after certain tokens, never changed once made, so that any number of branches and threads
may share it. A fork copies one reference; a rollback, a fork inside, tokens appended by hand all
come out of the same rule: take the snapshot, go back to where the tokens part, read the rest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dendrite_engine.errors import GrammarError
from dendrite_engine.grammar.base import I32, ConstraintEngine, Matcher
from dendrite_engine.grammar.specs import Grammar

_NO_TOKENS: I32 = np.zeros(0, np.int32)


class Snapshot:
    """A matcher after some tokens, and its mask; immutable, safe from any thread.

    Attributes:
        token_ids: what was read since the grammar's start, i32 [n].
        is_accepting: whether these tokens satisfy the grammar.
        is_finished: whether they do and nothing can follow.
    """

    __slots__ = (
        "_engine",
        "_lock",
        "_mask",
        "_matcher",
        "is_accepting",
        "is_finished",
        "token_ids",
    )

    def __init__(self, engine: ConstraintEngine, matcher: Matcher, token_ids: I32) -> None:
        self._engine, self._matcher = engine, matcher
        self._lock = threading.Lock()
        self._mask: I32 | None = None
        self.token_ids = token_ids
        self.is_accepting = matcher.is_accepting
        self.is_finished = matcher.is_finished

    @property
    def error(self) -> str:
        """Why it can't go on; "" where it can."""
        with self._lock:
            return self._matcher.error

    def fork(self) -> Matcher:
        """A matcher of one's own at these tokens."""
        with self._lock:
            return self._matcher.fork()

    def mask(self) -> I32:
        """Which tokens may come next, i32 [words], read-only; filled once.

        Raises:
            GrammarError: the matcher failed or ran out of fuel.
        """
        if self._mask is None:
            mask = np.zeros((1, self._engine.words), np.int32)
            matcher = self.fork()  # filling may end in an error, which would stay
            self._engine.fill([matcher], [0], mask)
            if matcher.error:
                raise GrammarError(f"the grammar can't go on: {matcher.error}")
            mask.flags.writeable = False
            self._mask = mask[0]
        return self._mask

    @property
    def known_mask(self) -> I32 | None:
        """The mask, where it was filled already."""
        return self._mask

    def forced(self) -> list[int]:
        """Tokens that must come next; [] where there is a choice."""
        return self.fork().forced()


@dataclass(frozen=True, slots=True)
class Guide:
    """A grammar at a branch; immutable, shared by its forks.

    Attributes:
        grammar: the grammar.
        engine: who runs it.
        beginning: before the first token.
        start: tokens of the branch before the grammar's first.
        snapshot: the last that is known; not always what the branch holds now.
    """

    grammar: Grammar
    engine: ConstraintEngine
    beginning: Snapshot
    start: int
    snapshot: Snapshot

    def cut(self, position: int) -> Guide:
        """The guide of a branch that was cut to `position` tokens: a grammar that starts behind the
        cut starts at it.
        """
        if position >= self.start:
            return self
        return replace(self, start=position, snapshot=self.beginning)

    def at(self, token_ids: I32) -> Guide:
        """This guide with the snapshot after `token_ids` i32 [n], all read since the start.

        O(n) to compare, and one matcher step for each token that the known snapshot lacks.

        Raises:
            GrammarError: a token is not allowed, or the matcher failed.
        """
        known = self.snapshot.token_ids
        common = _common(known, token_ids)
        if common == len(token_ids) == len(known):
            return self
        matcher = self.snapshot.fork()
        back = len(known) - common
        if back and not matcher.rollback(back):
            matcher, common = self.beginning.fork(), 0
        advance(matcher, token_ids[common:], self.start + common)
        return replace(self, snapshot=Snapshot(self.engine, matcher, token_ids))


def advance(matcher: Matcher, token_ids: I32, position: int) -> None:
    """Move a matcher over tokens that stand at `position` and after.

    Raises:
        GrammarError: one of them is not allowed, or the matcher failed.
    """
    taken = matcher.accept(token_ids.tolist()) if len(token_ids) else 0
    if taken == len(token_ids):
        return
    if matcher.error:
        raise GrammarError(f"the grammar failed at token {position + taken}: {matcher.error}")
    raise GrammarError(
        f"token {int(token_ids[taken])} at position {position + taken} is not allowed by the "
        "branch's grammar; roll back before it, or lift the grammar with constrain(None)"
    )


def sync(branch: Any) -> Guide | None:
    """The guide of a branch at what it holds now, which is kept with the branch; None: it is free.

    Raises:
        GrammarError: the branch holds tokens that its grammar does not allow.
        StaleBranch: it was pruned.
    """
    guide: Guide | None = branch._guide
    if guide is None:
        return None
    held = branch._core.tokens(branch._handle, guide.start)
    found = guide.at(np.asarray(held, np.int32))
    if found is not guide and branch._guide is guide:  # another thread may have lifted it
        branch._guide = found
    return found


def beginning(engine: ConstraintEngine, matcher: Matcher) -> Snapshot:
    """The snapshot before the first token."""
    return Snapshot(engine, matcher, _NO_TOKENS)


def allowed_ids(mask: I32, vocab_size: int) -> I32:
    """Token ids of a bitmask i32 [words], increasing, i32 [n]. O(vocab)."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab_size)
    return np.flatnonzero(bits).astype(np.int32)


def _common(a: I32, b: I32) -> int:
    """Length of the common prefix."""
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size
