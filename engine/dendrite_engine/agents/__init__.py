"""Several agents on one shared context: chats that are branches, and panels of personas.

Public names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dendrite_engine.agents.chat import Chat, Reply, append, reply
    from dendrite_engine.agents.panel import Panel, Sharing

_PUBLIC = {
    "Chat": "chat",
    "Panel": "panel",
    "Reply": "chat",
    "Sharing": "panel",
    "append": "chat",
    "reply": "chat",
}

__all__ = ["Chat", "Panel", "Reply", "Sharing", "append", "reply"]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
