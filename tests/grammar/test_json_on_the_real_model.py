"""SmolLM2 under JSON schemas: everything it writes is valid, by another library's judgement."""

from __future__ import annotations

import json

import pytest

from dendrite_engine import SamplingParams
from dendrite_engine.grammar import Choice, JsonSchema, Regex

jsonschema = pytest.importorskip("jsonschema")
pytestmark = pytest.mark.model


def _object(**properties):
    required = list(properties)
    return {
        "type": "object", "properties": properties, "required": required,
        "additionalProperties": False,
    }  # fmt: skip


WORD = {"type": "string", "minLength": 1, "maxLength": 12}
SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
SCHEMAS = {
    "person": _object(name=WORD, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "enum": {"enum": ["red", "green", 7, None, True]},
    "numbers": {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 5},
    "nested": _object(point=_object(x=SMALL, y=SMALL), label=WORD),
    "optional": {
        "type": "object", "properties": {"a": SMALL, "b": {"type": "boolean"}, "c": WORD},
        "required": ["b"], "additionalProperties": False,
    },
    "pattern": _object(date={"type": "string", "pattern": "^[0-9]{4}-[01][0-9]-[0-3][0-9]$"}),
    "one of several": {"anyOf": [_object(kind={"const": "text"}, text=WORD), _object(n=SMALL)]},
    "tree": {
        "$defs": {
            "leaf": _object(value=SMALL),
            "node": _object(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
        },
        "$ref": "#/$defs/node",
    },
    "objects in a list": {
        "type": "array", "items": _object(id=SMALL, tag={"enum": ["a", "b"]}), "minItems": 1,
        "maxItems": 3,
    },
    "constants": _object(version={"const": 2}, state={"enum": ["on", "off"]}, code=SMALL),
}  # fmt: skip
SAMPLED = SamplingParams(temperature=1.0, max_tokens=200)


@pytest.mark.parametrize("name", SCHEMAS)
def test_twenty_samples_of_a_schema_are_valid(smollm2, name):
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    question = f"Write JSON for the following schema: {json.dumps(schema)}"
    root = smollm2.prompt([{"role": "user", "content": question}])
    branches = root.constrain(JsonSchema(schema)).fork(20)
    results = smollm2.complete(branches, SAMPLED)
    for result in results:
        assert result.finish_reason in ("stop", "eos"), result
        value = json.loads(result.text)
        jsonschema.Draft202012Validator(schema).validate(value)
    root.prune(subtree=True)


def test_whitespace_is_allowed_where_it_is_asked_for(smollm2):
    root = smollm2.prompt("A list, one number a line:\n")
    root.constrain(JsonSchema(SCHEMAS["numbers"], whitespace=True))
    root.extend("[\n  1,\n  2")
    (result,) = smollm2.complete(root.fork(), SAMPLED.replace(logit_bias={198: 2.0}))
    root.prune(subtree=True)
    whole = "[\n  1,\n  2" + result.text
    assert result.finish_reason in ("length", "stop", "eos")
    if result.finish_reason != "length":
        jsonschema.validate(json.loads(whole), SCHEMAS["numbers"])


def test_forced_tokens_are_cut_as_the_tokenizer_cuts_the_text(smollm2):
    root = smollm2.prompt("The sentence: ")
    forced = " brown fox jumps over the lazy dog and runs away"
    branch = root.fork()[0].constrain(Regex("(A|The)" + forced + "[.!]"))
    before = smollm2.stats().tokens_forced
    (result,) = smollm2.complete([branch], SamplingParams(temperature=1.0, max_tokens=40))
    assert smollm2.stats().tokens_forced - before >= 8
    first = result.text.split(" ")[0]
    assert result.text[:-1] == first + forced
    assert result.token_ids == smollm2.tokenizer.encode(result.text)
    root.prune(subtree=True)


def test_choices_take_the_more_likely_text(smollm2):
    root = smollm2.prompt("The capital of France is")
    branch = root.fork()[0].constrain(Choice([" Paris", " Quebec", " 17"]))
    alternatives = branch.alternatives()
    assert [smollm2.tokenizer.decode(ids) for ids in alternatives] == [" Paris", " Quebec", " 17"]
    assert smollm2.complete([branch])[0].text == " Paris"
    root.prune(subtree=True)


def test_special_tokens_are_never_allowed_inside_a_text(smollm2):
    root = smollm2.prompt("Anything: ")
    branch = root.fork()[0].constrain(Regex("(.|\\n){1,5}"))
    allowed = set(branch.allowed_tokens().tolist())
    assert not allowed & (smollm2.tokenizer.special_ids - set(smollm2.model_config.eos_token_ids))
    assert not allowed & set(smollm2.model_config.eos_token_ids), "nothing was written yet"
    root.prune(subtree=True)
