"""A constraint engine that fails on purpose where a grammar begins with `b`."""

from __future__ import annotations

import threading
from typing import ClassVar

from dendrite_engine.grammar.reference import ReferenceEngine, ReferenceMatcher


class Panic(BaseException):
    """What a panic of Rust code looks like: no Exception."""


class FaultyMatcher(ReferenceMatcher):
    """Counts the tokens it has read; fails behind the second."""

    def __init__(self, engine, states, is_bad=False) -> None:
        super().__init__(engine, states)
        self.is_bad, self.broken = is_bad, ""

    def fork(self) -> FaultyMatcher:
        return FaultyMatcher(self._engine, list(self._states), self.is_bad)

    def accept(self, token_ids) -> int:
        if self.is_bad and len(self._states) == 2 and FaultyEngine.fault == "accept panic":
            raise Panic("while reading")
        return super().accept(token_ids)

    def forced(self) -> list[int]:
        if self.fails and FaultyEngine.fault == "forced panic":
            raise Panic("while looking ahead")
        return super().forced()

    @property
    def fails(self) -> bool:
        return self.is_bad and len(self._states) > 2

    @property
    def error(self) -> str:
        return self.broken


class FaultyEngine(ReferenceEngine):
    """`fault` says how it fails, `calls` counts fills."""

    fault: ClassVar[str] = "error"
    released: ClassVar[threading.Event] = threading.Event()

    def compile(self, grammar) -> FaultyMatcher:
        if self.fault == "slow compile":
            self.released.wait()
        if self.fault == "compile panic":
            raise Panic("the compiler is broken")
        made = super().compile(grammar)
        return FaultyMatcher(self, made._states, grammar.source.startswith("b"))

    def fill(self, matchers, rows, out) -> None:
        super().fill(matchers, rows, out)
        for matcher, row in zip(matchers, rows, strict=True):
            if matcher.fails:
                self._fail(matcher, out[row])

    def _fail(self, matcher, mask) -> None:
        if self.fault == "error":
            matcher.broken = "fuel exhausted"
        elif self.fault == "empty":
            mask[:] = 0
        elif self.fault == "raise":
            raise ValueError("wrong mask size")
        elif self.fault == "panic":
            raise Panic("num_parents < 0xff")
        elif self.fault == "hang":
            self.released.wait()
