"""A panel of buttons and sliders that starts a search and steers it while it runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import ipywidgets as widgets

from dendrite_engine.errors import DendriteError, SearchError
from dendrite_lab.comm_guard import answer_all_on_sender

_REFRESH_SECONDS = 0.2
_ENDED = ("done", "stopped", "failed")
_MAX_BEST_TEXT = 2000
_COUNTERS = ("state", "iterations", "nodes", "tokens", "tokens/s", "seconds", "best value")


class SearchPanel(widgets.VBox):  # type: ignore[misc]  # ipywidgets has no types
    """Start, pause, step and stop a search, and change its options while it runs.

    Buttons work while a cell is busy. Every button is also a method, so a notebook without a front
    end can do the same.

    Args:
        engine: the engine to search with.
        root: the branch to search from.
        algorithm: a `Search`; default `MCTS()`.
        evaluator: scores branches; default the search's own (mean log-probability).
        budget: limits; default the algorithm's own.
        explorer: an `Explorer` that is to show N, Q and UCT of the search.

    Attributes:
        handle: the search that was started last, or None.

    Example:
        >>> panel = SearchPanel(engine, root, explorer=explorer)  # doctest: +SKIP
        >>> panel.start(); panel.pause(); panel.handle.stats()    # doctest: +SKIP
    """

    def __init__(
        self,
        engine: Any,
        root: Any,
        algorithm: Any = None,
        evaluator: Any = None,
        budget: Any = None,
        explorer: Any = None,
    ) -> None:
        if algorithm is None:
            from dendrite_engine.search import MCTS

            algorithm = MCTS()
        self._engine, self._root = engine, root
        self._algorithm, self._evaluator, self._budget = algorithm, evaluator, budget
        self._explorer = explorer
        self.handle: Any = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._build_controls()
        self._build_readings()
        super().__init__(
            [
                widgets.HBox(list(self._buttons.values())),
                widgets.HBox(list(self._sliders.values())),
                widgets.HBox(list(self._counters.values()), layout=_wrapped()),
                self._best,
                self._error,
            ]
        )
        answer_all_on_sender(self)
        self._refresh()

    # ---- verbs; each returns at once
    # --------------------------------------------------------------

    def start(self, *, paused: bool = False) -> Any:
        """Start a new search with the options shown; returns its handle.

        Args:
            paused: start it paused, to go on step by step.

        Raises:
            SearchError: one is still running.
            DendriteError: what `Engine.search` raises.
        """
        with self._lock:
            if self.handle is not None and self.handle.state not in _ENDED:
                raise SearchError("a search is running already; stop it first")
            self.handle = self._engine.search(
                self._root, self._options(), self._budget, evaluator=self._evaluator, paused=paused
            )
            if self._explorer is not None:
                self._explorer.search = self.handle
        self._watch()
        return self.handle

    def pause(self) -> None:
        """Hold the search after the batch in flight."""
        self._running().pause()
        self._refresh()

    def resume(self) -> None:
        """Let a paused search go on."""
        self._running().resume()
        self._refresh()

    def step(self) -> None:
        """Run one batch and pause; starts the search, paused, where there is none."""
        if self.handle is None or self.handle.state in _ENDED:
            self.start(paused=True)
        self._running().step()
        self._refresh()

    def stop(self) -> None:
        """End the search; its result is the best found so far."""
        self._running().stop()
        self._refresh()

    def close(self) -> None:
        """Stop watching and remove the panel. A running search goes on."""
        self._closing.set()
        super().close()

    # ---- building
    # ---------------------------------------------------------------------------------

    def _build_controls(self) -> None:
        self._buttons: dict[str, widgets.Button] = {}
        for name, icon, act in (
            ("start", "play", self.start),
            ("pause", "pause", self._pause_or_resume),
            ("step", "step-forward", self.step),
            ("stop", "stop", self.stop),
        ):
            button = widgets.Button(description=name.capitalize(), icon=icon)
            button.layout.width = "104px"
            button.on_click(self._guarded(act))
            self._buttons[name] = button
        self._buttons["start"].button_style = "primary"
        self._sliders: dict[str, Any] = {}
        known = {f.name for f in fields(self._algorithm)}
        live = self._algorithm.live_options & known
        if "exploration" in live:
            self._sliders["exploration"] = widgets.FloatSlider(
                value=self._algorithm.exploration, min=0.0, max=max(4.0,
                self._algorithm.exploration), step=0.05, description="exploration",
                continuous_update=False, readout_format=".2f",
            )  # fmt: skip
        if "width" in live:
            self._sliders["width"] = widgets.IntSlider(
                value=self._algorithm.width, min=1, max=max(16, self._algorithm.width),
                description="width", continuous_update=False,
            )  # fmt: skip
        for name, slider in self._sliders.items():
            slider.style.description_width = "80px"
            slider.observe(self._changed(name), names="value")

    def _build_readings(self) -> None:
        self._counters = {name: widgets.Label("") for name in _COUNTERS}
        for label in self._counters.values():
            label.layout.min_width = "92px"
        # A disabled text area shows model text as text, whatever is in it.
        self._best = widgets.Textarea(
            value="", disabled=True, rows=4, placeholder="best text so far",
            layout=widgets.Layout(width="98%"),
        )  # fmt: skip
        self._error = widgets.Textarea(
            value="", disabled=True, rows=2, layout=widgets.Layout(width="98%", display="none")
        )

    def _guarded(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """A click handler: it only enqueues, and shows what goes wrong instead of raising it."""

        def handler(_: Any) -> None:
            try:
                act()
                self._show_error("")
            except DendriteError as error:
                self._show_error(f"{type(error).__name__}: {error}")

        return handler

    def _changed(self, name: str) -> Callable[[Any], None]:
        def handler(change: Any) -> None:
            if self.handle is not None:
                self._guarded(lambda: self.handle.set(**{name: change["new"]}))(None)

        return handler

    # ---- inside
    # -------------------------------------------------------------------------------------

    def _options(self) -> Any:
        return replace(self._algorithm, **{name: s.value for name, s in self._sliders.items()})

    def _running(self) -> Any:
        if self.handle is None or self.handle.state in _ENDED:
            raise SearchError("no search is running; start one first")
        return self.handle

    def _pause_or_resume(self) -> None:
        if self._running().state == "paused":
            self.resume()
        else:
            self.pause()

    def _show_error(self, text: str) -> None:
        self._error.value = text
        self._error.layout.display = "" if text else "none"

    def _watch(self) -> None:
        """Follow the counters from a thread until the search ends."""
        if self._watcher is not None and self._watcher.is_alive():
            return
        self._watcher = threading.Thread(
            target=self._follow, name="dendrite-lab search panel", daemon=True
        )
        self._watcher.start()

    def _follow(self) -> None:
        try:
            ended = False
            while not ended and not self._closing.wait(_REFRESH_SECONDS):
                with self._lock:  # a search started just now must not be missed
                    ended = self.handle.state in _ENDED
                    if ended:
                        self._watcher = None
                self._refresh()
        except Exception as error:  # shown in the panel: a thread has nobody to raise to
            self._show_error(f"the panel stopped: {type(error).__name__}: {error}")

    def _refresh(self) -> None:
        """Bring buttons, counters and the best text up to date. Any thread."""
        handle = self.handle
        state = "ready" if handle is None else handle.state
        self._counters["state"].value = state
        active = state in ("running", "paused")
        self._buttons["start"].disabled = active
        self._buttons["pause"].disabled = self._buttons["stop"].disabled = not active
        self._buttons["pause"].description = "Resume" if state == "paused" else "Pause"
        self._buttons["pause"].icon = "play" if state == "paused" else "pause"
        if handle is None:
            return
        usage = handle.usage()
        rate = usage.tokens / usage.seconds if usage.seconds > 0 else 0.0
        self._counters["iterations"].value = f"{usage.iterations} iterations"
        self._counters["nodes"].value = f"{usage.nodes} nodes"
        self._counters["tokens"].value = f"{usage.tokens} tokens"
        self._counters["tokens/s"].value = f"{rate:.1f} tokens/s"
        self._counters["seconds"].value = f"{usage.seconds:.1f} s"
        self._refresh_best(handle, state)

    def _refresh_best(self, handle: Any, state: str) -> None:
        if state == "failed":
            try:
                handle.result  # noqa: B018  (raises what made the search fail)
            except Exception as error:
                self._show_error(f"{type(error).__name__}: {error}")
            return
        value, text = best_of(handle)
        self._counters["best value"].value = "" if value is None else f"best {value:.4f}"
        if text != self._best.value:
            self._best.value = text


def best_of(handle: Any) -> tuple[float | None, str]:
    """Value and text of the best node so far; (None, "") before there is one."""
    if handle.state in ("done", "stopped"):
        return handle.result.value, handle.result.text[:_MAX_BEST_TEXT]
    branch = handle.best
    if branch is None:
        return None, ""
    table = handle.stats()
    rows = (table.branch_id == branch.id).nonzero()[0]
    value = float(table.value[rows[-1]]) if len(rows) else None
    try:
        ids = branch.token_ids[handle.root.num_tokens :]
    except DendriteError:  # it was pruned since: the next reading has another
        return value, ""
    return value, branch.engine.tokenizer.decode(ids, skip_special=True)[:_MAX_BEST_TEXT]


def _wrapped() -> widgets.Layout:
    return widgets.Layout(flex_flow="row wrap")
