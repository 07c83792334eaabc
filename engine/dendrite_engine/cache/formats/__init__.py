"""Page formats by name, for each of the two layouts that kernels read.

On the CPU a format is a pair of vector formats, one for K and one for V (`choose_format`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dendrite_engine.cache.formats.base import PageFormat, PageShape, pool_shape
from dendrite_engine.cache.formats.vector import VectorFormat
from dendrite_engine.registry import Registry

VECTOR_FORMATS: Registry[type[VectorFormat]] = Registry(
    "page format",
    {
        "fp32": "dendrite_engine.cache.formats.fp32:Fp32",
        "bf16": "dendrite_engine.cache.formats.bf16:Bf16",
        "fp16": "dendrite_engine.cache.formats.fp16:Fp16",
        "fp8_e4m3": "dendrite_engine.cache.formats.fp8_e4m3:Fp8E4M3",
        "fp8_e5m2": "dendrite_engine.cache.formats.fp8_e5m2:Fp8E5M2",
        "mxfp8": "dendrite_engine.cache.formats.mxfp8:Mxfp8",
        "tq4": "dendrite_engine.cache.formats.turboquant:Tq4",
        "tq3": "dendrite_engine.cache.formats.turboquant:Tq3",
        "tq2": "dendrite_engine.cache.formats.turboquant:Tq2",
    },
)
PAIRS = {"k8v4": ("fp8_e4m3", "tq4"), "k4v2": ("tq4", "tq2")}  # name -> (K, V)
DEVICE_PAGE_FORMATS: Registry[Callable[[torch.device], PageFormat]] = Registry(
    "page format",
    {
        "fp32": "dendrite_engine.cache.formats.device_dense:Fp32",
        "bf16": "dendrite_engine.cache.formats.device_dense:Bf16",
        "fp16": "dendrite_engine.cache.formats.device_dense:Fp16",
    },
)

__all__ = [
    "DEVICE_PAGE_FORMATS",
    "PAIRS",
    "VECTOR_FORMATS",
    "PageFormat",
    "PageShape",
    "VectorFormat",
    "pool_shape",
]
