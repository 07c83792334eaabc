"""The tree of pages, segments and branch handles.

`make_core` returns the native control plane, or its pure-Python twin where the native module does
not load. Both have the API of `dendrite_engine._core.TreeCore`, give the same results and raise the
same errors.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

from dendrite_engine.cache import native
from dendrite_engine.errors import InvalidArgument, UnknownName

if TYPE_CHECKING:
    from dendrite_engine._core import TreeCore

__all__ = ["core_implementation", "make_core"]

IMPLEMENTATIONS = ("auto", "native", "reference")


def make_core(
    num_pages: int,
    page_size: int = 16,
    prefix_cache: bool = True,
    debug: bool = False,
    implementation: str = "auto",
) -> TreeCore:
    """Return a control plane over `num_pages` pages of `page_size` tokens.

    Args:
        num_pages: pages in the pool.
        page_size: tokens in a page, a power of two from 1 to 256.
        prefix_cache: reuse the pages of equal prefixes.
        debug: record page events for `debug_events`.
        implementation: "auto" takes the native core and falls back to the Python twin with one
            warning; "native" and "reference" insist.

    Raises:
        UnknownName: no such implementation.
        InvalidArgument: a bad size, or "native" where the native module does not load.
    """
    if implementation not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise UnknownName(f"implementation {implementation!r} is unknown; known: {known}")
    tree_core, reason = (None, "") if implementation == "reference" else native.load()
    if tree_core is not None:
        return cast("TreeCore", tree_core(num_pages, page_size, prefix_cache, debug))
    if implementation == "native":
        raise InvalidArgument(f"implementation 'native' is not available: {reason}")
    if implementation == "auto":
        _warn_once(reason)
    from dendrite_engine.cache.reference import TreeCore as ReferenceCore

    return cast("TreeCore", ReferenceCore(num_pages, page_size, prefix_cache, debug))


def _warn_once(reason: str) -> None:
    # A constant text and place: Python's default filter shows it once per process.
    warnings.warn(
        f"{reason}; using the pure-Python control plane, which is far slower",
        RuntimeWarning,
        stacklevel=1,
    )


def core_implementation(core: object | None = None) -> tuple[str, str]:
    """Return ("native" or "reference", reason) of a core, or of what "auto" would give."""
    tree_core, reason = native.load()
    if core is None:
        return ("native" if tree_core is not None else "reference"), reason
    if tree_core is not None and isinstance(core, tree_core):
        return "native", reason
    if tree_core is None:
        return "reference", reason
    return "reference", "implementation='reference' was asked for"
