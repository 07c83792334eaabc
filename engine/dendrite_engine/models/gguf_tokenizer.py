"""Builds a fast byte-level BPE tokenizer from the arrays in a GGUF file.

A GGUF file names its pre-tokenizer (`tokenizer.ggml.pre`) instead of storing it. For `smollm` the
rule is "every digit alone, then GPT-2's split", as in the original model's tokenizer and llama.cpp.
transformers' own GGUF loader does not know that name and leaves the digits out: the two differ only
where several spaces precede a digit, or at numerals outside ASCII.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
USER_DEFINED_TOKEN = 4
KNOWN_PRE_TOKENIZERS = ("default", "gpt-2", "smollm")


def write_tokenizer(reader: GGUFReader, target: Path, *, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` of a GGUF file into a directory.

    Args:
        reader: the open file; its tokenizer has to be byte-level BPE (`gpt2`).
        target: an existing directory.
        max_length: tokens that the model can hold.

    Raises:
        ModelError: another kind of tokenizer or pre-tokenizer.
    """
    tokens = _array(reader, "tokenizer.ggml.tokens")
    kinds = _array(reader, "tokenizer.ggml.token_type")
    tokenizer = _byte_level_bpe(reader, tokens, kinds)
    tokenizer.save(str(target / "tokenizer.json"))
    config = _tokenizer_config(reader, tokens, max_length)
    path = target / "tokenizer_config.json"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_level_bpe(reader: GGUFReader, tokens: list[str], kinds: list[int]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    kind = _value(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(f"GGUF tokenizer {kind!r} can't be converted (known: gpt2)")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # a merge is written "left right"; the byte-level alphabet has no space in it
    merges = [tuple(merge.split(" ", 1)) for merge in _array(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(reader)
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, special in ((CONTROL_TOKEN, True), (USER_DEFINED_TOKEN, False)):
        added = [
            AddedToken(token, normalized=False, special=special)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == wanted
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _pre_tokenizer(reader: GGUFReader) -> PreTokenizer:
    from tokenizers import pre_tokenizers

    name = _value(reader, "tokenizer.ggml.pre") or "default"
    if name not in KNOWN_PRE_TOKENIZERS:
        known = ", ".join(KNOWN_PRE_TOKENIZERS)
        raise ModelError(f"GGUF pre-tokenizer {name!r} can't be converted (known: {known})")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name != "smollm":
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


def _tokenizer_config(reader: GGUFReader, tokens: list[str], max_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    for name, key in (
        ("bos_token", "bos_token_id"),
        ("eos_token", "eos_token_id"),
        ("unk_token", "unknown_token_id"),
        ("pad_token", "padding_token_id"),
    ):
        index = _value(reader, f"tokenizer.ggml.{key}")
        if index is not None:
            config[name] = tokens[index]
    template = _value(reader, "tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return config


def _value(reader: GGUFReader, key: str) -> Any:
    """Return an optional metadata value: a missing one is None."""
    entry = reader.fields.get(key)
    return None if entry is None else entry.contents()


def _array(reader: GGUFReader, key: str) -> list[Any]:
    values = _value(reader, key)
    if not isinstance(values, list):
        raise ModelError(f"the GGUF file has no array {key!r}")
    return values
