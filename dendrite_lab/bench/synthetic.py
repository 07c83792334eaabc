"""A model directory without a model: config.json of a shape and a tokenizer of its size.

Engines read it with `weights="random"`. The tokenizer is byte-level BPE whose tokens are short
letter strings, so that ids have text and detokenising costs what it costs with a real one.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dendrite_lab.bench.shapes import Shape

SPECIAL = ("<|begin|>", "<|end|>")  # the last two ids


def write_model(directory: Path, shape: Shape) -> Path:
    """Write config.json and tokenizer.json of a shape into `directory` and return it."""
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")
    write_tokenizer(directory / "tokenizer.json", shape.vocab)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[1]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


def write_tokenizer(file: Path, vocab: int) -> None:
    """A tokenizer with exactly `vocab` ids; the last two are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {char: index for index, char in enumerate(alphabet)}
    merges = list(itertools.islice(_merges(), vocab - len(alphabet) - len(SPECIAL)))
    ids |= {a + b: len(alphabet) + index for index, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(file))


def _merges() -> Iterator[tuple[str, str]]:
    """Words of letters, shorter ones first, each as (word without its last letter, last letter)."""
    words = list(string.ascii_lowercase)
    while True:
        longer = []
        for word, letter in itertools.product(words, string.ascii_lowercase):
            yield word, letter
            longer.append(word + letter)
        words = longer


def random_ids(shape: Shape, count: int, seed: int) -> list[int]:
    """`count` token ids of the shape's vocabulary, no special ones."""
    rng = np.random.default_rng(seed)
    ids: list[int] = rng.integers(0, shape.vocab - len(SPECIAL), count).tolist()
    return ids
