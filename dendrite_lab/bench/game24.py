"""The Game of 24: puzzles, legal moves, and a verifier of what was written.

Four numbers become one in three steps, each of which takes two numbers and puts the result of
+, -, * or / in their place; the last has to be 24. A text is one step a line, such as `8+4=12`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations

GOAL = Fraction(24)
Numbers = tuple[Fraction, ...]

_PROMPT = """\
Make 24 from four numbers in three steps. A step takes two of the numbers and puts the result in \
their place.

4 4 6 8
8+4=12
6-4=2
12*2=24

2 9 10 12
12*2=24
10-9=1
24*1=24

"""


def puzzles(count: int, seed: int) -> list[tuple[int, ...]]:
    """`count` different puzzles that can be solved, the same ones for the same seed."""
    source = random.Random(seed)  # noqa: S311 no secret depends on it
    found: dict[tuple[int, ...], None] = {}
    while len(found) < count:
        numbers = tuple(sorted(source.randint(1, 13) for _ in range(4)))
        if numbers not in found and can_reach(tuple(map(Fraction, numbers))):
            found[numbers] = None
    return list(found)


@cache
def can_reach(numbers: Numbers) -> bool:
    """Whether 24 can be made of these numbers; by trying everything."""
    if len(numbers) == 1:
        return numbers[0] == GOAL
    return any(can_reach(left) for _, left in steps(numbers))


def prompt(puzzle: Sequence[int]) -> str:
    """Two solved examples and the puzzle."""
    return _PROMPT + " ".join(map(str, puzzle)) + "\n"


def steps(numbers: Numbers) -> Iterator[tuple[str, Numbers]]:
    """Every legal step, as a line and the numbers that are left, in ascending order.

    Differences are not negative: with them every solution can be written.
    """
    seen: set[str] = set()
    for i, j in combinations(range(len(numbers)), 2):
        low, high = sorted((numbers[i], numbers[j]))
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        for a, sign, b, result in _results(high, low):
            line = f"{a}{sign}{b}={result}\n"
            if line not in seen:
                seen.add(line)
                yield line, tuple(sorted([*rest, result]))


def _results(high: Fraction, low: Fraction) -> Iterator[tuple[Fraction, str, Fraction, Fraction]]:
    yield high, "+", low, high + low
    yield high, "-", low, high - low
    yield high, "*", low, high * low
    if low:
        yield high, "/", low, high / low
    if high and high != low:
        yield low, "/", high, low / high


def left_after(puzzle: Sequence[int], text: str) -> Numbers | None:
    """Numbers left after the steps of a text; `None` where one of them is not legal."""
    numbers: Numbers = tuple(sorted(map(Fraction, puzzle)))
    for line in text.split("\n\n")[0].splitlines():
        if not line.strip():
            continue
        legal = dict(steps(numbers))
        found = legal.get(line.strip() + "\n")
        if found is None:
            return None
        numbers = found
    return numbers


def solved(puzzle: Sequence[int], text: str) -> bool:
    """Whether a text solves a puzzle: three legal steps that end with 24."""
    return left_after(puzzle, text) == (GOAL,)


def legal_moves(puzzle: Sequence[int], text: str) -> list[str]:
    """Steps that may follow a text, each a line."""
    left = left_after(puzzle, text)
    return [] if left is None or len(left) == 1 else [line for line, _ in steps(left)]
