"""Constraints in plain Python: the twin that small regexes and choices are checked against.

A state is the set of texts that may still follow, as an expression over bytes; reading a byte takes
its derivative (Brzozowski, Derivatives of Regular Expressions, JACM 1964). A token is allowed where
the derivative by its bytes is not empty. Nothing is precomputed: a mask costs O(vocabulary).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from dendrite_engine.config import GrammarLimits
from dendrite_engine.errors import InvalidGrammar
from dendrite_engine.grammar.base import I32, ConstraintEngine, Matcher, Vocabulary
from dendrite_engine.grammar.regex_tree import (
    EMPTY,
    Node,
    any_of,
    derivative,
    first_bytes,
    is_nullable,
    literal,
    parse_regex,
)
from dendrite_engine.grammar.specs import Choice, Grammar, Regex

_ENDED = "<ended>"  # a state of its own: an end-of-turn token was read


class ReferenceMatcher(Matcher):
    """The expressions behind every token read; see Matcher."""

    def __init__(self, engine: ReferenceEngine, states: list[Node | str]) -> None:
        self._engine, self._states = engine, states

    def fork(self) -> ReferenceMatcher:
        """See Matcher.fork."""
        return ReferenceMatcher(self._engine, list(self._states))

    def accept(self, token_ids: Sequence[int]) -> int:
        """See Matcher.accept."""
        for count, token in enumerate(token_ids):
            after = self.after(token)
            if after == EMPTY:
                return count
            self._states.append(after)
        return len(token_ids)

    def after(self, token: int) -> Node | str:
        """The state behind one more token; EMPTY where it is not allowed."""
        state = self._states[-1]
        if isinstance(state, str):
            return EMPTY
        if token in self._engine.vocabulary.eos_ids:
            return _ENDED if is_nullable(state) else EMPTY
        return self._engine.step(state, token)

    def rollback(self, count: int) -> bool:
        """See Matcher.rollback."""
        del self._states[len(self._states) - count :]
        return True

    def forced(self) -> list[int]:
        """See Matcher.forced: the text that is left is cut as the tokenizer cuts it, except for its
        last token, which what follows might lengthen.
        """
        state, text = self._states[-1], bytearray()
        while not isinstance(state, str) and not is_nullable(state):
            bytes_ = first_bytes(state)
            if len(bytes_) != 1:
                break
            (byte,) = bytes_
            text.append(byte)
            state = derivative(state, byte)
        ids = self._engine.vocabulary.encode(text.decode("utf-8", errors="ignore"))
        return ids[:-1]

    @property
    def is_accepting(self) -> bool:
        """See Matcher.is_accepting."""
        state = self._states[-1]
        return isinstance(state, str) or is_nullable(state)

    @property
    def is_finished(self) -> bool:
        """See Matcher.is_finished."""
        state = self._states[-1]
        return isinstance(state, str) or (is_nullable(state) and not first_bytes(state))

    @property
    def error(self) -> str:
        """See Matcher.error: there are none."""
        return ""


class ReferenceEngine(ConstraintEngine):
    """Regex and Choice only; see the module's first lines."""

    name = "reference"
    reason = "plain Python"

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        super().__init__(vocabulary, limits)
        skipped = {*vocabulary.eos_ids, *vocabulary.special_ids}
        self._texts = {
            token: text
            for token in range(vocabulary.size)
            if token not in skipped and (text := vocabulary.token_bytes(token))
        }
        self.step = lru_cache(maxsize=1 << 16)(self._step)

    def compile(self, grammar: Grammar) -> ReferenceMatcher:
        """See ConstraintEngine.compile."""
        if isinstance(grammar, Regex):
            tree = parse_regex(grammar.pattern)
        elif isinstance(grammar, Choice):
            tree = any_of([literal(option.encode()) for option in grammar.options])
        else:
            raise InvalidGrammar(f"the reference engine has no grammars of kind {grammar.kind!r}")
        return ReferenceMatcher(self, [tree])

    def _step(self, state: Node, token: int) -> Node:
        text = self._texts.get(token)
        if text is None:
            return EMPTY
        for byte in text:
            state = derivative(state, byte)
            if state == EMPTY:
                break
        return state

    def fill(self, matchers: Sequence[Matcher], rows: Sequence[int], out: I32) -> None:
        """See ConstraintEngine.fill."""
        for matcher, row in zip(matchers, rows, strict=True):
            mask = out[row].view("uint32")
            mask[:] = 0
            if not isinstance(matcher, ReferenceMatcher):
                continue
            for token in (*self._texts, *self.vocabulary.eos_ids):
                if matcher.after(token) != EMPTY:
                    mask[token // 32] |= 1 << (token % 32)
