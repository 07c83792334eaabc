"""Where guesses come from, how many there are, and what constraints make of them."""

from __future__ import annotations

import numpy as np
import pytest
from proposers import Scripted

from dendrite_engine import SamplingParams
from dendrite_engine.speculation.constrained import keep_allowed, masks_along
from dendrite_engine.speculation.pace import Pace
from dendrite_engine.speculation.prompt_lookup import NgramIndex


def brute_force(tokens: list[int], longest: int, shortest: int, limit: int) -> list[int]:
    """The continuation of the latest earlier occurrence of the longest n-gram at the end."""
    for size in range(min(longest, len(tokens)), shortest - 1, -1):
        tail = tokens[-size:]
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tail:
                text = list(tokens)
                for i in range(limit):
                    text.append(text[end + i])
                return text[len(tokens) :]
    return []


def test_lookup_finds_what_a_search_through_the_text_finds():
    rng = np.random.default_rng(0)
    for alphabet in (2, 4, 30):
        tokens: list[int] = []
        index = NgramIndex(4, 2)
        for token in rng.integers(0, alphabet, 300).tolist():
            tokens.append(token)
            index.update(7, tokens)
            found = index.continuations(7, 6, 1)
            assert (found[0] if found else []) == brute_force(tokens, 4, 2, 6)


def test_several_continuations_begin_with_different_tokens_latest_first():
    index = NgramIndex(3, 2)
    index.update(0, [1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 3, 9, 1, 2])
    assert index.continuations(0, 2, 1) == [[3, 9]]
    assert index.continuations(0, 2, 3) == [[3, 9], [4, 0]]


def test_siblings_share_one_index_also_when_they_say_the_same():
    index = NgramIndex(3, 2)
    text = [1, 2, 3, 4, 1, 2]
    for key in range(6):
        index.update(key, list(text))
    index.update(9, [8, 1, 2])
    assert index.continuations(9, 3, 1) == [[3, 4, 1]]
    assert index.continuations(0, 3, 1) == [[3, 4, 1]]


def test_pace_is_long_where_guesses_are_right_and_rests_where_they_are_wrong():
    pace = Pace(10, 0.05)
    for _ in range(20):
        length = pace.length(1)
        pace.note(length, length)
    assert pace.length(1) == 10
    drafted = 0
    for _ in range(1000):
        length = pace.length(1)
        if length:
            drafted += length
            pace.note(length, 0)
        else:
            pace.tick()
    assert drafted * 0.05 < 0.02 * 1000  # the rows cost less than 2 % of the steps


def test_pace_is_shorter_the_more_lanes_and_the_dearer_guesses_are():
    def length(lanes: int, cost: float = 0.0) -> int:
        pace = Pace(16, 0.05, cost)
        for _ in range(30):
            pace.note(4, 3)
        return pace.length(lanes)

    lengths = [length(lanes) for lanes in (1, 4, 16, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    assert length(1, 0.5) < length(1, 0.1) < length(1)


def test_pace_has_the_length_that_is_best_in_expectation():
    """Against a simulation of the two costs and many coins."""
    rng = np.random.default_rng(1)
    accept, cost = 0.75, 0.08
    pace = Pace(12, cost)
    pace._right, pace._trials = accept * 1000, 1000.0
    coins = rng.random((20000, 13)) < accept
    runs = np.argmin(coins, axis=1)
    gains = [(1 + np.minimum(runs, k).mean()) / (1 + cost * k) for k in range(13)]
    assert abs(pace.length(1) - int(np.argmax(gains))) <= 1


def test_a_pace_that_does_not_adapt_always_gives_the_longest():
    pace = Pace(5, 0.05, adaptive=False)
    for _ in range(50):
        assert pace.length(64) == 5
        pace.note(5, 0)


class Rising:
    """Allows tokens that are larger than the one before."""

    def __init__(self, last: int = 0) -> None:
        self.path = [last]

    def advance(self, token_id: int) -> bool:
        if token_id <= self.path[-1]:
            return False
        self.path.append(token_id)
        return True

    def rollback(self, n: int) -> None:
        del self.path[len(self.path) - n :]

    def fill_mask(self, out: np.ndarray) -> None:
        bits = np.arange(len(out) * 32) > self.path[-1]
        out[:] = np.packbits(bits, bitorder="little").view(np.int32)


class Holder:
    def __init__(self, constraint) -> None:
        self.constraint = constraint


def test_guesses_end_before_what_a_constraint_refuses_and_its_state_stays():
    holder = Holder(Rising(3))
    assert keep_allowed(holder, [4, 9, 9, 12]) == [4, 9]
    assert keep_allowed(holder, [3]) == []
    assert keep_allowed(Holder(None), [9, 1]) == [9, 1]
    assert keep_allowed(Holder(object()), [9, 1]) == []
    assert holder.constraint.path == [3]


def test_every_row_gets_the_mask_of_the_guesses_before_it():
    constraint = Rising(2)
    masks = masks_along(constraint, [5, 40], 3)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    assert [int(row.argmax()) for row in bits] == [3, 6, 41]
    assert constraint.path == [2]


@pytest.mark.parametrize("width", [1, 2])
def test_what_is_drawn_under_a_constraint_is_allowed(make_engine, monkeypatch, width):
    """A branch whose constraint is fed by its own tokens, through guesses that are often wrong."""
    from dendrite_engine.tree.branch import Branch

    engine = make_engine()
    root = engine.prompt("ab")
    (branch,) = root.fork()

    def constraint(self):
        held = self.token_ids[root.num_tokens :]
        rising = Rising(0)
        return rising if all(map(rising.advance, held)) else None

    monkeypatch.setattr(Branch, "constraint", property(constraint), raising=False)

    def guess(request):
        last = request.tokens[-1]
        return [[last + 1, last + 3, last + 2], [last + 2, last + 9]][:width]

    branch.extend([3])
    params = SamplingParams(temperature=3.0, max_tokens=8, ignore_eos=True)
    engine.complete([branch], params, speculate=Scripted(guess))
    drawn = branch.token_ids[root.num_tokens : -1]  # no guess is made for the last one
    assert len(drawn) == 8
    assert drawn == sorted(set(drawn))
