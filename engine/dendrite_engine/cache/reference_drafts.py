"""Drafts of the pure-Python control plane: guessed tokens beside a branch, not part of it."""

from __future__ import annotations

import math
import threading

from dendrite_engine.cache.arguments import as_array, check_tokens
from dendrite_engine.cache.reference_tree import Segment, SegmentTree
from dendrite_engine.errors import InvalidArgument

LAST_GENERATION = 0x7FFFFFFF
_MOST = 2**31 - 1


class DraftVerbs:
    """`TreeCore.draft` and `TreeCore.adopt`; documented in `_core.pyi`."""

    _tree: SegmentTree
    _lock: threading.RLock
    _tails: list[Segment | None]
    _generations: list[int]
    _free_slots: list[int]
    _draft_slots: set[int]

    def _find(self, branch: int) -> Segment | None:
        raise NotImplementedError

    def _tail(self, branch: int) -> Segment:
        raise NotImplementedError

    def _new_handle(self, tail: Segment) -> int:
        raise NotImplementedError

    def _retire(self, slot: int) -> None:
        """The slot's handle is over; the caller has the tail's reference."""
        self._tails[slot] = None
        self._draft_slots.discard(slot)
        self._generations[slot] += 1
        if self._generations[slot] < LAST_GENERATION:
            self._free_slots.append(slot)

    def draft(self, branch: int, tokens: object) -> int:
        """A handle to the branch's tokens with guesses behind them, in pages of its own."""
        ids = as_array("tokens", tokens, "int32").tolist()
        check_tokens(ids)
        tree = self._tree
        with self._lock:
            tail = self._tail(branch)
            held = tail.end
            if held < 2:
                raise InvalidArgument(
                    f"a draft needs a branch of at least 2 tokens, this one holds {held}"
                )
            if not 1 <= len(ids) <= _MOST - held:
                raise InvalidArgument(f"tokens has {len(ids)} ids, need 1..{_MOST - held}")
            tree.check_pages(tree.ceil(held + len(ids)) - tree.floor(held - 1))
            last = tree.tokens(tail, held - 1, held)
            logprobs = [_holder(tail, held - 1).logprobs[-1], *([math.nan] * len(ids))]
            head = tree.segment_ending_at(tail, held - 1)
            head.handles += 1
            handle = self._new_handle(tree.append(head, last + ids, logprobs, retain=False))
            self._draft_slots.add(handle & 0xFFFFFFFF)
            return handle

    def adopt(self, branch: int, draft: int, keep: int, logprobs: object, expected: int) -> int:
        """Make the branch hold the first `keep` tokens of the draft, and end the draft."""
        values = as_array("logprobs", logprobs, "float32").tolist()
        with self._lock:
            tail = self._tail(draft)
            self._check_adopt(draft, tail, keep, len(values))
            old_tail = self._find(branch)
            if old_tail is None or old_tail.end != expected:
                return 2 if old_tail is None else 3
            if branch == draft:
                raise InvalidArgument("a draft can't adopt itself")
            if keep < tail.end:
                target = self._tree.segment_ending_at(tail, keep)
                target.handles += 1
                tail.handles -= 1
                self._tree.collect(tail)
                tail = target
            self._retire(draft & 0xFFFFFFFF)
            self._tails[branch & 0xFFFFFFFF] = tail
            for position, value in zip(range(keep - len(values), keep), values, strict=True):
                segment = _holder(tail, position)
                segment.logprobs[position - segment.start] = value
            old_tail.handles -= 1
            self._tree.collect(old_tail)
            self._tree.unindex_partial_page(tail)
            return 0

    def _check_adopt(self, draft: int, tail: Segment, keep: int, count: int) -> None:
        if draft & 0xFFFFFFFF not in self._draft_slots:
            raise InvalidArgument(f"handle {draft} is a branch, not a draft")
        if not 1 <= keep <= tail.end or count > keep:
            raise InvalidArgument(
                f"keep must be from 1 to {tail.end} and at least the number of logprobs "
                f"({count}), got {keep}"
            )


def _holder(tail: Segment, position: int) -> Segment:
    """The chain's segment that holds this position."""
    return next(segment for segment in tail.chain() if segment.start <= position)
