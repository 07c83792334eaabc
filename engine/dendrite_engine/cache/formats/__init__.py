"""Page formats by name."""

from __future__ import annotations

from dendrite_engine.cache.formats.base import PageFormat, PageShape
from dendrite_engine.registry import Registry

PAGE_FORMATS: Registry[type[PageFormat]] = Registry(
    "page format", {"fp32": "dendrite_engine.cache.formats.dense:Fp32"}
)

__all__ = ["PAGE_FORMATS", "PageFormat", "PageShape"]
