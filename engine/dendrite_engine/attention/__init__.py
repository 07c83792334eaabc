"""Attention backends by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dendrite_engine.attention.base import AttentionBackend, ForwardBatch, Plan
from dendrite_engine.attention.device_base import AttentionSetup, DeviceAttention, DeviceBatch
from dendrite_engine.registry import Registry

ATTENTION_BACKENDS: Registry[Callable[[Any], AttentionBackend[ForwardBatch]]] = Registry(
    "attention backend",
    {
        "tree": "dendrite_engine.attention.tree:TreeAttention",
        "reference": "dendrite_engine.attention.reference:ReferenceAttention",
        "flashinfer": "dendrite_engine.attention.flashinfer:on_cpu",
        "flashinfer-flat": "dendrite_engine.attention.flashinfer:on_cpu",
        "flashinfer-cascade": "dendrite_engine.attention.flashinfer:on_cpu",
    },
)

DEVICE_ATTENTION_BACKENDS: Registry[type[DeviceAttention]] = Registry(
    "attention backend of the device path",
    {
        "tree": "dendrite_engine.attention.device_tree:DeviceTreeAttention",
        "reference": "dendrite_engine.attention.device_reference:DeviceReferenceAttention",
        "flashinfer": "dendrite_engine.attention.flashinfer:FlashInferAttention",
        "flashinfer-flat": "dendrite_engine.attention.flashinfer:FlashInferFlat",
        "flashinfer-cascade": "dendrite_engine.attention.flashinfer:FlashInferCascade",
    },
)

__all__ = [
    "ATTENTION_BACKENDS",
    "DEVICE_ATTENTION_BACKENDS",
    "AttentionBackend",
    "AttentionSetup",
    "DeviceAttention",
    "DeviceBatch",
    "ForwardBatch",
    "Plan",
]
