"""Takes commands from any thread, carries them out on two worker threads, and answers each once.

Handlers of front-end messages must return at once (they may run while a cell is busy, on the main
shell or on a subshell), so they only check and enqueue. Quick operations never wait behind slow
ones.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from dendrite_engine.errors import DendriteError
from dendrite_lab import protocol
from dendrite_lab.protocol import Command

Reply = dict[str, Any]
_KEPT_REPLIES = 256
_STOP = None


class CommandTimeout(DendriteError, TimeoutError):
    """A command was not answered in time; it may still be carried out."""


class CommandDesk:
    """Two queues (quick and slow), one worker each, and the last replies by command id.

    Args:
        run: carries out one command; raises on failure.
        slow: operations that compute and so may take long.
        answer: called with every reply, on a worker thread or on the submitting one.
    """

    def __init__(
        self,
        run: Callable[[Command], Mapping[str, Any]],
        slow: frozenset[str],
        answer: Callable[[Reply], None],
    ) -> None:
        self._run, self._slow, self._answer = run, slow, answer
        self._lock = threading.Lock()
        self._replies: OrderedDict[str, Reply | None] = OrderedDict()
        self._waiting: dict[str, queue.SimpleQueue[Reply]] = {}
        self._queues: dict[bool, queue.SimpleQueue[Command | None]] = {
            False: queue.SimpleQueue(),
            True: queue.SimpleQueue(),
        }
        self._threads: list[threading.Thread] = []
        self._closed = False

    def submit(self, content: Mapping[str, Any]) -> None:
        """Check a `cmd` message and enqueue it; a bad one is answered at once.

        A repeated id is not carried out again: the first answer is repeated.
        """
        try:
            command = protocol.parse_command(content)
        except DendriteError as error:
            ident, op = str(content.get("id"))[: protocol.MAX_ID], str(content.get("op"))[:32]
            self._deliver(protocol.error_reply(ident, op, error, 0.0))
            return
        with self._lock:
            known = command.id in self._replies
            earlier = self._replies.get(command.id)
            if not known:
                self._remember(command.id, None)
                self._start()
        if not known:
            self._queues[command.op in self._slow].put(command)
        elif earlier is not None:
            self._deliver(earlier)

    def call(self, content: Mapping[str, Any], timeout: float) -> Reply:
        """Submit and wait for the reply.

        Raises:
            CommandTimeout: no reply within `timeout` seconds.
        """
        box: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        ident = str(content.get("id"))
        self._waiting[ident] = box
        try:
            self.submit(content)
            return box.get(timeout=timeout)
        except queue.Empty:
            message = f"{content.get('op')} was not answered within {timeout:g} s"
            raise CommandTimeout(message) from None
        finally:
            self._waiting.pop(ident, None)

    def close(self) -> None:
        """Stop the workers after what is already enqueued."""
        with self._lock:
            self._closed = True
            started = bool(self._threads)
        if started:
            for line in self._queues.values():
                line.put(_STOP)

    def _start(self) -> None:
        """Start the workers when the first command comes: an unused explorer has no threads."""
        if self._threads or self._closed:
            return
        for slow, line in self._queues.items():
            name = f"dendrite-lab commands ({'slow' if slow else 'quick'})"
            thread = threading.Thread(target=self._work, args=(line,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self, line: queue.SimpleQueue[Command | None]) -> None:
        while (command := line.get()) is not _STOP:
            self._deliver(self._carry_out(command))

    def _carry_out(self, command: Command) -> Reply:
        began = time.perf_counter()
        try:
            result = self._run(command)
        except Exception as error:  # every failure goes back to who asked, by name and message
            elapsed = (time.perf_counter() - began) * 1e6
            return protocol.error_reply(command.id, command.op, error, elapsed)
        return protocol.ok_reply(
            command.id, command.op, result, (time.perf_counter() - began) * 1e6
        )

    def _deliver(self, reply: Reply) -> None:
        with self._lock:
            if reply["id"] in self._replies:
                self._replies[reply["id"]] = reply
        box = self._waiting.get(reply["id"])
        if box is not None:
            box.put(reply)
        self._answer(reply)

    def _remember(self, ident: str, reply: Reply | None) -> None:
        self._replies[ident] = reply
        while len(self._replies) > _KEPT_REPLIES:
            self._replies.popitem(last=False)
