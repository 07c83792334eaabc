"""Randomness of algorithms: a generator for every decision, named by seed and position.

A search that is resumed, or whose batches fall otherwise, draws the same numbers, because none is
the next one of a stream.
"""

from __future__ import annotations

import hashlib
import random


def generator(seed: int | None, *position: object) -> random.Random:
    """A generator that depends on nothing but its arguments.

    Args:
        seed: of the search; `None` counts as 0.
        position: what the draw is for: purpose, path of the node, number of the trial.
    """
    name = repr((seed or 0, *position)).encode()
    digest = hashlib.blake2b(name, digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))  # noqa: S311 no secret depends on it
