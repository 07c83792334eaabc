"""One engine as seen by the workbench: its tree model, statuses, page counts and search values.

Reads the event log and the core's counters; never touches model state. Safe from any thread: every
public method takes the session's lock, and none calls into the engine thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from dendrite_engine.errors import InvalidArgument, StaleBranch
from dendrite_engine.trace import Event
from dendrite_lab import protocol
from dendrite_lab.runs import UNKNOWN_TOKEN, Run
from dendrite_lab.search_view import SearchView
from dendrite_lab.tree_model import Piece, TreeModel

_REFRESH_SECONDS = 0.1  # page counts and totals are read at most this often
_SNIPPET = 200
_SNIPPET_MANY = 64  # characters a node when the tree is large
_MANY_NODES = 2000
_HEAD_TOKENS, _TAIL_TOKENS = 40, 60

Pages = tuple[int, int, int]  # pages, owned pages, tail refcount


class Session:
    """The tree of one engine, or of one branch of it, ready to be shown.

    Args:
        engine: the engine to watch.
        roots: show only these branches and what grows below them; None shows the whole engine.
    """

    def __init__(self, engine: Any, roots: Iterable[Any] | None = None) -> None:
        self.engine = engine
        self.lock = threading.RLock()
        self.model = TreeModel(engine.tokenizer.pieces)
        self.search = SearchView()
        self.streaming: set[int] = set()
        self.finish: dict[int, int] = {}
        self.errors: dict[int, str] = {}
        self.totals: dict[str, Any] = {}
        self._roots = None if roots is None else {branch.id for branch in roots}
        self._hidden: set[int] = set()
        self._inbox: deque[tuple[int, str, Exception | None]] = deque()
        self._seq = 0
        self._pages: dict[int, Pages] = {}
        self._refreshed = -math.inf
        self._rate = _Rate()

    # ---- keeping up ---------------------------------------------------------------------------

    def sync(self) -> None:
        """Fold what happened since the last call. O(new events)."""
        with self.lock:
            events = self.engine.trace.since(self._seq)
            self._seq += len(events)
            for event in events:
                self._fold(event)
            if events:
                self._resolve_prompts()
            self._fold_statuses()
            for branch_id in self.search.poll():
                self.model.touch(branch_id)

    def refresh(self, *, force: bool = False) -> None:
        """Read page counts and totals; unless forced, at most ten times a second."""
        now = time.monotonic()
        with self.lock:
            if now - self._refreshed < _REFRESH_SECONDS and not force:
                return
            self._refreshed = now
            self._read_pages()
            self._read_totals(now)

    def show(self, branch: Any) -> None:
        """Add a branch made later to what is shown (a new prompt of this explorer)."""
        with self.lock:
            if self._roots is not None and branch.id not in self._roots:
                self._roots.add(branch.id)
                if branch.id not in self.model.runs:
                    self.model.add_root(branch.id, branch.token_ids)

    def hide(self, branch: Any) -> None:
        """Never show `branch` (a helper fork); call it under the lock in which it was forked."""
        self._hidden.add(branch.id)

    def _fold(self, event: Event) -> None:
        key = event.branch_id
        if key in self._hidden:
            return
        if event.kind == "job":
            self._fold_job(event)
        elif event.kind == "error":
            self.errors[key] = str(event.data.get("error", ""))
            self.model.touch(key)
        elif self._roots is None:
            self.model.apply(event)
        elif key in self._roots and event.kind == "fork":
            if key not in self.model.runs:  # a chosen root is a root here, whatever hangs above it
                self.model.add_root(key, [UNKNOWN_TOKEN] * int(event.data["position"]))
        elif event.kind != "prompt" or (key in self._roots and key not in self.model.runs):
            self.model.apply(event)

    def _fold_job(self, event: Event) -> None:
        data = event.data
        if data.get("state") == "start":
            for key in data.get("branches", (event.branch_id,)):
                if key in self.model.runs:
                    self.streaming.add(key)
                    self.finish.pop(key, None)
                    self.errors.pop(key, None)
                    self.model.touch(key)
        elif event.branch_id and data.get("reason"):
            self._ended(event.branch_id, str(data["reason"]))

    def on_event(self, event: Any) -> None:
        """Callback for jobs; runs on the engine thread, so it only enqueues."""
        if event.finish_reason is not None:
            self._inbox.append((event.branch.id, event.finish_reason, event.error))

    def _ended(self, key: int, reason: str, error: Exception | None = None) -> None:
        known = reason in protocol.FINISH_REASONS
        self.finish[key] = protocol.FINISH_REASONS.index(reason if known else "error")
        if error is not None:
            self.errors[key] = str(error)
        self.model.touch(key)

    def _fold_statuses(self) -> None:
        """Who still generates, and why those that ended did."""
        while self._inbox:
            self._ended(*self._inbox.popleft())
        for key in list(self.streaming):
            branch = self.branch(key)
            if branch is None or not branch.is_generating:
                self.streaming.discard(key)
                self.model.touch(key)

    def _resolve_prompts(self) -> None:
        """Fetch the tokens above a chosen root: the log of their branches isn't followed here."""
        for key in self.model.roots():
            run = self.model.runs[key]
            if run.tokens and run.tokens[0] == UNKNOWN_TOKEN:
                count = sum(1 for token in run.tokens if token == UNKNOWN_TOKEN)
                holder = self._any_branch(run)
                if holder is not None and holder.num_tokens >= count:
                    ids, logprobs = holder.token_ids[:count], holder.logprobs[:count]
                    self.model.set_tokens(
                        key, [*ids, *run.tokens[count:]], [*logprobs, *run.logprobs[count:]]
                    )

    def _any_branch(self, run: Run) -> Any | None:
        stack = [run]
        while stack:
            top = stack.pop()
            branch = self.branch(top.key) if top.alive else None
            if branch is not None:
                return branch
            stack.extend(self.model.runs[child] for child in top.children)
        return None

    def _read_pages(self) -> None:
        alive = [key for key, run in self.model.runs.items() if run.alive]
        branches = {key: branch for key in alive if (branch := self.branch(key)) is not None}
        if not branches:
            self._pages.clear()
            return
        handles = np.fromiter((b.handle for b in branches.values()), np.int64, len(branches))
        try:
            table = self.engine.core.describe(handles)
        except StaleBranch:  # one was pruned meanwhile; its event is on the way
            return
        columns = (table["pages"], table["owned_pages"], table["tail_refs"])
        rows = zip(*(column.tolist() for column in columns), strict=True)
        fresh: dict[int, Pages] = dict(zip(branches, rows, strict=True))
        for key, pages in fresh.items():
            if self._pages.get(key) != pages:
                self.model.touch(key)
        self._pages = fresh

    def _read_totals(self, now: float) -> None:
        stats = self.engine.stats()
        self.totals = {
            "pages_total": stats.pages_total,
            "pages_free": stats.pages_free,
            "pages_live": stats.pages_live,
            "pages_shared": stats.pages_shared,
            "pages_cached": stats.pages_cached,
            "branches": stats.branches,
            "cow_copies": stats.cow_copies,
            "bytes_saved": stats.bytes_saved,
            "page_bytes": stats.page_bytes,
            "bytes_total": stats.bytes_total,
            "kv_format": stats.kv_format,
            "step_ms": round(stats.step_ms_last, 2),
            "streaming": len(self.streaming),
            "tokens_per_s": self._rate.update(now, stats.tokens_generated),
            "search": self.search.summary(),
        }

    # ---- branches and nodes -------------------------------------------------------------------

    def branch(self, key: int) -> Any | None:
        """The live branch with this id, or None."""
        if key <= 0:
            return None
        try:
            return self.engine.branch(key)
        except StaleBranch:  # pruned: that is the answer
            return None

    def piece(self, node: int) -> Piece:
        """The piece of a node id.

        Raises:
            StaleBranch: the node is gone.
        """
        with self.lock:
            self.sync()
            piece = self.model.piece(node)
        if piece is None:
            raise StaleBranch(f"node {node} is gone: its branches were pruned or rolled back")
        return piece

    def ending_at(self, piece: Piece) -> Any | None:
        """The live branch whose last token is the last of `piece`, or None."""
        with self.lock:
            run = self.model.runs.get(piece.key)
            return self.branch(piece.key) if piece.tip and run is not None and run.alive else None

    def carrier(self, piece: Piece) -> Any:
        """A live branch that runs through `piece`, its own where it still has one.

        Raises:
            StaleBranch: nothing holds the node any more.
        """
        with self.lock:
            own = self.branch(piece.key)
            if own is not None:
                return own
            for below in self.model.subtree(piece):
                branch = self.ending_at(below)
                if branch is not None:
                    return branch
        raise StaleBranch(f"node {piece.node} is gone: its branches were pruned")

    def leaves(self) -> list[Piece]:
        """Pieces with nothing below them."""
        with self.lock:
            self.sync()
            pieces = self.model.all_pieces()
            inner = {piece.parent for piece in pieces}
            return [piece for piece in pieces if piece.node not in inner]

    def node_of(self, branch: Any) -> int:
        """Node in which a branch ends, 0 when it isn't shown."""
        with self.lock:
            self.sync()
            tip = self.model.tip(branch.id)
            return 0 if tip is None else tip.node

    # ---- rows for the front end ---------------------------------------------------------------

    def row(self, piece: Piece) -> protocol.NodeRow:
        """The piece as a row of the wire format."""
        run = self.model.runs[piece.key]
        tip = piece.tip and run.alive
        flags = (protocol.ALIVE if run.alive else 0) | (0 if piece.parent else protocol.ROOT)
        finish = 0
        pages = (_span(piece, self.page_size), 0, 0)
        if tip:
            flags |= protocol.TIP
            flags |= protocol.STREAMING if piece.key in self.streaming else 0
            flags |= protocol.ERROR if piece.key in self.errors else 0
            finish = self.finish.get(piece.key, 0)
            pages = self._pages.get(piece.key, pages)
        values = self.search.of(piece)
        flags |= protocol.BEST if values.best else 0
        return protocol.NodeRow(
            piece.node, piece.parent, piece.key, piece.start, piece.end, flags, finish, *pages,
            values.visits, *_logprob_summary(self.model.logprobs(piece)), values.value, values.uct,
        )  # fmt: skip

    def snippet(self, piece: Piece) -> str:
        """Beginning and end of the piece's text, short enough for a card."""
        limit = _SNIPPET if len(self.model.runs) < _MANY_NODES else _SNIPPET_MANY
        texts = self.model.texts(piece)
        if len(texts) > _HEAD_TOKENS + _TAIL_TOKENS:
            texts = [*texts[:_HEAD_TOKENS], " \N{HORIZONTAL ELLIPSIS} ", *texts[-_TAIL_TOKENS:]]
        joined = "".join(texts)
        if len(joined) <= limit:
            return joined
        half = limit // 2
        return joined[:half] + " \N{HORIZONTAL ELLIPSIS} " + joined[-half:]

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return int(self.engine.core.page_size)

    def watch_search(self, handle: Any | None) -> None:
        """Show the values of a running search, or of none."""
        with self.lock:
            self.search.watch(handle)
            for key in self.model.runs:
                self.model.touch(key)

    def require_idle(self, keys: Iterable[int]) -> None:
        """Refuse branches that are generating.

        Raises:
            InvalidArgument: one of them is; the message names it.
        """
        busy = sorted(set(keys) & self.streaming)
        if busy:
            raise InvalidArgument(f"branch {busy[0]} is generating; stop it first, or fork it")

    def collect(self, *, snapshot: bool) -> tuple[list[protocol.NodeRow], list[str], list[int]]:
        """Rows, snippets and removed nodes since the last call, or of the whole tree."""
        with self.lock:
            self.sync()
            self.refresh()
            changes = self.model.take_changes()
            pieces = self.model.all_pieces() if snapshot else changes.pieces
            rows = [self.row(piece) for piece in pieces]
            texts = [self.snippet(piece) for piece in pieces]
            return rows, texts, [] if snapshot else changes.removed


class _Rate:
    """Tokens a second over the last second or so."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int]] = []

    def update(self, now: float, total: int) -> float:
        self._points = [p for p in self._points if now - p[0] <= 1.5] + [(now, total)]
        (t0, n0), (t1, n1) = self._points[0], self._points[-1]
        return round((n1 - n0) / (t1 - t0), 1) if t1 > t0 else 0.0


def _span(piece: Piece, page_size: int) -> int:
    """Pages that the piece's tokens lie in."""
    if piece.end == piece.start:
        return 0
    return -(-piece.end // page_size) - piece.start // page_size


def _logprob_summary(logprobs: list[float]) -> tuple[float, float]:
    known = [value for value in logprobs if not math.isnan(value)]
    if not known:
        return math.nan, math.nan
    return sum(known) / len(known), known[-1]
