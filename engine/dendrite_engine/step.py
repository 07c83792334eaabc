"""What a forward pass that was launched is going to give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dendrite_engine.drawn import Launch
from dendrite_engine.forward import Flight
from dendrite_engine.scheduler import Lane
from dendrite_engine.speculation.speculator import Verification
from dendrite_engine.tree.branch import LogitsRow


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the loop, on its way.

    Attributes:
        launch: tokens of the decoding lanes that it finishes; None when there are none.
        places: places of these lanes in the group, i64 [n]; None for the whole group.
        probes: finished lanes that only want logits: (lane, row in logits, tokens held).
        flight: the pass, where it computed one token of every waiting lane.
        order: places in the flight of the lanes in the group's order; None: the same.
        guesses: tokens of the lanes whose guesses it verifies, instead of `launch`.
    """

    launch: Launch | None
    places: np.ndarray | None = None
    probes: Sequence[tuple[Lane, LogitsRow]] = ()
    flight: Flight | None = None
    order: np.ndarray | None = None
    guesses: Verification | None = None
