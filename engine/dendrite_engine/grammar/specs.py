"""What a text has to look like, in the user's words: JSON schema, regex, Lark, list of choices.

These are values: small, immutable, comparable, and no engine is needed to make one. What they mean
for tokens is a constraint engine's business (see base.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dendrite_engine.errors import InvalidGrammar


@dataclass(frozen=True, slots=True)
class Grammar:
    """Base of everything that `Branch.constrain` takes.

    Attributes:
        kind: name of the kind in `to_dict`.
    """

    kind: ClassVar[str] = ""

    @property
    def source(self) -> str:
        """Its text; together with `kind` the key of the compile cache."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable form that `grammar_from_dict` reads; for files and checkpoints."""
        return {"kind": self.kind, "source": self.source}


@dataclass(frozen=True, slots=True, init=False)
class JsonSchema(Grammar):
    """JSON text that satisfies a schema.

    Without `whitespace` the text is written on one line with these separators: a small model that
    may write blanks between any two tokens likes to write nothing else.

    Args:
        schema: the schema as a dict, as JSON text, or True for any JSON value.
        separators: what stands between items and after keys, as in `json.dumps`.
        whitespace: allow blanks and line breaks wherever JSON does, instead of `separators`.
        lenient: ignore keywords that the constraint engine does not know instead of refusing.

    Raises:
        InvalidGrammar: the schema is no JSON, or holds something that JSON can't.

    Example:
        >>> JsonSchema({"type": "integer"}).source
        '{"type": "integer"}'
    """

    kind: ClassVar[str] = "json"
    schema: str
    separators: tuple[str, str] = (", ", ": ")
    whitespace: bool = False
    lenient: bool = False

    def __init__(
        self,
        schema: Mapping[str, Any] | str | bool,
        *,
        separators: tuple[str, str] = (", ", ": "),
        whitespace: bool = False,
        lenient: bool = False,
    ) -> None:
        object.__setattr__(self, "schema", _schema_text(schema))
        object.__setattr__(self, "separators", _pair(separators))
        object.__setattr__(self, "whitespace", bool(whitespace))
        object.__setattr__(self, "lenient", bool(lenient))

    @property
    def source(self) -> str:
        """The schema as JSON text."""
        return self.schema

    def to_dict(self) -> dict[str, Any]:
        """See Grammar.to_dict."""
        return {
            "kind": self.kind,
            "source": self.schema,
            "separators": list(self.separators),
            "whitespace": self.whitespace,
            "lenient": self.lenient,
        }


@dataclass(frozen=True, slots=True)
class Regex(Grammar):
    r"""Text that a regular expression matches as a whole.

    The syntax is that of Rust's `regex` crate: no look-around and no back references.

    Example:
        >>> Regex(r"\d{4}-\d{2}-\d{2}").source
        '\\d{4}-\\d{2}-\\d{2}'
    """

    kind: ClassVar[str] = "regex"
    pattern: str

    def __post_init__(self) -> None:
        _check_text("Regex.pattern", self.pattern)

    @property
    def source(self) -> str:
        """The pattern."""
        return self.pattern


@dataclass(frozen=True, slots=True)
class Lark(Grammar):
    """Text that a context-free grammar in Lark's notation derives from `start`.

    llguidance's dialect: rules in small letters, terminals in capitals, `%json {...}` for schemas
    inside, special tokens as `<|name|>`.

    Example:
        >>> Lark('start: "a" start "b" | "ab"').source
        'start: "a" start "b" | "ab"'
    """

    kind: ClassVar[str] = "lark"
    text: str

    def __post_init__(self) -> None:
        _check_text("Lark.text", self.text)

    @property
    def source(self) -> str:
        """The grammar's text."""
        return self.text


@dataclass(frozen=True, slots=True, init=False)
class Choice(Grammar):
    """One of several texts.

    Raises:
        InvalidGrammar: there is none, or one is empty or no text.

    Example:
        >>> Choice(["yes", "no"]).options
        ('yes', 'no')
    """

    kind: ClassVar[str] = "choice"
    options: tuple[str, ...]

    def __init__(self, options: Sequence[str]) -> None:
        if isinstance(options, str) or not isinstance(options, Sequence) or not options:
            raise InvalidGrammar(f"Choice needs a list of texts, got {str(options)[:80]!r}")
        for option in options:
            _check_text("Choice.options", option)
        object.__setattr__(self, "options", tuple(dict.fromkeys(options)))

    @property
    def source(self) -> str:
        """The options as a JSON list."""
        return json.dumps(self.options, ensure_ascii=False)


def grammar_from_dict(data: Mapping[str, Any]) -> Grammar:
    """The grammar that `Grammar.to_dict` wrote.

    Raises:
        InvalidGrammar: unknown kind, or a field is missing or wrong.
    """
    if not isinstance(data, Mapping):
        raise InvalidGrammar(f"a stored grammar is a mapping, got {type(data).__name__}")
    kind, source = data.get("kind"), data.get("source")
    if not isinstance(source, str):
        raise InvalidGrammar("a stored grammar needs its `source` as text")
    if kind == Regex.kind:
        return Regex(source)
    if kind == Lark.kind:
        return Lark(source)
    if kind == Choice.kind:
        return Choice(_from_json("Choice", source))
    if kind == JsonSchema.kind:
        return JsonSchema(
            source,
            separators=_pair(data.get("separators", (", ", ": "))),
            whitespace=bool(data.get("whitespace", False)),
            lenient=bool(data.get("lenient", False)),
        )
    raise InvalidGrammar(f"unknown kind of grammar {kind!r}; known: choice, json, lark, regex")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or value == "":
        raise InvalidGrammar(f"{name} must be a text that is not empty, got {str(value)[:80]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidGrammar(f"{name} holds half a character: {error}") from error


def _schema_text(schema: object) -> str:
    if isinstance(schema, str):
        _check_text("JsonSchema.schema", schema)
        return schema
    if not isinstance(schema, (Mapping, bool)):
        raise InvalidGrammar(f"a JSON schema is a dict or text, got {type(schema).__name__}")
    if schema is True:
        return "{}"
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidGrammar(f"the schema can't be written as JSON: {error}") from error
    _check_text("JsonSchema.schema", text)
    return text


def _from_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidGrammar(f"{name}: no JSON: {error}") from error


def _pair(separators: object) -> tuple[str, str]:
    if not isinstance(separators, (tuple, list)) or len(separators) != 2:
        raise InvalidGrammar(f"separators must be two texts, got {separators!r}")
    item, key = separators
    if not (isinstance(item, str) and item.strip(" \t\n\r") == ","):
        raise InvalidGrammar(f"the item separator is a comma and blanks, got {item!r}")
    if not (isinstance(key, str) and key.strip(" \t\n\r") == ":"):
        raise InvalidGrammar(f"the key separator is a colon and blanks, got {key!r}")
    return item, key
