"""The Explorer: a live tree of branches in a notebook, steered by mouse, keyboard and Python."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from dendrite_engine.errors import InvalidArgument, StaleBranch
from dendrite_engine.sampling_params import SamplingParams
from dendrite_lab.comm_guard import answer_on_sender
from dendrite_lab.commands import CommandDesk
from dendrite_lab.operations import SLOW, Operations
from dendrite_lab.protocol import Frame
from dendrite_lab.publisher import Publisher
from dendrite_lab.session import Session
from dendrite_lab.text_tree import text_tree
from dendrite_lab.tree_view import TreeView

_STATIC = Path(__file__).parent / "static"
_FALLBACK_LINES = 60
_FALLBACK_SECONDS = 2.0
_FALLBACK_MAX_RUNS = 2000
_MIN_HEIGHT, _MAX_HEIGHT = 240, 4000


class Explorer(anywidget.AnyWidget):
    """A live view of an engine's branches: fork, continue, edit and prune them where you see them.

    Clicks work while a cell is busy: they are handled on threads of their own. Where there is no
    front end the explorer shows as a plain-text tree.

    Args:
        engine: the engine whose branches to show.
        prompt: start a new tree from this text, these token ids or these chat messages.
        root: show only this branch and what grows below it.
        search: a running search whose N, Q and UCT to show (also settable later).
        max_tokens: tokens that "continue" generates, unless changed in the toolbar.
        sampling: how "continue" samples; default temperature 0.8, top_p 0.95.
        height: height in CSS pixels, 240..4000.

    Raises:
        InvalidArgument: both prompt and root were given, root is of another engine, or height is
            out of range; and what `Engine.prompt` raises.

    Example:
        >>> Explorer(engine, "Once upon a time")  # doctest: +SKIP
    """

    _esm = _STATIC / "explorer.js"
    _height = traitlets.Int(520).tag(sync=True)
    _defaults = traitlets.Dict().tag(sync=True)
    _fallback = traitlets.Unicode("").tag(sync=True)
    _is_closed = True  # until __init__ succeeded: ipywidgets closes half-made widgets too

    def __init__(
        self,
        engine: Any,
        prompt: Any = None,
        *,
        root: Any = None,
        search: Any = None,
        max_tokens: int = 24,
        sampling: SamplingParams | None = None,
        height: int = 520,
    ) -> None:
        _check(engine, prompt, root, height)
        defaults = sampling or SamplingParams(temperature=0.8, top_p=0.95)
        defaults = defaults.replace(max_tokens=max_tokens)
        if prompt is not None:
            root = engine.prompt(prompt)
        self._session = Session(engine, None if root is None else [root])
        self._operations = Operations(self._session, defaults)
        self._desk = CommandDesk(self._operations.run, SLOW, self._answer)
        self._publisher = Publisher(
            self._session, self._send_frame, self._fail, idle=self._keep_fallback
        )
        self._ids = itertools.count(1)
        self._fallback_due, self._fallback_stale = 0.0, False
        self._is_closed = False
        super().__init__(
            _height=height,
            _defaults={
                "max_tokens": max_tokens,
                "temperature": defaults.temperature,
                "model": Path(str(getattr(engine, "model_path", "") or "")).name,
                "page_size": self._session.page_size,
            },
        )
        self._fallback = text_tree(self._session, max_lines=_FALLBACK_LINES)
        answer_on_sender(self)
        self.on_msg(self._receive)
        if search is not None:
            self.search = search

    # ---- for Python -----------------------------------------------------------------------------

    @property
    def engine(self) -> Any:
        """The engine that is shown."""
        return self._session.engine

    @property
    def tree(self) -> TreeView:
        """The tree as it is now, for reading: nodes, texts, page counts. O(nodes)."""
        return TreeView(self._session)

    @property
    def selected(self) -> Any | None:
        """The live branch of the selected node, or None; set a branch to select its last node."""
        node = self._operations.selected_node
        if not node:
            return None
        try:
            piece = self._session.piece(node)
            return self._session.ending_at(piece) or self._session.carrier(piece)
        except StaleBranch:  # what was selected is gone: nothing is selected
            return None

    @selected.setter
    def selected(self, branch: Any | None) -> None:
        if branch is not None and branch.engine is not self.engine:
            raise StaleBranch(f"branch {branch.id} belongs to another engine")
        node = 0 if branch is None else self._session.node_of(branch)
        if branch is not None and not node:
            raise StaleBranch(f"branch {branch.id} is not shown by this explorer")
        self._operations.selected_node = node
        self.send({"t": "select", "node": node})

    @property
    def search(self) -> Any | None:
        """The search whose values are shown; set a handle to attach it, None to detach."""
        return self._session.search.handle

    @search.setter
    def search(self, handle: Any | None) -> None:
        self._session.watch_search(handle)
        self._publisher.kick()

    def simulate(
        self, op: str, *, node: int = 0, timeout: float = 60.0, **args: Any
    ) -> dict[str, Any]:
        """Do what a click does, through the same path, and return the reply.

        Makes a notebook's actions run where there is no browser. Operations: fork, generate, stop,
        extend, edit, prune, cost, top, force, tokens, select, prompt, search.

        Args:
            op: the operation.
            node: id of the node it is about (see `tree`).
            timeout: seconds to wait for the reply; generation goes on after the reply.
            args: arguments of the operation, such as `count=3` for fork.

        Returns:
            `{"ok": True, "result": ..., "elapsed_us": ...}`, or `{"ok": False, "error": {"type":
            ..., "message": ...}, ...}`: errors are returned as the front end gets them.

        Raises:
            CommandTimeout: no reply in time.

        Example:
            >>> explorer.simulate("fork", node=1, count=3)["result"]["cost"]["us"]  # doctest: +SKIP
        """
        content = {"id": f"py-{next(self._ids)}", "op": op, "node": node, "args": args}
        return self._desk.call(content, timeout)

    def close(self) -> None:
        """Stop the threads and remove the view. Branches stay as they are."""
        if not self._is_closed:
            self._is_closed = True
            self._publisher.close()
            self._desk.close()
        super().close()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        text = text_tree(self._session)
        self._fallback = text_tree(self._session, max_lines=_FALLBACK_LINES)
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return {"text/plain": text}, {}
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": text}, metadata

    # ---- messages; any thread -------------------------------------------------------------------

    def _receive(self, _widget: Any, content: Any, _buffers: Any) -> None:
        """Only check and enqueue: this may run on the main shell or on a subshell thread."""
        if not isinstance(content, dict):
            return
        kind = content.get("t")
        if kind == "cmd":
            self._desk.submit(content)
        elif kind == "ack" and isinstance(content.get("seq"), int):
            self._publisher.ack(content["seq"])
        elif kind == "hello":
            answer_on_sender(self)  # the comm may be a new one after a reconnect
            self._publisher.hello()
            self.send({"t": "select", "node": self._operations.selected_node})
        elif kind == "snapshot":
            self._publisher.want_snapshot()

    def _answer(self, reply: dict[str, Any]) -> None:
        if not self._is_closed:
            self.send(reply)
            self._publisher.kick()

    def _send_frame(self, frame: Frame) -> None:
        if not self._is_closed:
            self.send(frame.header, [frame.columns])
            self._fallback_stale = True

    def _keep_fallback(self) -> None:
        """What a saved notebook shows: refreshed in quiet moments, and not for huge trees."""
        now = time.monotonic()
        if not self._fallback_stale or now < self._fallback_due or self._is_closed:
            return
        self._fallback_stale, self._fallback_due = False, now + _FALLBACK_SECONDS
        if len(self._session.model.runs) <= _FALLBACK_MAX_RUNS:
            self._fallback = text_tree(self._session, max_lines=_FALLBACK_LINES)

    def _fail(self, error: BaseException) -> None:
        self.send({"t": "fault", "error": {"type": type(error).__name__, "message": str(error)}})


def _check(engine: Any, prompt: Any, root: Any, height: int) -> None:
    if prompt is not None and root is not None:
        raise InvalidArgument("give prompt (a new tree) or root (an existing branch), not both")
    if root is not None and getattr(root, "engine", None) is not engine:
        raise StaleBranch("root is a branch of another engine")
    if root is not None and not root.is_alive:
        raise StaleBranch(f"branch {root.id} was pruned; its tokens and pages are gone")
    if not isinstance(height, int) or not _MIN_HEIGHT <= height <= _MAX_HEIGHT:
        raise InvalidArgument(
            f"height must be in {_MIN_HEIGHT}..{_MAX_HEIGHT} pixels, got {height!r}"
        )
