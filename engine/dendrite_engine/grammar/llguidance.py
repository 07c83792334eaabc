"""Constraints by llguidance: a lexer of regex derivatives under an Earley parser, in Rust.

Method: https://github.com/guidance-ai/llguidance. It cuts forced text as the tokenizer itself would
wherever the tokenizer can be asked, and its masks then allow only that next token; so forced tokens
are what masked decoding would have given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

from dendrite_engine.config import GrammarLimits
from dendrite_engine.errors import InvalidGrammar
from dendrite_engine.grammar.base import I32, ConstraintEngine, Matcher, Vocabulary
from dendrite_engine.grammar.specs import Choice, Grammar, JsonSchema, Lark, Regex


class LlgMatcher(Matcher):
    """One LLMatcher; see Matcher.

    A matcher that has stopped because nothing can follow takes no more tokens, the end of the turn
    included; so that one is counted here.
    """

    __slots__ = ("_ended", "_eos_ids", "raw")

    def __init__(self, raw: Any, eos_ids: Sequence[int], ended: int = 0) -> None:
        self.raw, self._eos_ids, self._ended = raw, eos_ids, ended

    def fork(self) -> LlgMatcher:
        """See Matcher.fork."""
        return LlgMatcher(self.raw.deep_copy(), self._eos_ids, self._ended)

    def accept(self, token_ids: Sequence[int]) -> int:
        """See Matcher.accept."""
        if self._ended:
            return 0
        taken = int(self.raw.try_consume_tokens(list(token_ids)))
        if taken < len(token_ids) and token_ids[taken] in self._eos_ids and self._lacks_end:
            self._ended = 1
            taken += 1
        return taken

    @property
    def _lacks_end(self) -> bool:
        return bool(self.is_finished and self.raw.stop_reason() != "EndOfSentence")

    def rollback(self, count: int) -> bool:
        """See Matcher.rollback."""
        count, self._ended = count - self._ended, 0
        if count == 0:
            return True
        return not self.raw.is_error() and bool(self.raw.rollback(count))

    def forced(self) -> list[int]:
        """See Matcher.forced."""
        return [int(token) for token in self.raw.compute_ff_tokens()]

    @property
    def is_accepting(self) -> bool:
        """See Matcher.is_accepting."""
        return not self.raw.is_error() and bool(self.raw.is_accepting())

    @property
    def is_finished(self) -> bool:
        """See Matcher.is_finished."""
        return bool(self.raw.is_stopped()) and not self.raw.is_error()

    @property
    def error(self) -> str:
        """See Matcher.error."""
        return _first_line(self.raw.get_error()) if self.raw.is_error() else ""


class LlguidanceEngine(ConstraintEngine):
    """See the module's first lines."""

    name = "llguidance"

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        super().__init__(vocabulary, limits)
        import llguidance

        self._lib = llguidance
        self._tokenizer, how = _tokenizer(llguidance, vocabulary)
        threads = limits.threads or max(1, min(8, (os.cpu_count() or 2) - 1))
        self._executor = llguidance.LLExecutor(threads)
        self._limits = llguidance.LLParserLimits(
            max_items_in_row=limits.row_items,
            initial_lexer_fuel=limits.lexer_fuel,
            step_lexer_fuel=limits.step_lexer_fuel,
            step_max_items=limits.step_items,
            max_lexer_states=limits.lexer_states,
            max_grammar_size=limits.symbols,
            verbose_errors=False,
        )
        self.reason = f"{how}, {threads} threads"

    def compile(self, grammar: Grammar) -> LlgMatcher:
        """See ConstraintEngine.compile."""
        source = self._source(grammar)
        raw = self._lib.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        if raw.is_error():
            raise InvalidGrammar(f"{grammar.kind} grammar: {_first_line(raw.get_error())}")
        return LlgMatcher(raw, self.vocabulary.eos_ids)

    def fill(self, matchers: Sequence[Matcher], rows: Sequence[int], out: I32) -> None:
        """See ConstraintEngine.fill; the interpreter's lock is free meanwhile."""
        raws = [matcher.raw for matcher in matchers if isinstance(matcher, LlgMatcher)]
        row_bytes = out.shape[1] * 4
        if len(raws) == 1:  # handing one to the executor's threads takes longer than filling it
            raws[0].unsafe_compute_mask_ptr(out.ctypes.data + rows[0] * row_bytes, row_bytes)
            return
        self._executor.unsafe_compute_mask_ptr(
            list(zip(raws, rows, strict=True)), out.ctypes.data, row_bytes, out.shape[0]
        )

    def _source(self, grammar: Grammar) -> str:
        matcher = self._lib.LLMatcher
        if isinstance(grammar, JsonSchema):
            try:
                return str(matcher.grammar_from_json_schema(grammar.schema, None, _json(grammar)))
            except ValueError as error:
                raise InvalidGrammar(f"json grammar: {_first_line(str(error))}") from error
        if isinstance(grammar, Regex):
            return str(matcher.grammar_from_regex(grammar.pattern))
        if isinstance(grammar, Lark):
            return str(matcher.grammar_from_lark(grammar.text))
        if isinstance(grammar, Choice):  # one terminal: a prefix tree in one automaton
            options = " | ".join(
                json.dumps(option, ensure_ascii=False) for option in grammar.options
            )
            return str(matcher.grammar_from_lark(f"start: OPTION\nOPTION: {options}"))
        raise InvalidGrammar(f"llguidance does not know grammars of kind {grammar.kind!r}")


def _json(grammar: JsonSchema) -> Any:
    options: dict[str, Any] = {"lenient": grammar.lenient}
    if grammar.whitespace:
        return {**options, "whitespace_flexible": True}
    item, key = grammar.separators
    return {**options, "whitespace_flexible": False, "item_separator": item, "key_separator": key}


class _Wrapped:
    """A tokenizer as llguidance's TokenizerWrapper wants it: bytes of every token, and a call."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos_ids[0]
        self.bos_token_id = None
        self.tokens = [vocabulary.token_bytes(token) for token in range(vocabulary.size)]
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._encode: Callable[[str], list[int]] = vocabulary.encode

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._encode(text)


def _tokenizer(lib: Any, vocabulary: Vocabulary) -> tuple[Any, str]:
    """llguidance's tokenizer: read by itself where it knows the kind, else made of the bytes of
    every token.
    """
    size, eos = vocabulary.size, list(vocabulary.eos_ids)
    if not eos:
        raise InvalidGrammar("the model has no end-of-turn token, which a grammar needs")
    try:
        made = lib.LLTokenizer(vocabulary.to_json(), n_vocab=size, eos_token=eos)
        return made, f"llguidance {lib.__version__ if hasattr(lib, '__version__') else ''}".strip()
    except ValueError as error:
        wrapped = lib.TokenizerWrapper(_Wrapped(vocabulary))
        made = lib.LLTokenizer(wrapped, n_vocab=size, eos_token=eos)
        return made, f"llguidance with wrapped tokens ({_first_line(str(error))})"


def _first_line(text: str) -> str:
    """An error without the parser's state that follows it."""
    lines = [line.strip() for line in text.split("<state>")[0].splitlines() if line.strip()]
    said = " ".join(line for line in lines if line != "<non-verbose/>")[:300]
    if said.startswith("NoExtension"):
        return "no text satisfies it from here"
    return said or "no reason given"
