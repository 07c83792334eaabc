"""The notebook workbench of dendrite: explore, steer and measure a live tree of branches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dendrite_lab import plots, trees
    from dendrite_lab.explorer import Explorer
    from dendrite_lab.panel import SearchPanel

__version__ = "0.1.0"

__all__ = ["Explorer", "SearchPanel", "plots", "trees"]

_HOMES = {
    "Explorer": "dendrite_lab.explorer",
    "SearchPanel": "dendrite_lab.panel",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: importing the package must not load ipywidgets or plotly.
    if name in ("plots", "trees"):
        return importlib.import_module(f"dendrite_lab.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
