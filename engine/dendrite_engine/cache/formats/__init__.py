"""Page formats by name, for each of the two layouts that kernels read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dendrite_engine.cache.formats.base import PageFormat, PageShape, pool_shape
from dendrite_engine.registry import Registry

PAGE_FORMATS: Registry[type[PageFormat]] = Registry(
    "page format", {"fp32": "dendrite_engine.cache.formats.dense:Fp32"}
)
DEVICE_PAGE_FORMATS: Registry[Callable[[torch.device], PageFormat]] = Registry(
    "page format",
    {
        "fp32": "dendrite_engine.cache.formats.device_dense:Fp32",
        "bf16": "dendrite_engine.cache.formats.device_dense:Bf16",
        "fp16": "dendrite_engine.cache.formats.device_dense:Fp16",
    },
)

__all__ = ["DEVICE_PAGE_FORMATS", "PAGE_FORMATS", "PageFormat", "PageShape", "pool_shape"]
