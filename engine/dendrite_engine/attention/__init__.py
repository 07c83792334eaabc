"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dendrite_engine.attention.base import AttentionBackend, ForwardBatch, Plan
from dendrite_engine.registry import Registry

ATTENTION_BACKENDS: Registry[Callable[[Any], AttentionBackend]] = Registry(
    "attention backend",
    {
        "tree": "dendrite_engine.attention.tree:TreeAttention",
        "reference": "dendrite_engine.attention.reference:ReferenceAttention",
    },
)

__all__ = ["ATTENTION_BACKENDS", "AttentionBackend", "ForwardBatch", "Plan"]
