"""A sampler whose tokens are chosen only when they are waited for, as on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dendrite_engine.sampling import Sampler


class Deferred:
    """Tokens that the device has not chosen yet, nor put anywhere."""

    drawn = None

    def __init__(self, choose: Callable[[], Any]) -> None:
        self.choose = choose

    def wait(self) -> Any:
        return self.choose()


class DeferredSampler:
    """Reads the logits as late as a device may: a row that was overwritten too early shows.

    Attributes:
        in_flight: called once per step, on the engine thread, while a step's tokens are on their
            way; what other threads do at that moment can be done there.
    """

    def __init__(self, real: Sampler) -> None:
        self._real = real
        self.vocab_size = real.vocab_size
        self.in_flight: Callable[[], None] = lambda: None

    def begin(self, *args: Any) -> Deferred:
        def choose() -> Any:
            self.in_flight()
            return self._real.begin(*args).wait()

        return Deferred(choose)

    def begin_top(self, *args: Any) -> Deferred:
        return Deferred(lambda: self._real.begin_top(*args).wait())


def defer(engine: Any) -> DeferredSampler:
    """Give an engine a deferred sampler."""
    decoder = engine._parts.decoder
    decoder._sampler = DeferredSampler(decoder._sampler)
    return decoder._sampler


def log_passes(engine: Any, log: list[Any]) -> None:
    """Note "pass" in `log` whenever a forward pass is launched."""
    runner = engine._parts.runner
    run = runner.run

    def noted(plan: Any, drawn: Any = None) -> Any:
        log.append("pass")
        return run(plan, drawn)

    runner.run = noted


def run_in_step(sampler: DeferredSampler, step: int, action: Callable[[], None]) -> None:
    """Call `action` while the tokens of the `step`-th sampling (from 1) are on their way."""
    count = 0

    def hook() -> None:
        nonlocal count
        count += 1
        if count == step:
            action()

    sampler.in_flight = hook
