"""Contract of a constraint engine: from a grammar to the tokens that may come next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dendrite_engine.config import GrammarLimits
from dendrite_engine.grammar.specs import Grammar

I32 = NDArray[np.int32]


class Vocabulary(Protocol):
    """What a constraint engine has to know about a model's tokens.

    Attributes:
        size: logits of a row, which may be more than there are tokens.
        eos_ids: tokens that end a turn: allowed where the text so far satisfies the grammar.
        special_ids: tokens that stand for no text.
    """

    size: int
    eos_ids: tuple[int, ...]
    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for; b"" for an id without one."""

    def to_json(self) -> str:
        """The tokenizer as the text of a Hugging Face tokenizer.json."""

    def encode(self, text: str) -> list[int]:
        """The tokenizer's own ids of a text."""


class Matcher(ABC):
    """A grammar after some tokens. Not thread-safe; engines may use threads inside one call."""

    @abstractmethod
    def fork(self) -> Matcher:
        """A copy that goes on independently."""

    @abstractmethod
    def accept(self, token_ids: Sequence[int]) -> int:
        """Move on over tokens; returns how many were allowed. It stands behind these then."""

    @abstractmethod
    def rollback(self, count: int) -> bool:
        """Take back the last `count` tokens; False where that can't be done (start afresh then)."""

    @abstractmethod
    def forced(self) -> list[int]:
        """Tokens that must come next because the grammar leaves no choice, in the tokenizer's own
        way to cut their text; [] where there is a choice.
        """

    @property
    @abstractmethod
    def is_accepting(self) -> bool:
        """Whether the text so far satisfies the grammar."""

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether it does and nothing but an end-of-turn token can follow."""

    @property
    @abstractmethod
    def error(self) -> str:
        """Why it can't go on; "" where it can. An error stays."""


class ConstraintEngine(ABC):
    """Compiles grammars and fills masks for one vocabulary.

    Args:
        vocabulary: the model's tokens.
        limits: how much a grammar may cost.

    Attributes:
        name: key in the registry.
        reason: what it is, for `Engine.report()`.
    """

    name: str
    reason: str = ""

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        self.vocabulary, self.limits = vocabulary, limits
        self.words = -(-vocabulary.size // 32)

    @abstractmethod
    def compile(self, grammar: Grammar) -> Matcher:
        """The grammar before the first token. May be called from any thread.

        Raises:
            InvalidGrammar: it is malformed, of a kind that this engine does not know, or too large.
        """

    @abstractmethod
    def fill(self, matchers: Sequence[Matcher], rows: Sequence[int], out: I32) -> None:
        """Write which tokens may come next, for several matchers at once.

        Args:
            matchers: n matchers of this engine, none of them twice.
            rows: row of `out` of each.
            out: i32 [R, ceil(vocab / 32)], C-contiguous: bit v % 32 of word v // 32 is token v.
                A matcher that fails says so in `error`, and its row does not matter then.
        """
