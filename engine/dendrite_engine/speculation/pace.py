"""How long the next draft of a branch is, from how the last ones did."""

from __future__ import annotations

_PRIOR_RIGHT, _PRIOR_TRIALS = 1.4, 2.0  # what a branch starts with: 7 of 10 guesses are right
_MEMORY = 0.9  # weight of the past after each verified draft
_MOST_TRIALS = 12.0  # what is remembered, so that a change of the text is noticed soon
_LONGEST_REST = 64
_REST_FOR_NOTHING = 4
_LEAST_GAIN = 1.03


class Pace:
    """Chooses draft lengths so that tokens per second are most.

    If each guess is right with probability a, a draft of k tokens gives 1 + a + ... + a^k tokens in
    expectation (Leviathan et al. 2023, eq. 1) and costs 1 + c k plain steps, where c is what one
    more row (and one more guess) costs. The best k follows; where no k is worth it, the branch
    rests and tries again after 1, 2, 4, ... 64 steps. `a` is the recent share of right guesses.
    Nothing here reads a clock, so the same text is drafted in the same way every time.

    Args:
        longest: tokens of a draft at most.
        row_cost: one more row in a plain step of one row, as a share of that step.
        token_cost: what guessing a token costs, as a share of the same step.
        adaptive: False always gives `longest`.
    """

    def __init__(
        self, longest: int, row_cost: float, token_cost: float = 0.0, *, adaptive: bool = True
    ) -> None:
        self._longest, self._adaptive = longest, adaptive
        self._row_cost, self._token_cost = row_cost, token_cost
        self._right, self._trials = _PRIOR_RIGHT, _PRIOR_TRIALS
        self._wait = self._rest = 0

    @property
    def rests(self) -> bool:
        """Whether the next step is to have no draft."""
        return self._wait > 0

    def tick(self) -> None:
        """A step went by without a draft."""
        self._wait = max(self._wait - 1, 0)

    def length(self, lanes: int) -> int:
        """Tokens of the next draft, 0 for none, in a step of so many lanes.

        A step of n lanes costs 1 + row_cost (n - 1), so the more lanes there are, the nearer a
        row's share of it comes to that of a lane, and the fewer guesses are worth their rows.
        """
        if not self._adaptive:
            return self._longest
        if self.rests:
            return 0
        share = lanes * self._row_cost / (1 + self._row_cost * (lanes - 1))
        cost = share + self._token_cost
        accept = min(self._right / self._trials, 0.98)
        best, best_gain = 0, _LEAST_GAIN
        tokens, chance = 1.0, 1.0
        for length in range(1, self._longest + 1):
            chance *= accept
            tokens += chance
            gain = tokens / (1 + cost * length)
            if gain > best_gain:
                best, best_gain = length, gain
        return best or self._begin_rest()

    def note(self, proposed: int, accepted: int) -> None:
        """A draft of one continuation with `proposed` tokens was verified."""
        right = self._right * _MEMORY + accepted
        trials = self._trials * _MEMORY + min(accepted + 1, proposed)
        weight = min(1.0, _MOST_TRIALS / trials)
        self._right, self._trials = right * weight, trials * weight
        if accepted == proposed:
            self._rest = 0

    def note_nothing(self) -> None:
        """There was nothing to guess, and looking was not free."""
        self._wait = _REST_FOR_NOTHING

    def _begin_rest(self) -> int:
        """Rest for twice as long as the last time, and forget most of what led to it."""
        self._wait = self._rest = min(max(2 * self._rest, 1), _LONGEST_REST)
        self._right, self._trials = _PRIOR_RIGHT / 2, _PRIOR_TRIALS / 2
        return 0
