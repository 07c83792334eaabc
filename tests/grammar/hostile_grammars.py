"""Grammars made to hurt, by families: deep, huge, catastrophic, unsatisfiable, of wrong types."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from dendrite_engine.grammar import Choice, Grammar, JsonSchema, Lark, Regex

Make = Callable[[], Grammar]
SIZES = (10, 100, 1000, 10_000, 25_000)


def _deep(opening: str, inner: str, closing: str, n: int) -> str:
    return opening * n + inner + closing * n


def _chain(n: int, entry: Callable[[int], Any], last: Any) -> str:
    """A schema whose definitions refer to one another, n of them."""
    definitions = {f"a{i}": entry(i) for i in range(n)}
    return json.dumps({"$defs": {**definitions, f"a{n}": last}, "$ref": "#/$defs/a0"})


def _ref(i: int) -> dict[str, str]:
    return {"$ref": f"#/$defs/a{i}"}


JSON: dict[str, Callable[[int], Any]] = {
    "deep arrays": lambda n: _deep('{"type":"array","items":', "{}", "}", n),
    "deep allOf": lambda n: _deep('{"allOf":[', "{}", "]}", n),
    "deep objects": lambda n: _deep('{"properties":{"a":', "{}", "}}", n),
    "deep not": lambda n: _deep('{"not":', "{}", "}", n),
    "enum": lambda n: {"enum": [f"value {i}" for i in range(n)]},
    "enum of long texts": lambda n: {"enum": ["x" * n + str(i) for i in range(20)]},
    "anyOf": lambda n: {"anyOf": [{"type": "object", "required": [f"k{i}"]} for i in range(n)]},
    "properties": lambda n: {"properties": {f"k{i}": {"type": "string"} for i in range(n)}},
    "required": lambda n: {"type": "object", "required": [f"k{i}" for i in range(n)]},
    "chain of references": lambda n: _chain(n, lambda i: _ref(i + 1), {"type": "string"}),
    "chain of objects": lambda n: _chain(
        n, lambda i: {"properties": {"k": _ref(i + 1)}, "required": ["k"]}, {"type": "string"}
    ),
    "doubling references": lambda n: _chain(
        n, lambda i: {"allOf": [_ref(i + 1), _ref(i + 1)]}, {"type": "string"}
    ),
    "doubling arrays": lambda n: _chain(
        n, lambda i: {"type": "array", "items": {"anyOf": [_ref(i + 1), _ref(i + 1)]}}, {}
    ),
    "long string": lambda n: {"type": "string", "minLength": n, "maxLength": n},
    "long array": lambda n: {"type": "array", "minItems": n, "maxItems": n, "items": {"const": 1}},
    "wide number": lambda n: {"type": "integer", "minimum": 0, "maximum": 10 ** min(n, 4000)},
    "narrow number": lambda n: f'{{"type": "number", "multipleOf": 1e-{n}}}',
    "pattern": lambda n: {"type": "string", "pattern": f"^(a+)+{{{n}}}b$"},
    "pattern of alternatives": lambda n: {"type": "string", "pattern": "(a|a?)" * min(n, 9000)},
}
REGEX: dict[str, Callable[[int], str]] = {
    "deep groups": lambda n: _deep("(", "a", ")", n),
    "nested repeats": lambda n: "(a+)+" * n + "b",
    "optional letters": lambda n: "a?" * n + "a" * n,
    "count": lambda n: f"a{{{n}}}",
    "count of counts": lambda n: f"((a{{{n}}}){{{n}}}){{{n}}}",
    "late count of counts": lambda n: f"[xy]((a{{{n}}}){{{n}}}){{{n}}}",
    "exponential automaton": lambda n: f"(a|b)*a(a|b){{{n}}}",
    "letters of the world": lambda n: f"(\\p{{L}}|\\p{{N}}){{{n}}}",
    "alternatives": lambda n: "|".join(f"w{i}x" for i in range(n)),
    "overlapping alternatives": lambda n: "(" + "|".join("a" * (i % 99) for i in range(n)) + ")*b",
    "open classes": lambda n: "[" * n,
    "stars": lambda n: "a" + "*" * n,
}
LARK: dict[str, Callable[[int], str]] = {
    "deep groups": lambda n: "start: " + _deep("(", '"a"', ")", n),
    "deep options": lambda n: "start: " + _deep("[", '"a"', "]", n),
    "chain of rules": lambda n: (
        "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1} | "y"' for i in range(n)) + f'\nr{n}: "z"'
    ),
    "chain of terminals": lambda n: (
        "start: T0\n" + "\n".join(f'T{i}: "x" T{i + 1}' for i in range(n)) + f'\nT{n}: "z"'
    ),
    "doubling rules": lambda n: (
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(n)) + f'\nr{n}: "z"'
    ),
    "count": lambda n: f'start: "a"{{{n}}}',
    "count of counts": lambda n: f'start: b{{{n}}}\nb: c{{{n}}}\nc: "a"{{{n}}}',
    "contradiction": lambda n: f"start: A\nA: /(a|b)*a(a|b){{{n}}}/ & /(a|b)*b(a|b){{{n}}}/",
    "many ways": lambda n: "start: e\ne: " + " | ".join(["e e", '"a"', "e e e", ""] * min(n, 9000)),
}
FIXED: dict[str, Make] = {
    "refers to itself": lambda: JsonSchema({"$ref": "#"}),
    "endless object": lambda: JsonSchema(
        {
            "$defs": {"a": {"properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"]}},
            "$ref": "#/$defs/a",
        }
    ),
    "dangling reference": lambda: JsonSchema({"$ref": "#/$defs/nobody"}),
    "remote reference": lambda: JsonSchema({"$ref": "https://example.com/schema.json"}),
    "false": lambda: JsonSchema(False),
    "no type": lambda: JsonSchema({"type": []}),
    "unknown type": lambda: JsonSchema({"type": "strang"}),
    "type of a number": lambda: JsonSchema({"type": 7}),
    "minimum over maximum": lambda: JsonSchema({"type": "integer", "minimum": 5, "maximum": 4}),
    "length of text": lambda: JsonSchema({"type": "string", "minLength": "7"}),
    "negative length": lambda: JsonSchema({"type": "string", "maxLength": -1}),
    "empty enum": lambda: JsonSchema({"enum": []}),
    "bad pattern": lambda: JsonSchema({"type": "string", "pattern": "(("}),
    "properties of a list": lambda: JsonSchema({"properties": [1, 2]}),
    "items of a number": lambda: JsonSchema({"type": "array", "items": 3}),
    "format": lambda: JsonSchema({"type": "string", "format": "no such format"}),
    "unique items": lambda: JsonSchema({"type": "array", "uniqueItems": True}),
    "if without then": lambda: JsonSchema({"if": {}, "else": False, "then": 3}),
    "string and integer": lambda: JsonSchema({"allOf": [{"type": "string"}, {"type": "integer"}]}),
    "not json": lambda: JsonSchema("{'a': 1}"),
    "cut json": lambda: JsonSchema('{"type": "obj'),
    "a list": lambda: JsonSchema([1, 2]),
    "a set": lambda: JsonSchema({"enum": {1}}),
    "not a number": lambda: JsonSchema({"maximum": float("inf")}),
    "half a character": lambda: Regex("\ud800"),
    "zero bytes": lambda: Regex("\0{3}"),
    "look ahead": lambda: Regex("(?=a)b"),
    "look behind": lambda: Regex("(?<=a)b"),
    "back reference": lambda: Regex(r"(a)\1"),
    "no characters": lambda: Regex("[^\\x00-\\x{10FFFF}]"),
    "backwards class": lambda: Regex("[z-a]"),
    "backwards count": lambda: Regex("a{5,2}"),
    "huge count": lambda: Regex("a{99999999999999999999}"),
    "unknown class": lambda: Regex(r"\p{Nonsense}"),
    "unclosed group": lambda: Regex("(((("),
    "empty regex": lambda: Regex(""),
    "word boundary": lambda: Regex(r"\bword\b"),
    "anchors inside": lambda: Regex("a^b$c"),
    "number": lambda: Regex(3),
    "left recursion": lambda: Lark('start: start "a" | start start | "b"'),
    "only itself": lambda: Lark("start: start"),
    "two that refer to each other": lambda: Lark("start: a\na: b\nb: a"),
    "undefined rule": lambda: Lark("start: nobody"),
    "no start": lambda: Lark('a: "b"'),
    "two starts": lambda: Lark('start: "a"\nstart: "b"'),
    "recursive terminal": lambda: Lark('start: A\nA: "a" B\nB: "b" A'),
    "complement of all": lambda: Lark("start: A\nA: ~/(.|\\n)*/"),
    "unknown directive": lambda: Lark("%import nothing.NOWHERE\nstart: NOWHERE"),
    "unclosed text": lambda: Lark('start: "abc'),
    "empty text": lambda: Lark('start: ""'),
    "empty lark": lambda: Lark(""),
    "binary": lambda: Lark("\x00\x01\x02 start:"),
    "embedded json": lambda: Lark('start: %json {"type": "nothing"}'),
    "endless embedded json": lambda: Lark("start: %json {"),
    "unknown special token": lambda: Lark("start: <|nobody|>"),
    "end of turn inside": lambda: Lark('start: "a" <|end|> "b"'),
    "no options": lambda: Choice([]),
    "options of numbers": lambda: Choice([1, 2]),
    "empty option": lambda: Choice([""]),
    "broken characters": lambda: Choice(["\udcff"]),
    "not a grammar": lambda: {"type": "object"},
}


def hostile_grammars() -> Iterator[tuple[str, Make]]:
    """(name, what makes the grammar); making it may raise as well."""
    yield from FIXED.items()
    for n in SIZES:
        for name, schema in JSON.items():
            yield f"json {name} {n}", lambda schema=schema, n=n: JsonSchema(schema(n))
        for name, pattern in REGEX.items():
            yield f"regex {name} {n}", lambda pattern=pattern, n=n: Regex(pattern(n))
        for name, text in LARK.items():
            yield f"lark {name} {n}", lambda text=text, n=n: Lark(text(n))
        yield f"choice {n}", lambda n=n: Choice([f"option {i}" for i in range(n)])
        yield (
            f"choice of prefixes {n}",
            lambda n=n: Choice(["a" * i for i in range(1, n % 700 + 2)]),
        )
