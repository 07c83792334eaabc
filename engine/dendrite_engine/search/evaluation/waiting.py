"""Asynchronous evaluators: their coroutines run on an event loop of their own."""

from __future__ import annotations

import asyncio
import inspect
import threading
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any


def is_async(function: object) -> bool:
    """Whether calling `function` gives a coroutine."""
    call = getattr(function, "__call__", None)  # noqa: B004 a method of its class may be async
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


class Waiter:
    """Waits for awaitables, from any thread, also from one that runs an event loop.

    All of them run on one loop in a thread that starts with the first and ends when the waiter is
    gone, so that clients bound to a loop can be used in every call.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()

    def wait(self, value: Any) -> Any:
        """The awaitable's result, or `value` itself where it is none.

        Raises:
            Exception: what the awaitable raised.
        """
        if not inspect.isawaitable(value):
            return value
        return asyncio.run_coroutine_threadsafe(_result(value), self._started()).result()

    def wait_all(self, values: Sequence[Awaitable[Any]]) -> list[Any]:
        """The results of awaitables that run together; an exception in the place of a result."""
        gathered = _gathered(values)
        return list(self.wait(gathered))

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = loop = asyncio.new_event_loop()
                # holds the loop, not the waiter, which could never be collected otherwise
                threading.Thread(target=_run, args=(loop,), daemon=True).start()
                weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
            return self._loop


class Awaited:
    """An `async` evaluator made synchronous; what else it offers shows through.

    Args:
        evaluator: returns a coroutine.
    """

    def __init__(self, evaluator: Callable[..., Any]) -> None:
        self._evaluator = evaluator
        self._waiter = Waiter()

    def __call__(self, branches: Sequence[Any]) -> Any:
        """What the coroutine returns."""
        return self._waiter.wait(self._evaluator(branches))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._evaluator, name)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _result(value: Awaitable[Any]) -> Any:
    return await value


async def _gathered(values: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*values, return_exceptions=True)
