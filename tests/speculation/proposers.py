"""Proposers for tests: what a plain run gave, that with mistakes, noise, and nothing but errors."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dendrite_engine.speculation import DraftRequest, Speculation

Guess = Callable[[DraftRequest], list[list[int]]]


@dataclass(frozen=True)
class Scripted(Speculation):
    """Asks `guess` for every branch; notes who was forgotten."""

    guess: Guess
    tokens: int = 8
    width: int = 4
    adaptive: bool = False
    forgotten: list[int] = field(default_factory=list)

    def start(self):
        return self

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[list[int]]]:
        return [self.guess(request) for request in requests]

    def forget(self, key: int) -> None:
        self.forgotten.append(key)


def oracle(texts: Sequence[Sequence[int]], mistake_every: int = 0) -> Guess:
    """Guesses from what a plain run gave; every so many guessed tokens one is wrong."""

    def guess(request: DraftRequest) -> list[list[int]]:
        held = len(request.tokens)
        for text in texts:
            if list(text[:held]) == list(request.tokens):
                path = list(text[held : held + request.limit])
                for place in range(len(path)):
                    if mistake_every and (held + place) % mistake_every == 0:
                        path[place] = (path[place] + 1) % 250
                return [path]
        return []

    return guess


def noise(seed: int, vocab: int, width: int = 3) -> Guess:
    """Random paths of random lengths, some of them alike at the beginning."""
    rng = random.Random(seed)

    def guess(request: DraftRequest) -> list[list[int]]:
        trunk = [rng.randrange(vocab) for _ in range(request.limit)]
        paths = []
        for _ in range(rng.randint(0, width)):
            same = rng.randint(0, request.limit)
            length = rng.randint(1, request.limit)
            paths.append([*trunk[:same], *(rng.randrange(vocab) for _ in range(8))][:length])
        return paths

    return guess


def broken(request: DraftRequest) -> list[list[int]]:
    raise RuntimeError(f"no guess for {request.key}")
