"""What became of a lane's guesses: follow them as far as they equal the drawn tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dendrite_engine.drawn import Launch
from dendrite_engine.forward import Flight
from dendrite_engine.speculation.base import Chances
from dendrite_engine.speculation.rejection import follow, logprob_of


class Path(NamedTuple):
    """One continuation of a lane, and the handle whose rows compute it.

    Attributes:
        place: of the lane in its group.
        handle: of a draft, or of the branch itself where there are no guesses.
        tokens: the guesses.
        chances: what they were drawn from, where they are verified by rejection.
    """

    place: int
    handle: int
    tokens: tuple[int, ...]
    chances: tuple[Chances, ...] = ()


@dataclass(slots=True)
class Verdict:
    """What a lane gets.

    Attributes:
        place: of the lane in its group.
        paths: its paths.
        best: the path whose guesses were right for longest.
        held: tokens that its branch held.
        num_guessed: tokens it gets that were guessed; they come first.
        tokens: i32 [n], logprobs f32 [n]: all that it gets.
        logprobs: see tokens.
        top: (ids, log-probabilities) of alternatives, one a token, where the lane reports them.
        is_broken: the row behind `tokens` was not finite.
        status: 0, or why the tokens after `tokens` were refused, as in TreeCore.append_batch.
    """

    place: int
    paths: list[Path]
    best: Path
    held: int
    num_guessed: int
    tokens: np.ndarray
    logprobs: np.ndarray
    top: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    is_broken: bool = False
    status: int = 0

    def cut(self, taken: int) -> None:
        """Only the first `taken` tokens count."""
        if taken < len(self.tokens):
            self.tokens, self.logprobs = self.tokens[:taken], self.logprobs[:taken]
            self.num_guessed = min(self.num_guessed, taken)
            self.is_broken = False

    def refuse(self, status: int) -> None:
        """The token that was not guessed could not be appended."""
        self.status = status
        self.tokens = self.tokens[: self.num_guessed]
        self.logprobs = self.logprobs[: self.num_guessed]


def judge(paths: Sequence[Path], launch: Launch, flight: Flight) -> list[Verdict]:
    """One verdict for each lane, in the order of their places.

    Args:
        paths: of all lanes, those of a lane behind each other.
        launch: what was drawn from the rows, a path's last known token first, then its guesses.
        flight: the pass that computed them.
    """
    tokens, logprobs = launch.tokens.wait()
    if any(path.chances for path in paths):
        tokens, logprobs = tokens.copy(), logprobs.copy()
        _reject(paths, launch, flight, tokens, logprobs)
    top = None if launch.top is None else launch.top.wait()
    places = {row: i for i, row in enumerate(launch.group.with_top)}
    first_rows = np.cumsum([0, *(len(path.tokens) + 1 for path in paths)]).tolist()
    of_lane: dict[int, list[tuple[Path, int]]] = {}
    for path, row in zip(paths, first_rows, strict=False):
        of_lane.setdefault(path.place, []).append((path, row))
    verdicts = []
    for place, mine in of_lane.items():
        rows, best = _follow(mine, tokens)
        finite = tokens[rows] >= 0
        held = int(launch.held[mine[0][1]])
        verdict = Verdict(
            place, [path for path, _ in mine], best, held, len(rows) - 1, tokens[rows],
            logprobs[rows], is_broken=not finite[-1],
        )  # fmt: skip
        if top is not None and rows[0] in places:
            verdict.top = [(top[0][places[row]], top[1][places[row]]) for row in rows]
        if verdict.is_broken:
            verdict.tokens, verdict.logprobs = verdict.tokens[:-1], verdict.logprobs[:-1]
        verdicts.append(verdict)
    return verdicts


def _reject(
    paths: Sequence[Path],
    launch: Launch,
    flight: Flight,
    tokens: np.ndarray,
    logprobs: np.ndarray,
) -> None:
    """Put what rejection decides where the drawn tokens were, so that both are followed alike."""
    batch = launch.group.settings.batch(launch.held)
    first = 0
    for path in paths:
        if path.chances:
            kept, instead = follow(
                path.tokens, path.chances, flight.logits, flight.rows, batch, first, launch.held,
                launch.group.lanes[first].sampler,
            )  # fmt: skip
            found = [*path.tokens[:kept], *([] if instead is None else [instead])]
            for row, token in enumerate(found, start=first):
                tokens[row] = token
                logprobs[row] = logprob_of(flight.logits[int(flight.rows[row])].numpy(), token)
        first += len(path.tokens) + 1


def _follow(paths: list[tuple[Path, int]], tokens: np.ndarray) -> tuple[list[int], Path]:
    """Rows whose draws count, and the path that they follow."""
    rows: list[int] = []
    while True:
        path, first = paths[0]
        depth = len(rows)
        rows.append(first + depth)
        drawn = int(tokens[first + depth])
        going = [
            (other, row)
            for other, row in paths
            if len(other.tokens) > depth and other.tokens[depth] == drawn
        ]
        if not going:
            return rows, path
        paths = going
