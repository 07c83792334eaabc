"""Plotly figures of memory and search: which pages are shared by whom, and how a search sees its
nodes.

Each function returns a `go.Figure`, or with `live=True` a `go.FigureWidget` that a thread keeps up
to date until what it shows has ended or the figure is closed. Colours are safe for colour-blind
readers; backgrounds are transparent, so figures fit light and dark notebooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.tree import STATUSES
from dendrite_lab.live_figure import follow
from dendrite_lab.page_map import PageMap, read_page_map

MAX_BRANCHES = 64
_MAX_LABELLED_CELLS = 600
_FEW_ROWS = 24  # more rows than this are drawn thinner
_GREY = "#808890"
_GRID = "rgba(128,136,144,0.25)"
_BLUE, _ORANGE, _GREEN = "#0072b2", "#d55e00", "#009e73"
_COLORBAR = {
    "title": {"text": "held by"}, "thickness": 12, "outlinewidth": 0, "tickformat": "d",
    "lenmode": "pixels", "len": 160, "y": 1, "yanchor": "top", "nticks": 5,
}  # fmt: skip
_HOLDERS = [
    [0.0, "#f3d9a4"],
    [0.01, "#cfe3f3"],
    [0.35, "#7fb6dc"],
    [0.7, "#2f7fbd"],
    [1.0, "#08407c"],
]


def memory(engine: Any, *, live: bool = False, max_branches: int = MAX_BRANCHES) -> go.Figure:
    """Which KV pages each branch holds, and how many branches share each page.

    One row a branch (in tree order, so sharers are neighbours), one column a page along the
    branch's path; the number in a cell is the page id, its colour how many branches hold that page.

    Args:
        engine: the engine whose pages to show.
        live: return a `FigureWidget` that follows the engine.
        max_branches: rows at most; the axis says when branches were left out.

    Raises:
        InvalidArgument: max_branches is below 1.

    Example:
        >>> plots.memory(engine).show()  # doctest: +SKIP
    """
    if max_branches < 1:
        raise InvalidArgument(f"max_branches must be at least 1, got {max_branches}")

    def read() -> dict[str, Any]:
        return _memory_update(read_page_map(engine, max_branches))

    figure = go.Figure(go.Heatmap(xgap=1, ygap=2, zmin=1, colorscale=_HOLDERS, hoverongaps=False))
    _style(figure)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(showgrid=False)
    return _finish(figure, read, live, lambda: _is_closed(engine), "memory")


def refcounts(engine: Any, *, live: bool = False) -> go.Figure:
    """Histogram of page refcounts: how many live pages are held by 1, 2, 3 ... branches.

    Args:
        engine: the engine whose pages to count.
        live: return a `FigureWidget` that follows the engine.
    """
    figure = go.Figure(go.Bar(textposition="outside", cliponaxis=False))
    _style(figure, x="branches that hold the page", y="live pages")
    figure.update_xaxes(type="category")
    return _finish(
        figure, lambda: _refcounts_update(engine), live, lambda: _is_closed(engine), "refcounts"
    )


def uct(search: Any, *, live: bool = False) -> go.Figure:
    """N, Q and UCT of every node of a search, by node id (the order in which they were made).

    Args:
        search: a `SearchHandle`, running or ended.
        live: return a `FigureWidget` that follows the search to its end.
    """
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06,
        row_titles=["visits N", "value Q", "UCT"],
    )  # fmt: skip
    figure.add_trace(go.Bar(name="N", marker_color=_BLUE), row=1, col=1)
    marker = {"size": 7, "color": _ORANGE, "symbol": "circle"}
    figure.add_trace(go.Scatter(name="Q", mode="markers", marker=marker), row=2, col=1)
    marker = {"size": 7, "color": _GREEN, "symbol": "diamond"}
    figure.add_trace(go.Scatter(name="UCT", mode="markers", marker=marker), row=3, col=1)
    _style(figure, height=460)
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title_text="node", row=3, col=1)
    ended = ("done", "stopped", "failed")
    return _finish(figure, lambda: _uct_update(search), live, lambda: search.state in ended, "uct")


def _finish(
    figure: go.Figure,
    read: Callable[[], dict[str, Any]],
    live: bool,
    ended: Callable[[], bool],
    name: str,
) -> go.Figure:
    """Fill a figure once, or make it a widget that is filled again and again."""
    if not live:
        figure.update(read())
        return figure
    widget = go.FigureWidget(figure)
    follow(widget, read, ended, name)
    return widget


def _memory_update(pages: PageMap) -> dict[str, Any]:
    """New values of the memory figure, in the form that `Figure.update` takes."""
    names = [f"branch {branch}" for branch in pages.branches]
    left_out = pages.branches_total - len(names)
    title = (
        f"live pages: {pages.live} ({pages.shared} shared, {pages.live - pages.shared} held by one "
        f"branch); free: {pages.free:,} of {pages.total:,}"
    )
    axis = "page along the path"
    if left_out:
        axis += f" ({left_out} more branches not shown)"
    most = int(np.nanmax(pages.holders)) if pages.holders.size and pages.live else 1
    labelled = pages.holders.size <= _MAX_LABELLED_CELLS
    cell = {
        "z": pages.holders,
        "y": names,
        "text": pages.labels,
        "texttemplate": "%{text}" if labelled else "",
        "customdata": pages.sharers,
        "zmax": max(2, most),
        "colorbar": _COLORBAR,
        "hovertemplate": "page %{text} of %{y}<br>held by %{z}: %{customdata}<extra></extra>",
    }
    height = max(220, 110 + len(names) * (24 if len(names) <= _FEW_ROWS else 15))
    layout = {"title": {"text": title}, "height": height, "xaxis": {"title": {"text": axis}}}
    return {"data": [cell], "layout": layout}


def _refcounts_update(engine: Any) -> dict[str, Any]:
    stats = engine.stats()
    counts = sorted(stats.refcount_histogram.items())
    shared = sum(pages for holders, pages in counts if holders > 1)
    bar = {
        "x": [str(holders) for holders, _ in counts],
        "y": [pages for _, pages in counts],
        "text": [str(pages) for _, pages in counts],
        "marker": {"color": [_ORANGE if holders == 1 else _BLUE for holders, _ in counts]},
        "hovertemplate": "%{y} pages held by %{x}<extra></extra>",
    }
    saved = stats.bytes_saved / 2**20
    title = f"{stats.pages_live} live pages, {shared} shared; sharing saves {saved:.1f} MiB"
    return {"data": [bar], "layout": {"title": {"text": title}}}


def _uct_update(search: Any) -> dict[str, Any]:
    table = search.stats()
    ids = table.node_id.tolist()
    details = [
        f"branch #{branch}, {STATUSES[status]}"
        for branch, status in zip(table.branch_id.tolist(), table.status.tolist(), strict=True)
    ]
    visited = table.visits > 0
    value = np.where(visited, table.value, np.nan)
    score = np.where(visited & np.isfinite(table.uct), table.uct, np.nan)
    hover = "node %{x}: %{y}<br>%{customdata}<extra></extra>"
    rows = [
        {"x": ids, "y": y, "customdata": details, "hovertemplate": hover}
        for y in (table.visits, value, score)
    ]
    usage = search.usage()
    title = (
        f"{search.algorithm.name}, {search.state}: {usage.iterations} iterations, "
        f"{usage.nodes} nodes, {usage.tokens} tokens"
    )
    return {"data": rows, "layout": {"title": {"text": title}}}


def _style(figure: go.Figure, *, x: str = "", y: str = "", height: int = 320) -> None:
    axis = {"gridcolor": _GRID, "zeroline": False, "linecolor": _GRID}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": _GREY, "size": 12},
        title={
            "font": {"size": 14},
            "x": 0,
            "xanchor": "left",
            "xref": "container",
            "pad": {"l": 12},
        },
        margin={"l": 76, "r": 24, "t": 48, "b": 48},
        height=height,
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)


def _is_closed(engine: Any) -> bool:
    return bool(getattr(engine, "is_closed", False))


__all__ = ["MAX_BRANCHES", "memory", "refcounts", "uct"]
