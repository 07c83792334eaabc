"""Kernels of the CPU path: native SIMD code with a torch twin of every operation.

    ops = kernels.load("auto")          # one object per engine: its own threads and scratch
    ops.tree_attention(q, k_pages, v_pages, plan, out, scale)

Importing this package does not import the native module; `load` does. The operations are also
functions of this module (`kernels.tree_attention(...)`): one `load("auto")` shared by the process.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

from dendrite_engine.errors import UnknownName
from dendrite_engine.kernels.base import OPERATIONS, Kernels, PlanArrays
from dendrite_engine.kernels.sampling_batch import SamplingBatch

__all__ = ["OPERATIONS", "Kernels", "PlanArrays", "SamplingBatch", "implementation", "load"]

Choice = Literal["auto", "native", "reference"]


def load(choice: Choice = "auto", *, isa: str = "auto", threads: int | None = None) -> Kernels:
    """Return an implementation of the operations.

    Args:
        choice: "native", "reference", or "auto" (native unless its module can't be imported).
        isa: instruction set of the native kernels; "auto" takes the best this machine has.
        threads: threads of the native kernels; None follows `torch.get_num_threads()`.

    Raises:
        UnknownName: `choice` is none of these.
        ImportError: "native" was asked for and its module can't be imported.
        InvalidArgument: this machine can't run `isa`.
    """
    from dendrite_engine.kernels.reference import ReferenceKernels

    if choice not in get_args(Choice):
        raise UnknownName(f"unknown kernels {choice!r}; known: {', '.join(get_args(Choice))}")
    if choice == "reference":
        return ReferenceKernels()
    try:
        from dendrite_engine.kernels.native import NativeKernels
    except ImportError as error:
        if choice == "native":
            raise
        return ReferenceKernels(f"the native module is missing ({error})")
    return NativeKernels(isa, threads)


def implementation() -> dict[str, str]:
    """What `load("auto")` gives for each operation: "native (why)" or "reference (why)"."""
    ops = _shared()
    return dict.fromkeys(OPERATIONS, f"{ops.name} ({ops.reason})")


@functools.cache
def _shared() -> Kernels:
    return load("auto")


def __getattr__(name: str) -> Any:
    if name in OPERATIONS:
        return getattr(_shared(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
