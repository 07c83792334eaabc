"""Jobs: what users ask of the engine thread, and how they hear back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import DendriteError
from dendrite_engine.types import Completion, TokenAlternative, TokenEvent

if TYPE_CHECKING:
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.speculation.base import Guessing
    from dendrite_engine.tree.branch import Branch

EventCallback = Callable[[TokenEvent], None]


class Job:
    """Work on several branches that run in one batch per step. Made by `Engine.submit`.

    Attributes:
        branches: the branches, in the order given.
        params: one SamplingParams per branch; None when only K/V and logits are wanted.
        priority: higher runs first when not everything fits one step.
        values: one number per branch; of branches served equally long ago, higher runs first.
        top_k: how many next-token alternatives to report once logits are there.
        masks: for each branch None, or which tokens may be among them, as i32 bitmasks.
        alternatives: those alternatives, one list per branch.
        guessing: what guesses its tokens; None: they come one by one.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        params: Sequence[SamplingParams] | None,
        *,
        on_event: EventCallback | None = None,
        priority: int = 0,
        values: Sequence[float] | None = None,
        top_k: int = 0,
        guessing: Guessing | None = None,
        masks: Sequence[Any] = (),
    ) -> None:
        self.branches = tuple(branches)
        self.guessing = guessing
        self.params = params
        self.priority = priority
        self.values = values
        self.top_k = top_k
        self.masks = list(masks) or [None] * len(self.branches)
        self.alternatives: list[list[TokenAlternative]] = [[] for _ in self.branches]
        self.error: BaseException | None = None
        self._completions = [Completion(branch) for branch in self.branches]
        self._on_event = on_event
        self._finished = threading.Event()
        self._cancelled = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Job], None]] = []

    @property
    def done(self) -> bool:
        """Whether every branch of the job has ended."""
        return self._finished.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def cancel(self) -> None:
        """Ask the engine to end the job after the step in flight; its branches stay usable."""
        self._cancelled = True

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the job is done; False when `timeout` seconds passed first."""
        return self._finished.wait(timeout)

    def result(self, timeout: float | None = None) -> list[Completion]:
        """What each branch produced, in the order given.

        Raises:
            TimeoutError: not done within `timeout` seconds.
            DendriteError: the job as a whole failed; a single branch's failure is in its
                Completion.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the job was not done within {timeout} s")
        if self.error is not None:
            raise self.error
        return self._completions

    def add_done_callback(self, callback: Callable[[Job], None]) -> None:
        """Call `callback(job)` once the job is done (at once if it is); on the engine thread."""
        with self._lock:
            if not self._finished.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    # -- engine side --------------------------------------------------------------------------

    @property
    def listens(self) -> bool:
        """Whether someone hears each event; else only the completions count."""
        return self._on_event is not None

    def record(self, index: int, token_id: int, text: str, logprob: float) -> None:
        """`deliver` of a token that does not end its branch, where nobody listens."""
        completion = self._completions[index]
        completion.token_ids.append(token_id)
        completion.logprobs.append(logprob)
        completion.text += text

    def deliver(self, index: int, event: TokenEvent) -> None:
        """Record one event of the branch at `index` and pass it on."""
        completion = self._completions[index]
        if event.token_id is not None:
            completion.token_ids.append(event.token_id)
            completion.logprobs.append(event.logprob if event.logprob is not None else 0.0)
        completion.text += event.text
        if event.finish_reason is not None:
            completion.finish_reason, completion.error = event.finish_reason, event.error
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception as error:  # a user's callback must not stop the engine
            self._on_event = None
            self.error = DendriteError(f"on_event raised {type(error).__name__}: {error}")
            self.error.__cause__ = error
            self.cancel()

    def finish(self, error: BaseException | None = None) -> None:
        """Mark the job done and run its callbacks, all of them; raises what the first one raised
        that failed.
        """
        with self._lock:
            if self._finished.is_set():
                return
            self.error = self.error or error
            self._finished.set()
            callbacks, self._callbacks = self._callbacks, []
        raised = [failure for callback in callbacks if (failure := self._run(callback))]
        if raised:
            raise raised[0]

    def _run(self, callback: Callable[[Job], None]) -> Exception | None:
        try:
            callback(self)
        except Exception as error:
            return error
        return None
