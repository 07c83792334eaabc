"""Plain-text trees, figures, the search panel: what they show, and that text stays text."""

from __future__ import annotations

import threading

import numpy as np
import plotly.graph_objects as go
import pytest

from dendrite_engine.errors import InvalidArgument, SearchError
from dendrite_lab import Explorer, plots
from dendrite_lab.live_figure import LiveFigure
from dendrite_lab.page_map import read_page_map, tree_order
from dendrite_lab.text_tree import escape, text_tree

EVIL = [
    "<img src=x onerror=alert(1)>",
    "a\nb\tc",
    "\x1b[31m\x00",
    "\u202ex\u2066",
    '"hi"',
    "\u2028",
]


def test_a_text_tree_has_ids_tokens_text_and_pages(engine):
    root = engine.prompt("a b c d e")
    one, two = root.fork(2)
    one.extend(" x y z", [-1.0, -1.0, -1.0])
    two.fork()
    assert text_tree(engine) == (
        '#1  [0:5] "a b c d e"  2 pages, 0 own\n'
        '|-- #2  [5:8] " x y z"  2 pages, 1 own\n'
        '|-- #3  [5:5] ""  2 pages, 0 own\n'
        '`-- #4  [5:5] ""  2 pages, 0 own'
    )
    assert text_tree(one).startswith("#2  [0:")


def test_an_empty_engine_is_said_to_be_empty(engine):
    assert text_tree(engine) == "(no branches)"


def test_long_trees_and_texts_are_cut(engine):
    root = engine.prompt("word " * 100)
    root.fork(20)
    lines = text_tree(engine, max_lines=5, width=20).splitlines()
    assert len(lines) == 6
    assert lines[-1] == "... 16 more nodes"
    assert '..."' in lines[0]


@pytest.mark.parametrize("text", EVIL)
def test_control_and_direction_characters_are_escaped(text):
    shown = escape(text)
    assert shown.isprintable() or " " in shown
    assert not set(shown) & set("\n\t\x1b\x00\u202e\u2066\u2028")


def test_pruned_parents_are_marked(engine):
    root = engine.prompt("a b c d")
    root.fork()
    root.prune()
    assert "(pruned)" in text_tree(engine)


def test_the_page_map_names_who_shares_what(engine):
    root = engine.prompt("a b c d e f")
    one, two = root.fork(2)
    one.extend(" x", [-1.0])
    pages = read_page_map(engine, 10)
    assert pages.branches == [root.id, one.id, two.id]
    assert pages.holders[:, 0].tolist() == [3, 3, 3]
    assert pages.holders[1, 1] == 1
    assert pages.labels[0] == pages.labels[2]
    assert pages.sharers[0][0] == "#1 #2 #3"
    assert (pages.live, pages.shared) == (3, 2)


def test_tree_order_puts_children_after_their_parent(engine):
    root = engine.prompt("a b")
    one, two = root.fork(2)
    (under_one,) = one.fork()
    assert [b.id for b in tree_order(engine.branches)] == [root.id, one.id, under_one.id, two.id]
    one.prune()
    assert [b.id for b in tree_order(engine.branches)] == [root.id, two.id, under_one.id]


def test_memory_and_refcount_figures(engine):
    root = engine.prompt("a b c d e f g h")
    root.fork(3)
    figure = plots.memory(engine)
    assert isinstance(figure, go.Figure)
    assert figure.data[0].z.tolist() == [[4.0, 4.0]] * 4
    assert figure.layout.title.text.startswith("live pages: 2 (2 shared")
    figure = plots.refcounts(engine)
    assert list(figure.data[0].x) == ["4"]
    assert list(figure.data[0].y) == [2]
    figure.to_json()


def test_figures_of_an_empty_engine_and_of_too_many_branches(engine):
    assert plots.memory(engine).data[0].z.size == 0
    assert plots.refcounts(engine).to_json()
    engine.prompt("a b").fork(9)
    figure = plots.memory(engine, max_branches=4)
    assert len(figure.data[0].y) == 4
    assert "6 more branches" in figure.layout.xaxis.title.text
    with pytest.raises(InvalidArgument, match="max_branches"):
        plots.memory(engine, max_branches=0)


def test_a_live_figure_writes_only_what_changed_and_stops(engine):
    root = engine.prompt("a b c d e f g h")
    figure = plots.memory(engine, live=True)
    try:
        assert isinstance(figure, go.FigureWidget)
        assert figure.live.running
        before = figure.live.updates
        assert not figure.live.update()
        root.fork(2)
        assert figure.live.update() or figure.live.updates > before
        assert len(figure.data[0].y) == 3
    finally:
        figure.live.stop()
    assert not figure.live.running


def test_a_live_figure_ends_with_what_it_shows():
    ended = threading.Event()
    widget = go.FigureWidget(go.Figure(go.Bar()))
    values = {"data": [{"y": np.array([1.0])}], "layout": {}}
    live = LiveFigure(widget, lambda: values, ended.is_set, "test").start()
    ended.set()
    live._thread.join(5)
    assert not live.running
    assert list(widget.data[0].y) == [1.0]


def test_an_error_in_a_live_figure_is_shown_in_it():
    def read():
        if live.updates:
            raise RuntimeError("no more numbers")
        return {"data": [{"y": [1]}], "layout": {}}

    widget = go.FigureWidget(go.Figure(go.Bar()))
    live = LiveFigure(widget, read, lambda: False, "test")
    live.start()._thread.join(5)
    assert "no more numbers" in widget.layout.title.text
    assert isinstance(live.error, RuntimeError)


@pytest.fixture
def searchable(make_engine):
    return make_engine("llama")


def test_the_panel_starts_pauses_steps_and_stops_a_search(searchable):
    from dendrite_engine import Budget
    from dendrite_engine.search import MCTS
    from dendrite_lab import SearchPanel

    root = searchable.prompt(list(range(5, 15)))
    explorer = Explorer(searchable, root=root)
    panel = SearchPanel(
        searchable, root, MCTS(width=2, tokens_per_node=2, parallel=1, seed=1),
        budget=Budget(iterations=10_000), explorer=explorer,
    )  # fmt: skip
    with pytest.raises(SearchError, match="no search is running"):
        panel.pause()
    panel.step()
    assert panel.handle.wait_paused(30)
    assert panel.handle.usage().iterations == 1
    assert explorer.search is panel.handle
    with pytest.raises(SearchError, match="running already"):
        panel.start()
    panel._sliders["exploration"].value = 2.5
    panel._sliders["width"].value = 5
    panel.step()
    assert panel.handle.wait_paused(30)
    assert (panel.handle.algorithm.exploration, panel.handle.algorithm.width) == (2.5, 5)
    panel._refresh()  # what its thread does five times a second
    assert panel._buttons["pause"].description == "Resume"
    assert any(node.visits for node in explorer.tree)
    figure = plots.uct(panel.handle)
    assert figure.data[0].y.max() >= 1
    panel.resume()
    panel.stop()
    assert panel.handle.wait(30).reason == "stopped"
    panel._refresh()
    assert panel._buttons["start"].disabled is False
    panel.close()
    explorer.close()


def test_a_click_that_fails_shows_its_error_as_text(searchable):
    from dendrite_lab import SearchPanel

    root = searchable.prompt([5, 6, 7])
    panel = SearchPanel(searchable, root)
    panel._buttons["stop"].click()
    assert panel._error.value.startswith("SearchError: no search is running")
    assert panel._error.layout.display == ""
    root.prune()
    panel._buttons["start"].click()
    assert panel._error.value.startswith("StaleBranch")
    panel.close()


def test_the_explorer_steers_an_attached_search(searchable):
    from dendrite_engine import Budget
    from dendrite_engine.search import MCTS

    root = searchable.prompt(list(range(5, 15)))
    budget = Budget(iterations=10_000)
    handle = searchable.search(root, MCTS(tokens_per_node=2), budget, paused=True)
    explorer = Explorer(searchable, root=root, search=handle)
    assert explorer.simulate("search", action="step")["ok"]
    assert handle.wait_paused(30)
    assert not explorer.simulate("search", action="explode")["ok"]
    assert explorer.simulate("search", action="stop")["ok"]
    handle.wait(30)
    explorer.close()
