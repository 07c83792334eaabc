"""A quality report as text, as Markdown rows and as plotly figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

_COLUMNS = (
    ("format", "format", "{}"), ("context", "context", "{}"), ("ratio", "x smaller", "{:.2f}"),
    ("perplexity", "ppl", "{:.3f}"), ("perplexity_percent", "ppl %", "{:+.2f}"),
    ("perplexity_percent_ci95", "+-", "{:.2f}"), ("kl_mean", "KL", "{:.2e}"),
    ("kl_p99", "KL p99", "{:.2e}"), ("top1_percent", "top-1 %", "{:.2f}"), ("gate", "gate", "{}"),
)  # fmt: skip
_GREY = "#808890"


def table(report: dict[str, Any]) -> str:
    """Aligned columns for a terminal."""
    lines = [[title for _, title, _ in _COLUMNS]]
    lines += [[form.format(row[key]) for key, _, form in _COLUMNS] for row in report["rows"]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    text = "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )
    extra = [f"{row['format']}: {row['text']}" for row in task_rows(report)]
    return "\n".join([text, *extra])


def task_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Needle hits and median position of divergence, one entry a format."""
    names = list(dict.fromkeys(row["format"] for row in (*report["needle"], *report["divergence"])))
    found = []
    for name in names:
        hits = [row["hit"] for row in report["needle"] if row["format"] == name]
        places = sorted(row["position"] for row in report["divergence"] if row["format"] == name)
        parts = [f"needle {sum(hits)}/{len(hits)}"] if hits else []
        if places:
            parts.append(
                f"greedy text differs after {places[len(places) // 2]} tokens (median, of "
                f"{report['divergence'][0]['of']})"
            )
        found.append({"format": name, "hits": sum(hits), "text": ", ".join(parts)})
    return found


def figure(report: dict[str, Any]) -> go.Figure:
    """Memory against KL, and the attention error of each layer."""
    plot = make_subplots(
        rows=1, cols=2, subplot_titles=("memory against quality", "attention error by layer")
    )
    for context in dict.fromkeys(row["context"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["context"] == context]
        plot.add_scatter(
            x=[row["bytes_per_token"] for row in rows],
            y=[max(row["kl_mean"], 1e-7) for row in rows],
            text=[row["format"] for row in rows],
            mode="markers+text",
            textposition="top center",
            name=f"context {context}",
            row=1,
            col=1,
        )
    for name, errors in report["attention"].items():
        plot.add_scatter(y=errors, mode="lines", name=name, row=1, col=2)
    plot.update_xaxes(title_text="bytes a token", row=1, col=1)
    plot.update_yaxes(title_text="KL to fp32 pages (nats)", type="log", row=1, col=1)
    plot.update_xaxes(title_text="layer", row=1, col=2)
    plot.update_yaxes(title_text="relative L2 error", type="log", row=1, col=2)
    plot.update_layout(
        title={"text": f"{report['model']}<br><sub>{report['text']}</sub>", "font": {"size": 15}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": _GREY},
        height=460,
    )
    return plot


def write_html(report: dict[str, Any], path: Path) -> None:
    """The figure as one page that needs no network."""
    figure(report).write_html(path, include_plotlyjs=True)
