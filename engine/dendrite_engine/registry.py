"""Lazy tables of named implementations: the seams of the engine."""

from __future__ import annotations

import importlib
from typing import Generic, TypeVar, cast

from dendrite_engine.errors import UnknownName

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to `"package.module:attribute"`, imported when first asked for.

    Listing names costs nothing, so a heavy or missing optional dependency only shows when it is
    used.
    """

    def __init__(self, what: str, entries: dict[str, str] | None = None) -> None:
        self._what = what
        self._entries = dict(entries or {})

    def names(self) -> list[str]:
        """Known names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def register(self, name: str, target: str) -> None:
        """Add or replace an entry; `target` is `"package.module:attribute"`."""
        self._entries[name] = target

    def get(self, name: str) -> T:
        """Import and return the implementation called `name`.

        Raises:
            UnknownName: the name is not registered; the message lists those that are.
        """
        target = self._entries.get(name)
        if target is None:
            raise UnknownName(f"unknown {self._what} {name!r}; known: {', '.join(self.names())}")
        module, _, attribute = target.partition(":")
        return cast("T", getattr(importlib.import_module(module), attribute))
