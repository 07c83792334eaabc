"""Page-and-tree core: native, or its Python twin."""

from __future__ import annotations

from typing import Any


def make_core(
    num_pages: int,
    page_size: int = 16,
    prefix_cache: bool = True,
    debug: bool = False,
    implementation: str = "auto",
) -> Any:
    """A TreeCore."""
    from dendrite_engine import _core

    return _core.TreeCore(num_pages, page_size, prefix_cache, debug)


def core_implementation(core: Any) -> tuple[str, str]:
    """Name and reason of a core."""
    return type(core).__module__, "native module"
