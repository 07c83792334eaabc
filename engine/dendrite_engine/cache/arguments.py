"""Conversion of array arguments, shared by the native core and its twin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dendrite_engine.errors import InvalidArgument


def as_array(name: str, value: object, dtype: str) -> npt.NDArray[np.generic]:
    """Return `value` as a contiguous 1-d numpy array of `dtype`.

    Args:
        name: the argument, for the error message.
        value: anything that numpy turns into a 1-d array of numbers.
        dtype: "int32", "int64" (integers only, range checked) or "float32".

    Raises:
        InvalidArgument: not 1-d, not numbers of that kind, or a number out of range.
    """
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(f"{name} must be a 1-d array of numbers: {error}") from error
    if array.ndim != 1:
        raise InvalidArgument(f"{name} must be a 1-d array, got shape {tuple(array.shape)}")
    kinds = "fiu" if dtype == "float32" else "iu"
    if array.size and array.dtype.kind not in kinds:
        raise InvalidArgument(f"{name} must hold {dtype} numbers, got {array.dtype}")
    if array.size and dtype != "float32":
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise InvalidArgument(f"{name} must fit {dtype}, got values from {low} to {high}")
    return np.ascontiguousarray(array, dtype=dtype)


def check_layout(num_pages: int, page_size: int) -> None:
    """Raise InvalidArgument unless the pool's slots can be numbered by int32."""
    if not 1 <= page_size <= 256 or page_size & (page_size - 1):
        raise InvalidArgument(f"page_size must be a power of two from 1 to 256, got {page_size}")
    most = (2**31 - 1) // page_size
    if not 1 <= num_pages <= most:
        raise InvalidArgument(
            f"num_pages must be from 1 to {most} with page_size {page_size}, got {num_pages}"
        )


def check_tokens(tokens: Sequence[int]) -> None:
    """Raise InvalidArgument for the first negative token id."""
    for i, token in enumerate(tokens):
        if token < 0:
            raise InvalidArgument(f"tokens[{i}] is negative: {token}")


def check_range(name: str, value: int, low: int, high: int, why: str) -> None:
    """Raise InvalidArgument unless low <= value <= high."""
    if not low <= value <= high:
        raise InvalidArgument(f"{name} must be from {low} to {high} ({why}), got {value}")


def check_same_size(a: str, size_a: int, b: str, size_b: int) -> None:
    """Raise InvalidArgument unless two arrays have the same number of entries."""
    if size_a != size_b:
        raise InvalidArgument(f"{a} has {size_a} entries, {b} has {size_b}; they must be equal")
