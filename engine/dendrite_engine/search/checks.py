"""Checks of search options; every message names the option and gives the value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection

from dendrite_engine.errors import InvalidArgument


def whole(name: str, value: object, low: int) -> None:
    """Require an integer of at least `low`; `True` and `1.0` are refused.

    Raises:
        InvalidArgument: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidArgument(f"{name} must be an integer, got {value!r}")
    if int(value) < low:
        raise InvalidArgument(f"{name} must be at least {low}, got {value}")


def number(name: str, value: object, low: float = -math.inf, *, above: bool = False) -> None:
    """Require a finite number of at least `low`, or more than `low` with `above`.

    Raises:
        InvalidArgument: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidArgument(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise InvalidArgument(f"{name} must be finite, got {value}")
    if value < low or (above and value == low):
        raise InvalidArgument(
            f"{name} must be {'above' if above else 'at least'} {low}, got {value}"
        )


def one_of(name: str, value: object, known: Collection[object]) -> None:
    """Require one of the `known` values.

    Raises:
        InvalidArgument: it is something else; the message lists the known ones.
    """
    # identity or same type: `1 == True` must not let 1 through where True is meant.
    if not any(value is k or (type(value) is type(k) and value == k) for k in known):
        raise InvalidArgument(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")


def flag(name: str, value: object) -> None:
    """Require `True` or `False`.

    Raises:
        InvalidArgument: it is something else.
    """
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be True or False, got {value!r}")


def strings(name: str, value: object) -> None:
    """Require a tuple or list of non-empty strings (a bare string is refused).

    Raises:
        InvalidArgument: it is something else.
    """
    if not isinstance(value, (tuple, list)) or not all(isinstance(s, str) and s for s in value):
        raise InvalidArgument(f"{name} must be a tuple of non-empty strings, got {value!r}")
