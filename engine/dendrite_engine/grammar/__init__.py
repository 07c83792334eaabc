"""Grammars: what the text of a branch has to look like, enforced token by token.

Public: `JsonSchema`, `Regex`, `Lark`, `Choice`, for `Branch.constrain`. See docs/grammar.md.
"""

from __future__ import annotations

from dendrite_engine.grammar.base import ConstraintEngine, Matcher, Vocabulary
from dendrite_engine.grammar.specs import (
    Choice,
    Grammar,
    JsonSchema,
    Lark,
    Regex,
    grammar_from_dict,
)
from dendrite_engine.registry import Registry

CONSTRAINTS: Registry[type[ConstraintEngine]] = Registry(
    "constraint engine",
    {
        "llguidance": "dendrite_engine.grammar.llguidance:LlguidanceEngine",
        "reference": "dendrite_engine.grammar.reference:ReferenceEngine",
    },
)

__all__ = [
    "CONSTRAINTS",
    "Choice",
    "ConstraintEngine",
    "Grammar",
    "JsonSchema",
    "Lark",
    "Matcher",
    "Regex",
    "Vocabulary",
    "grammar_from_dict",
]
