"""Grammars of one engine: compiles them within limits, keeps them, attaches them to branches."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dendrite_engine.config import GrammarLimits, parse_bytes
from dendrite_engine.errors import GrammarError, InvalidArgument, InvalidGrammar
from dendrite_engine.grammar import CONSTRAINTS
from dendrite_engine.grammar.base import I32, ConstraintEngine, Vocabulary
from dendrite_engine.grammar.guide import Guide, Snapshot, allowed_ids, beginning, sync
from dendrite_engine.grammar.specs import Choice, Grammar, JsonSchema

# A chain of references as long as source_bytes allows takes under 64 MB (llguidance 1.9.1).
STACK_BYTES = 256 << 20
_STACK_LOCK = threading.Lock()
MAX_ABANDONED = 4  # compilations that went over their time and still run

# What a compiled grammar takes, about. The process grew by 80 to 170 kB for a small one; for a
# large one by 24 (choice of 1000 texts) to 155 (schema of 100 properties) bytes a byte of text.
_BYTES_EACH, _BYTES_PER_SOURCE_BYTE = 128 << 10, 128


class ModelVocabulary:
    """The tokens of a model as constraint engines want them; see Vocabulary."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self.size = vocab_size
        self.eos_ids = tuple(token for token in eos_ids if token < vocab_size)
        self.special_ids: frozenset[int] = tokenizer.special_ids
        self.token_bytes: Callable[[int], bytes] = tokenizer.token_bytes
        self.to_json: Callable[[], str] = tokenizer.to_json
        self.encode: Callable[[str], list[int]] = tokenizer.encode


class GrammarService:
    """Compiles grammars and attaches them. All methods may be called from any thread.

    Args:
        vocabulary: the model's tokens.
        limits: how much a grammar may cost.

    Attributes:
        limits: the same.
    """

    def __init__(self, vocabulary: Vocabulary, limits: GrammarLimits) -> None:
        self.limits = limits
        self.vocab_size = vocabulary.size
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._engines: dict[str, ConstraintEngine] = {}
        self._cache: OrderedDict[tuple[str, str], tuple[Snapshot, int]] = OrderedDict()
        self._cache_bytes = 0
        self._cache_limit = parse_bytes(limits.cache_bytes)
        self._source_limit = parse_bytes(limits.source_bytes)
        self._abandoned = 0

    @property
    def num_cached(self) -> int:
        """Compiled grammars in the cache."""
        return len(self._cache)

    @property
    def cached_bytes(self) -> int:
        """What they take, as estimated from the length of their texts."""
        return self._cache_bytes

    def engine(self, name: str = "llguidance") -> ConstraintEngine:
        """The constraint engine of this name, made when it is first asked for.

        Raises:
            UnknownName: no such engine; the message lists them.
        """
        with self._lock:
            found = self._engines.get(name)
            if found is None:
                made = CONSTRAINTS.get(name)
                found = self._engines[name] = made(self._vocabulary, self.limits)
            return found

    def report(self) -> str:
        """Which constraint engines run, for `Engine.report()`."""
        made = [f"{name}: {engine.reason}" for name, engine in sorted(self._engines.items())]
        return "; ".join(made) or f"none yet; known: {', '.join(CONSTRAINTS.names())}"

    # -- attaching ----------------------------------------------------------------------------

    def attach(self, branch: Any, grammar: Grammar, start: int, engine: str) -> None:
        """Constrain a branch from its token `start` on.

        Raises:
            InvalidGrammar: it was refused; nothing has changed.
            GrammarError: the branch holds tokens from `start` on that it does not allow.
        """
        first, runner = self.compile(grammar, engine), self.engine(engine)
        guide = Guide(grammar, runner, first, start, first)
        held = branch._core.tokens(branch._handle, start)
        branch._guide = guide.at(np.asarray(held, np.int32))

    def compile(self, grammar: Grammar, engine: str = "llguidance") -> Snapshot:
        """The grammar before its first token, from the cache where it is there.

        Raises:
            InvalidGrammar: malformed, unsatisfiable, over a limit; or no Grammar at all.
        """
        if not isinstance(grammar, Grammar):
            raise InvalidGrammar(
                "a grammar is JsonSchema, Regex, Lark or Choice of dendrite_engine.grammar, got "
                f"{type(grammar).__name__}"
            )
        size = self._check_size(grammar)
        key = (engine, json.dumps(grammar.to_dict(), ensure_ascii=False))
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key][0]
        if isinstance(grammar, JsonSchema):
            self._check_schema(grammar)
        first = self._within_limit(grammar, self.engine(engine))
        self._keep(key, first, _BYTES_EACH + _BYTES_PER_SOURCE_BYTE * size)
        return first

    def _keep(self, key: tuple[str, str], first: Snapshot, size: int) -> None:
        with self._lock:
            if key in self._cache or size > self._cache_limit:
                return
            self._cache[key] = (first, size)
            self._cache_bytes += size
            while self._cache_bytes > self._cache_limit:
                _, (_, freed) = self._cache.popitem(last=False)
                self._cache_bytes -= freed

    def _check_size(self, grammar: Grammar) -> int:
        """Bytes of the grammar's text; refuses what would cost too much just to be read."""
        size = len(grammar.source.encode())
        if size > self._source_limit:
            raise InvalidGrammar(
                f"{grammar.kind} grammar of {size} bytes: more than the limit of "
                f"{self._source_limit} (GrammarLimits.source_bytes)"
            )
        return size

    def _check_schema(self, grammar: JsonSchema) -> None:
        try:
            schema = json.loads(grammar.schema)
        except (ValueError, RecursionError) as error:
            raise InvalidGrammar(f"json grammar: no JSON: {error}") from error
        most = max_properties(schema)
        if most > self.limits.properties:  # llguidance takes time in their square
            raise InvalidGrammar(
                f"json grammar: an object with {most} properties, more than the limit of "
                f"{self.limits.properties} (GrammarLimits.properties)"
            )

    def _within_limit(self, grammar: Grammar, runner: ConstraintEngine) -> Snapshot:
        """Compile and fill the first mask on a thread of its own, which is left behind when time is
        up: fuel ends most of them soon after.
        """
        with self._lock:
            if self._abandoned >= MAX_ABANDONED:
                raise InvalidGrammar(
                    f"{self._abandoned} grammars that took too long are still being compiled; try "
                    "again later"
                )
            self._abandoned += 1  # until it is done
        found: list[Snapshot] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:
                found.append(_first_snapshot(grammar, runner))
            except BaseException as error:  # a panic of the Rust code is no Exception
                failed.append(error)
            finally:
                with self._lock:
                    self._abandoned -= 1

        started = time.monotonic()
        thread = _start_deep(work)
        thread.join(self.limits.compile_seconds)
        if failed:
            raise _refusal(grammar, failed[0]) from failed[0]
        if not found:
            raise InvalidGrammar(
                f"{grammar.kind} grammar: not compiled after {time.monotonic() - started:.2f} s "
                f"(GrammarLimits.compile_seconds is {self.limits.compile_seconds})"
            )
        return found[0]

    # -- questions ----------------------------------------------------------------------------

    def guide(self, branch: Any) -> Guide:
        """The branch's guide at what it holds now.

        Raises:
            InvalidArgument: it has no grammar.
            GrammarError: it holds tokens that its grammar does not allow.
        """
        guide = sync(branch)
        if guide is None:
            raise InvalidArgument(f"branch {branch.id} has no grammar; see Branch.constrain")
        return guide

    def after(self, branch: Any, token_ids: list[int]) -> Guide:
        """The branch's guide once these tokens are appended.

        Raises:
            GrammarError: its grammar does not allow them.
        """
        guide = self.guide(branch)
        held = guide.snapshot.token_ids
        return guide.at(np.concatenate((held, np.array(token_ids, np.int32))))

    def masks(self, branches: Sequence[Any]) -> list[I32 | None]:
        """For each branch which tokens it allows, i32 [words], read-only; None: all of them.

        Raises:
            GrammarError: a grammar can't say.
        """
        return [
            None if branch._guide is None else self.guide(branch).snapshot.mask()
            for branch in branches
        ]

    def allowed(self, branch: Any) -> I32:
        """See Branch.allowed_tokens."""
        return allowed_ids(self.guide(branch).snapshot.mask(), self.vocab_size)

    def alternatives(self, branch: Any, limit: int) -> list[list[int]]:
        """See Branch.alternatives."""
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise InvalidArgument(f"alternatives: limit must be an integer >= 1, got {limit!r}")
        guide = self.guide(branch)
        if isinstance(guide.grammar, Choice):
            return self._options_left(guide, guide.grammar.options, limit)
        eos = set(self._vocabulary.eos_ids)
        ids = [int(t) for t in self.allowed(branch) if int(t) not in eos]
        if len(ids) > limit:
            raise InvalidArgument(f"alternatives: {len(ids)}, more than the limit of {limit}")
        found = []
        for token in ids:
            matcher = guide.snapshot.fork()
            matcher.accept([token])
            found.append([token, *matcher.forced()])
        return found

    def _options_left(self, guide: Guide, options: Sequence[str], limit: int) -> list[list[int]]:
        read = b"".join(map(self._vocabulary.token_bytes, guide.snapshot.token_ids.tolist()))
        left = [o.encode()[len(read) :] for o in options if o.encode().startswith(read)]
        left = [rest for rest in left if rest]
        if len(left) > limit:
            raise InvalidArgument(f"alternatives: {len(left)}, more than the limit of {limit}")
        texts = [rest.decode("utf-8", errors="ignore") for rest in left]
        return [ids for text in texts if (ids := self._vocabulary.encode(text))]


def _start_deep(work: Callable[[], None]) -> threading.Thread:
    """Start a thread with room for deep recursion: llguidance follows chains of thousands of rules
    by recursion, and a stack that overflows ends the process. Stack that is not used takes no
    memory.
    """
    thread = threading.Thread(target=work, name="dendrite-grammar", daemon=True)
    with _STACK_LOCK:  # the size is a setting of the whole process
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread


def _first_snapshot(grammar: Grammar, runner: ConstraintEngine) -> Snapshot:
    first = beginning(runner, runner.compile(grammar))
    if not first.mask().any():
        raise InvalidGrammar(f"{grammar.kind} grammar: no text satisfies it")
    first.forced()
    return first


def _refusal(grammar: Grammar, error: BaseException) -> Exception:
    if isinstance(error, (InvalidGrammar, MemoryError)):
        return error
    if isinstance(error, GrammarError):
        return InvalidGrammar(f"{grammar.kind} grammar: {error}")
    return InvalidGrammar(f"{grammar.kind} grammar: {type(error).__name__}: {str(error)[:300]}")


def max_properties(schema: Any) -> int:
    """Most entries of one object anywhere in a schema. O(size)."""
    most, stack = 0, [schema]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            most = max(most, len(item))
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
    return most
