"""Inputs that benchmarks share: a long text of fixed length, an engine, a Hugging Face peer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dendrite_engine import Engine

if TYPE_CHECKING:
    from dendrite_engine.models.tokenizer import Tokenizer

_TEXT = (
    "The keeper of the lighthouse wrote every evening into a book what he had seen: ships and "
    "their flags, the weather, the birds, and now and then a thought about the light itself. "
)


def prompt_ids(tokenizer: Tokenizer, length: int) -> list[int]:
    """`length` token ids of plain English text."""
    ids: list[int] = []
    number = 0
    while len(ids) < length:
        number += 1
        ids += tokenizer.encode(f"Entry {number}. {_TEXT}")
    return ids[:length]


def make_engine(model: str, tokens: int, **options: Any) -> Engine:
    """An engine whose pool holds `tokens` tokens and some slack."""
    page_size = options.get("page_size", 16)
    return Engine.from_pretrained(model, num_pages=tokens // page_size + 64, **options)


def hugging_face(path: Path) -> Any:
    """The same weights in transformers, fp32, its default attention."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
