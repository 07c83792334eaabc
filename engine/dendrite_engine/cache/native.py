"""Loads the native control plane, or says why it can't be loaded."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def load() -> tuple[Any, str]:
    """Return (TreeCore class, reason); the class is None where the module does not load.

    The answer is remembered: a missing module does not appear while the process runs.
    """
    try:
        module = importlib.import_module("dendrite_engine._core")
    except ImportError as error:
        return None, f"native module dendrite_engine._core does not load: {error}"
    return module.TreeCore, f"native module {module.__file__}"
