"""dendrite_engine: LLM inference whose unit of work is a tree of branches.

Public names are imported when first used, so `import dendrite_engine` loads no model code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dendrite_engine.config import EngineConfig
    from dendrite_engine.engine import Engine
    from dendrite_engine.jobs import Job
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.search.budget import Budget
    from dendrite_engine.speculation import DraftModel, PromptLookup
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.types import Completion, EngineStats, TokenAlternative, TokenEvent

__version__ = "0.1.0"

_PUBLIC = {
    "Branch": "tree.branch",
    "Budget": "search.budget",
    "Completion": "types",
    "DraftModel": "speculation",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineStats": "types",
    "Job": "jobs",
    "PromptLookup": "speculation",
    "SamplingParams": "sampling_params",
    "TokenAlternative": "types",
    "TokenEvent": "types",
}

__all__ = [
    "Branch",
    "Budget",
    "Completion",
    "DraftModel",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Job",
    "PromptLookup",
    "SamplingParams",
    "TokenAlternative",
    "TokenEvent",
    "__version__",
]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
