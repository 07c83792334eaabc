"""What each command of the Explorer does to the engine. One method an operation, no widget in
sight.

Methods take a checked `Command` and return a JSON-serialisable result; they raise `DendriteError`s.
Structural verbs go straight to the core, generation is submitted to the engine thread: neither
waits for a decode step. `SLOW` operations compute, so they wait for the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.sampling_params import SamplingParams
from dendrite_lab import protocol
from dendrite_lab.protocol import Command, integer, node_list, number, text
from dendrite_lab.session import Session
from dendrite_lab.tree_model import Piece

SLOW = frozenset({"top", "extend", "edit", "force", "prompt"})
MAX_CHILDREN = 64
MAX_TOKENS_A_REPLY = 8192

Result = dict[str, Any]


class Operations:
    """The commands of one Explorer.

    Args:
        session: the tree that node ids refer to.
        sampling: defaults of `generate`.
    """

    def __init__(self, session: Session, sampling: SamplingParams) -> None:
        self.session = session
        self.sampling = sampling
        self.selected_node = 0
        self._jobs: list[tuple[Any, frozenset[int]]] = []

    def run(self, command: Command) -> Result:
        """Carry out one command."""
        method: Callable[[Command], Result] = getattr(self, f"_op_{command.op}")
        return method(command)

    # ---- structure ----------------------------------------------------------------------------

    def _op_fork(self, command: Command) -> Result:
        """Fork `count` children at the node's end, or after `at` tokens; `go` streams into them."""
        count = integer(command.args, "count", 1, 1, MAX_CHILDREN)
        piece = self.session.piece(command.node)
        at = integer(command.args, "at", piece.end, 1, piece.end)
        branches, result = self._fork(piece, at, count)
        if command.args.get("go"):
            result["job"] = self._submit(branches, command.args)
        return result

    def _fork(self, piece: Piece, at: int, count: int) -> tuple[list[Any], Result]:
        source = self.session.carrier(piece)
        core = self.session.engine.core
        at_end = source.num_tokens == at
        before = core.stats()
        began = time.perf_counter_ns()
        branches = source.fork(count) if at_end else source.fork(count, at=at)
        elapsed = (time.perf_counter_ns() - began) / 1000
        after = core.stats()
        cost: Result = {"us": round(elapsed, 2), "count": count, "tokens_shared": at}
        if not self.session.streaming:  # else other branches' pages would be counted
            copied = after["cow_copies"] - before["cow_copies"]
            cost["pages_taken"] = after["pages_taken"] - before["pages_taken"]
            cost["bytes_copied"] = copied * self._page_bytes()
        return branches, {"cost": cost, **self._made(branches)}

    def _op_prune(self, command: Command) -> Result:
        """Prune everything at and below the node."""
        with self.session.lock:
            piece = self.session.piece(command.node)
            doomed = self._doomed(piece)
            own = self.session.branch(piece.key)
            cut = own if own is not None and own not in doomed else None
            if cut is not None:
                self.session.require_idle([cut.id])
        began = time.perf_counter_ns()
        freed = sum(branch.prune() for branch in reversed(doomed))
        if cut is not None:  # the branch goes on above the node: take back only what is below
            freed += cut.rollback(cut.num_tokens - piece.start)
        elapsed = (time.perf_counter_ns() - began) / 1000
        cost = {"us": round(elapsed, 2), "pages_freed": freed, "branches": len(doomed)}
        cost["bytes_freed"] = freed * self._page_bytes()
        return {"cost": cost, "parent": piece.parent}

    def _doomed(self, piece: Piece) -> list[Any]:
        """Live branches that lie wholly at or below `piece`, parents first."""
        model, found = self.session.model, []
        for below in model.subtree(piece):
            run = model.runs[below.key]
            if (
                run.alive
                and below.start == run.start
                and below.node == model.pieces(run.key)[0].node
            ):
                branch = self.session.branch(run.key)
                if branch is not None:
                    found.append(branch)
        return found

    def _op_cost(self, command: Command) -> Result:
        """What pruning the node would free, without doing it."""
        with self.session.lock:
            piece = self.session.piece(command.node)
            doomed = self._doomed(piece)
        pages = _pages_only_under(self.session.engine, {branch.id for branch in doomed})
        return {"branches": len(doomed), "pages": pages, "bytes": pages * self._page_bytes()}

    # ---- text ---------------------------------------------------------------------------------

    def _op_extend(self, command: Command) -> Result:
        """Append typed text to the branch that ends at the node, else to a new fork there."""
        typed = text(command.args)
        if not typed:
            raise InvalidArgument("text is empty: there is nothing to append")
        piece = self.session.piece(command.node)
        branch = self.session.ending_at(piece)
        result: Result = {}
        if branch is None or command.args.get("fork") or branch.id in self.session.streaming:
            (branch,), result = self._fork(piece, piece.end, 1)
        branch.extend(typed)
        return {**result, **self._made([branch])}

    def _op_edit(self, command: Command) -> Result:
        """Replace the node's text: fork at the longest common token prefix, then extend.

        The old tokens stay as they are.
        """
        typed = text(command.args)
        piece = self.session.piece(command.node)
        with self.session.lock:
            old = self.session.model.tokens(piece)
        new = list(self.session.engine.tokenizer.encode(typed))
        same = _common_prefix(old, new)
        if same == len(old) == len(new):
            raise InvalidArgument("the text was not changed")
        at = piece.start + same
        if at == 0:
            branch = self.session.engine.prompt(new)
            self.session.show(branch)
            return {"tokens_reused": 0, "tokens_new": len(new), **self._made([branch])}
        above = self.session.carrier(piece)
        (branch,), result = self._fork_from(above, at)
        if new[same:]:
            branch.extend(new[same:])
        result.update(self._made([branch]))
        return {**result, "tokens_reused": at, "tokens_new": len(new) - same}

    def _fork_from(self, source: Any, at: int) -> tuple[list[Any], Result]:
        began = time.perf_counter_ns()
        branches = source.fork(1) if source.num_tokens == at else source.fork(1, at=at)
        elapsed = (time.perf_counter_ns() - began) / 1000
        return branches, {"cost": {"us": round(elapsed, 2), "count": 1, "tokens_shared": at}}

    def _op_force(self, command: Command) -> Result:
        """Fork after `at` tokens (default: the node's end) and append one chosen token."""
        token = integer(command.args, "token_id", None, 0, 2**31 - 1)
        piece = self.session.piece(command.node)
        at = integer(command.args, "at", piece.end, 1, piece.end)
        branches, result = self._fork(piece, at, 1)
        branches[0].extend([token])
        result.update(self._made(branches))
        if command.args.get("go"):
            result["job"] = self._submit(branches, command.args)
        return result

    def _op_prompt(self, command: Command) -> Result:
        """Start a new tree from a typed prompt."""
        typed = text(command.args)
        branch = self.session.engine.prompt(typed)
        self.session.show(branch)
        return self._made([branch])

    def _op_tokens(self, command: Command) -> Result:
        """Token texts, log-probabilities and ids of nodes: `parts` = [{node, from}]."""
        parts = command.args.get("parts") or [{"node": command.node, "from": 0}]
        if not isinstance(parts, (list, tuple)):
            raise InvalidArgument(f"parts must be a list, got {type(parts).__name__}")
        budget, out = MAX_TOKENS_A_REPLY, []
        with self.session.lock:
            self.session.sync()
            for part in parts:
                piece = self.session.model.piece(integer(part, "node", None, 1, 2**31))
                if piece is not None and budget > 0:
                    out.append(self._part(piece, integer(part, "from", 0, 0, 2**31), budget))
                    budget -= len(out[-1]["ids"])
        return {"parts": out}

    def _part(self, piece: Piece, first: int, budget: int) -> Result:
        model = self.session.model
        window = slice(first, first + budget)
        return {
            "node": piece.node,
            "from": first,
            "end": piece.end - piece.start,
            "texts": model.texts(piece)[window],
            "ids": model.tokens(piece)[window],
            "logprobs": [None if x != x else round(x, 4) for x in model.logprobs(piece)[window]],
        }

    # ---- generation ---------------------------------------------------------------------------

    def _op_generate(self, command: Command) -> Result:
        """Stream into nodes (`nodes`), or into every leaf (`leaves`), all in one batch."""
        session = self.session
        if command.args.get("leaves"):
            pieces = session.leaves()
        else:
            pieces = [session.piece(node) for node in node_list(command)]
        if not pieces:
            raise InvalidArgument("no node was given: select one, or continue all leaves")
        branches = []
        for piece in pieces:
            branch = session.ending_at(piece)
            if branch is None:
                branch = self._fork_from(session.carrier(piece), piece.end)[0][0]
            if branch.id not in session.streaming:
                branches.append(branch)
        if not branches:
            session.require_idle([piece.key for piece in pieces])
        job = self._submit(branches, command.args)
        return {"job": job, **self._made(branches)}

    def _submit(self, branches: list[Any], args: Mapping[str, Any]) -> Result:
        params = self._params(args)
        job = self.session.engine.submit(branches, params, on_event=self.session.on_event)
        self._jobs = [(j, keys) for j, keys in self._jobs if not j.done]
        self._jobs.append((job, frozenset(branch.id for branch in branches)))
        return {"branches": len(branches), "max_tokens": params.max_tokens}

    def _params(self, args: Mapping[str, Any]) -> SamplingParams:
        changes: dict[str, Any] = {}
        if "max_tokens" in args:
            changes["max_tokens"] = integer(args, "max_tokens", None, 1, 1_000_000)
        if "temperature" in args:
            changes["temperature"] = number(args, "temperature", None, 0.0)
        if "top_p" in args:
            changes["top_p"] = number(args, "top_p", None, 0.0)
        return self.sampling.replace(**changes)

    def _op_stop(self, command: Command) -> Result:
        """Cancel this explorer's jobs that stream into the nodes, or all of them."""
        nodes = node_list(command)
        keys = {self.session.piece(node).key for node in nodes}
        stopped = 0
        for job, members in self._jobs:
            if not job.done and (not nodes or keys & members):
                job.cancel()
                stopped += 1
        self._jobs = [(job, members) for job, members in self._jobs if not job.done]
        return {"jobs": stopped}

    def _op_top(self, command: Command) -> Result:
        """The `k` most likely tokens after `at` tokens (default: the node's end)."""
        k = integer(command.args, "k", 8, 1, protocol.MAX_ID)
        session = self.session
        piece = session.piece(command.node)
        at = integer(command.args, "at", piece.end, 1, piece.end)
        branch = session.ending_at(piece) if at == piece.end else None
        if branch is not None and not branch.is_generating:
            return self._alternatives(branch, k, at)
        # A helper fork looks inside a node, or at one that is generating; it must be hidden before
        # anybody reads its event.
        with session.lock:
            (helper,) = self._fork_from(session.carrier(piece), at)[0]
            session.hide(helper)
        try:
            return self._alternatives(helper, k, at)
        finally:
            helper.prune()

    def _alternatives(self, branch: Any, k: int, at: int) -> Result:
        found = self.session.engine.top_tokens([branch], k)[0]
        options = [
            {"token_id": int(a.token_id), "text": a.text, "logprob": round(float(a.logprob), 4)}
            for a in found
        ]
        return {"at": at, "alternatives": options}

    # ---- the rest -----------------------------------------------------------------------------

    def _op_select(self, command: Command) -> Result:
        """Remember the selected node; 0 selects nothing."""
        if command.node:
            self.session.piece(command.node)
        self.selected_node = command.node
        return {"node": command.node}

    def _op_search(self, command: Command) -> Result:
        """Steer the attached search: `action` is pause, resume, step or stop."""
        handle = self.session.search.handle
        action = command.args.get("action")
        if handle is None:
            raise InvalidArgument("no search is attached to this explorer")
        if action not in ("pause", "resume", "step", "stop"):
            raise InvalidArgument(f"action must be pause, resume, step or stop; got {action!r:.80}")
        getattr(handle, action)()
        return {"state": str(handle.state)}

    def _made(self, branches: list[Any]) -> Result:
        nodes = [self.session.node_of(branch) for branch in branches]
        return {"branches": [branch.id for branch in branches], "nodes": nodes}

    def _page_bytes(self) -> int:
        return int(self.session.engine.stats().page_bytes)


def _common_prefix(a: list[int], b: list[int]) -> int:
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _pages_only_under(engine: Any, doomed: set[int]) -> int:
    """Pages that no branch outside `doomed` holds: what pruning all of them gives back."""
    inside: set[int] = set()
    outside: set[int] = set()
    for branch in engine.branches:
        target = inside if branch.id in doomed else outside
        for segment in engine.core.segments(branch.handle):
            target.update(segment[4])
    return len(inside - outside)
