"""The part of the engine's loop that guesses, verifies and keeps what was right.

Before a forward pass, `draft` asks the proposers of the jobs for guesses and lays each continuation
into a draft of the core: pages beside the branch that nobody else sees. The pass computes the
branch's last token and all guesses behind it at once. `begin` draws a token from every row with the
draw that plain decoding would use there, and `land` follows the guesses as far as they equal what
was drawn, lets the branch adopt that draft, and gives back the pages of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import methodcaller
from typing import Any

import numpy as np

from dendrite_engine.decoding import NOT_FINITE, Decoder
from dendrite_engine.drawn import Drawn, Launch
from dendrite_engine.errors import OutOfPages, StaleBranch
from dendrite_engine.forward import Flight
from dendrite_engine.lanes import DecodingLane, LaneGroup
from dendrite_engine.scheduler import Lane, Selection
from dendrite_engine.speculation.base import Chances, DraftRequest, Guessing, SampledPath
from dendrite_engine.speculation.constrained import (
    can_walk,
    constraint_of,
    keep_allowed,
    masks_along,
)
from dendrite_engine.speculation.counts import Counts
from dendrite_engine.speculation.pace import Pace
from dendrite_engine.speculation.verdict import Path, Verdict, judge
from dendrite_engine.trace import Trace

CPU_ROW_COST, DEVICE_ROW_COST = 0.05, 0.004  # one more row of a step, as a share of the step


@dataclass(slots=True)
class _Drafted:
    """A lane that is drafted for.

    Attributes:
        lane: the lane.
        guessing: what guesses.
        pace: how much.
        tokens: what its branch holds, as far as it was read.
    """

    lane: DecodingLane
    guessing: Guessing
    pace: Pace
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Drafts:
    """What one forward pass is to verify.

    Attributes:
        group: the lanes of the step.
        paths: at least one for each lane; one without tokens where nothing was guessed.
        selection: their handles, and the rows that each computes.
    """

    group: LaneGroup
    paths: list[Path]
    selection: Selection


@dataclass(frozen=True, slots=True)
class Verification:
    """Tokens that are being drawn from every row of some drafts."""

    drafts: Drafts
    launch: Launch
    flight: Flight


class Speculator:
    """Used by the engine thread only, except for `stats`.

    Args:
        core: the page-and-tree core.
        decoder: what draws and accepts tokens.
        trace: where failures of proposers are logged.
        max_rows: rows of one forward pass.
        is_async: the runner launches and does not wait, so that looking in vain is not free.
    """

    def __init__(
        self, core: Any, decoder: Decoder, trace: Trace, max_rows: int, *, is_async: bool
    ) -> None:
        self._core, self._decoder, self._trace = core, decoder, trace
        self._max_rows, self._is_async = max_rows, is_async
        self._row_cost = DEVICE_ROW_COST if is_async else CPU_ROW_COST
        self._lanes: dict[Lane, _Drafted] = {}
        self._open: set[int] = set()  # drafts of the core
        self._counts = Counts()
        self.stats = self._counts.read

    def __bool__(self) -> bool:
        """Whether any lane is drafted for."""
        return bool(self._lanes)

    def open(self, lane: DecodingLane) -> None:
        """Draft for a new lane, if its job wants that."""
        guessing = lane.job.guessing
        if guessing is not None:
            settings = guessing.settings
            cost = self._row_cost * settings.width
            pace = Pace(settings.tokens, cost, guessing.token_cost, adaptive=settings.adaptive)
            self._lanes[lane] = _Drafted(lane, guessing, pace)

    def close(self, lane: Lane) -> None:
        """The lane has ended."""
        drafted = self._lanes.pop(lane, None)
        if drafted is not None and drafted.guessing.proposer is not None:
            self._ask(drafted.guessing, methodcaller("forget", lane.arrival))

    def abandon(self) -> None:
        """A step failed: nothing of it may stay in the pool."""
        for draft in list(self._open):
            self._discard(draft)
        for lane in list(self._lanes):
            self.close(lane)

    def rests(self) -> bool:
        """Whether no lane wants a draft in the next step, which is then taken to have begun."""
        rests = all(drafted.pace.rests for drafted in self._lanes.values())
        if rests:
            for drafted in self._lanes.values():
                drafted.pace.tick()
        return rests

    # -- before the forward pass --------------------------------------------------------------

    def draft(self, group: LaneGroup) -> Drafts | None:
        """Guesses for the lanes of a step that computes one token of each; None: there are none."""
        guesses = self._guess(group)
        if not guesses:
            return None
        room = self._max_rows - len(group)
        paths: list[Path] = []
        for place, lane in enumerate(group.lanes):
            laid: list[Path] = []
            for tokens in guesses.get(place, ()):
                handle = self._lay(lane, tokens) if len(tokens) + 1 <= room else None
                if handle is not None:
                    room -= len(tokens) + bool(laid)  # each further path repeats the last token
                    laid.append(Path(place, handle, tuple(tokens), _chances(tokens)))
            paths += laid or [Path(place, int(group.handles[place]), ())]
        if not self._open:
            return None
        handles = np.array([path.handle for path in paths], np.int64)
        counts = np.array([len(path.tokens) + 1 for path in paths], np.int32)
        return Drafts(group, paths, Selection(None, handles, counts))

    def _guess(self, group: LaneGroup) -> dict[int, list[list[int]]]:
        """Continuations for places of the group, from every job's proposer."""
        asked: dict[int, tuple[Guessing, list[tuple[int, DraftRequest]]]] = {}
        for place, lane in enumerate(group.lanes):
            drafted = self._lanes.get(lane)
            if drafted is None or drafted.guessing.proposer is None:
                continue
            request = self._request(drafted, int(group.left[place]), len(group))
            if request is not None:
                guessing = drafted.guessing
                asked.setdefault(id(guessing), (guessing, []))[1].append((place, request))
        guesses: dict[int, list[list[int]]] = {}
        for guessing, pairs in asked.values():
            requests = [request for _, request in pairs]
            found = self._ask(guessing, methodcaller("propose", requests)) or ()
            for (place, request), paths in zip(pairs, found, strict=False):
                kept = self._usable(group.lanes[place], request, paths, guessing.settings.width)
                if kept:
                    guesses[place] = kept
                elif self._is_async:
                    self._lanes[group.lanes[place]].pace.note_nothing()
        return guesses

    def _request(self, drafted: _Drafted, left: int, lanes: int) -> DraftRequest | None:
        """What to ask for a lane; None where it is to go on plainly."""
        length = drafted.pace.length(lanes)
        if length == 0:
            drafted.pace.tick()
            return None
        lane, tokens = drafted.lane, drafted.tokens
        try:
            tokens += self._core.tokens(lane.handle, len(tokens)).tolist()
        except StaleBranch:
            return None  # the step that follows ends it
        # The token that is drawn after the last guess counts too.
        limit = min(length, left - 1, self._decoder.max_context - len(tokens) - 1)
        if limit < 1 or len(tokens) < 2:
            return None
        sampler = lane.sampler
        return DraftRequest(
            lane.arrival, tokens, limit, sampler.params, sampler.seed, sampler.path_key
        )

    def _usable(
        self, lane: DecodingLane, request: DraftRequest, paths: Sequence[Sequence[int]], width: int
    ) -> list[list[int]]:
        """Proposed paths as far as they are tokens that may come, without those that another one
        begins with.
        """
        kept: list[list[int]] = []
        for path in list(paths)[:width]:
            tokens = [int(token) for token in path[: request.limit]]
            bad = (i for i, token in enumerate(tokens) if not 0 <= token < self._decoder.vocab_size)
            tokens = tokens[: next(bad, len(tokens))]
            if not self._is_async:
                tokens = keep_allowed(lane.branch, tokens)
            elif constraint_of(lane.branch) is not None:  # bitmasks of guesses are the host's
                tokens = []
            if chances := getattr(path, "chances", ()):
                tokens = SampledPath(tokens, chances[: len(tokens)])
            if tokens and not any(other[: len(tokens)] == tokens for other in kept):
                kept = [other for other in kept if tokens[: len(other)] != other]
                kept.append(tokens)
        return kept

    def _ask(self, guessing: Guessing, question: Callable[[Any], Any]) -> Any:
        """Call a proposer; one that raises is not asked again, and its job goes on plainly."""
        try:
            return question(guessing.proposer)
        except Exception as error:  # it may be a user's
            guessing.proposer = None
            said = f"the proposer failed, decoding goes on: {type(error).__name__}: {error}"
            self._trace.append("error", 0, {"error": said})
            return None

    def _lay(self, lane: DecodingLane, tokens: Sequence[int]) -> int | None:
        """A draft of the core; None where there is no room for it, or the branch is gone."""
        try:
            draft: int = self._core.draft(lane.handle, np.array(tokens, np.int32))
        except OutOfPages:
            self._counts.add(lane.branch.id, no_room=len(tokens))
            return None
        except StaleBranch:
            return None
        self._open.add(draft)
        return draft

    def _discard(self, draft: int) -> None:
        """Give the pages of a draft back."""
        self._open.remove(draft)
        self._core.prune(draft)

    # -- after it was launched ----------------------------------------------------------------

    def begin(self, drafts: Drafts, flight: Flight) -> Verification:
        """Start drawing a token from every row of the pass that computes `drafts`."""
        group, counts = drafts.group, drafts.selection.quotas
        places = np.repeat(np.array([path.place for path in drafts.paths], np.int64), counts)
        every = group.take(places)
        if every.with_penalties:
            self._note_guessed(drafts, every)
        self._mask(drafts, every)
        launch = self._decoder.begin(every, flight.logits, flight.rows, flight.held)
        return Verification(drafts, launch, flight)

    def _mask(self, drafts: Drafts, every: LaneGroup) -> None:
        """Rows of branches with a constraint may only become what it allows there."""
        words, row = -(-self._decoder.vocab_size // 32), 0
        for path in drafts.paths:
            constraint = constraint_of(drafts.group.lanes[path.place].branch)
            if constraint is not None and can_walk(constraint):
                for offset, mask in enumerate(masks_along(constraint, path.tokens, words)):
                    every.settings.masks[row + offset] = mask
            row += len(path.tokens) + 1

    @staticmethod
    def _note_guessed(drafts: Drafts, every: LaneGroup) -> None:
        """Penalties of a row count the guesses before it."""
        special = every.settings.special
        row = 0
        for path in drafts.paths:
            state = special.get(row)
            for token in path.tokens:
                row += 1
                if state is not None and state.params.has_penalties:
                    state = dataclasses.replace(
                        state, counts=dict(state.counts), context_ids=set(state.context_ids)
                    )
                    state.accept(token)
                    special[row] = state
            row += 1

    def discard_all(self) -> None:
        """The pass was not launched."""
        for draft in list(self._open):
            self._discard(draft)

    def land(self, verification: Verification) -> list[Drawn]:
        """Wait for the drawn tokens and give each lane those that plain decoding would give it.

        Returns what is to be reported, in this order; `left` of the group is up to date.
        """
        drafts = verification.drafts
        verdicts = judge(drafts.paths, verification.launch, verification.flight)
        for verdict in verdicts:
            self._settle(drafts, verdict)
        self._append_last(drafts.group, verdicts)
        return self._hand_out(drafts.group, verdicts)

    def _settle(self, drafts: Drafts, verdict: Verdict) -> None:
        """Cut at what ends the lane, let the branch adopt the right draft, drop the others."""
        group, place = drafts.group, verdict.place
        lane = group.lanes[place]
        held, left = verdict.held, int(group.left[place])
        taken = self._decoder.count_taken(lane, verdict.tokens.tolist(), held, left)
        verdict.cut(taken)
        drafted = [path for path in verdict.paths if path.tokens]
        if not drafted:
            return
        kept = verdict.num_guessed
        for path in drafted:
            if path is not verdict.best:
                self._discard(path.handle)
        verdict.status = self._core.adopt(
            lane.handle, verdict.best.handle, held + kept, verdict.logprobs[:kept], held
        )
        if verdict.status:
            self._discard(verdict.best.handle)
            return
        self._open.remove(verdict.best.handle)
        proposed = sum(len(path.tokens) for path in drafted)
        self._counts.add(lane.branch.id, steps=1, proposed=proposed, accepted=kept)
        self._lanes[lane].pace.note(len(verdict.best.tokens), kept)

    def _append_last(self, group: LaneGroup, verdicts: Sequence[Verdict]) -> None:
        """The drawn token that was not guessed, for every lane that takes it."""
        some = [v for v in verdicts if not v.status and len(v.tokens) > v.num_guessed]
        if not some:
            return
        status = self._core.append_batch(
            group.handles[[v.place for v in some]],
            np.array([v.tokens[-1] for v in some], np.int32),
            np.array([v.logprobs[-1] for v in some], np.float32),
            np.array([v.held + v.num_guessed for v in some], np.int32),
        )
        for verdict, code in zip(some, status.tolist(), strict=True):
            if code:
                verdict.refuse(code)

    def _hand_out(self, group: LaneGroup, verdicts: Sequence[Verdict]) -> list[Drawn]:
        """The tokens as plain decoding hands them out: first the first of each lane, and so on."""
        done: list[Drawn] = []
        for depth in range(max(len(v.tokens) for v in verdicts)):
            mine = [v for v in verdicts if len(v.tokens) > depth]
            places = np.array([v.place for v in mine], np.int64)
            some = group.take(places)
            drawn = self._decoder.accept(
                some,
                np.array([v.tokens[depth] for v in mine], np.int32),
                np.array([v.logprobs[depth] for v in mine], np.float32),
                np.array([v.held + depth for v in mine], np.int32),
                {row: v.top[depth] for row, v in enumerate(mine) if v.top},
            )
            group.left[places] = some.left
            done.append(drawn)
        refused = Drawn((), np.zeros(0, np.int32), np.zeros(0, np.float32))
        for verdict in verdicts:
            code = verdict.status or (NOT_FINITE if verdict.is_broken else 0)
            if code:
                self._decoder.refuse(refused, group, verdict.place, code)
        return [*done, refused] if refused.refused else done


def _chances(tokens: Sequence[int]) -> tuple[Chances, ...]:
    return tokens.chances if isinstance(tokens, SampledPath) else ()
