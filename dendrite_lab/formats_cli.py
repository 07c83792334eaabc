"""The subcommands about page formats: `quality`, `calibrate`, `capacity`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dendrite_engine.config import parse_bytes
from dendrite_engine.errors import InvalidArgument

EXIT_MISSED = 1


def add_commands(commands: Any) -> None:
    """Add the three parsers."""
    _add_quality(commands)
    summary = "Find each head's mean K once and store it with the model, for kv_center=True."
    calibrate = commands.add_parser("calibrate", help=summary, description=summary)
    calibrate.set_defaults(command=run_calibrate)
    calibrate.add_argument("model", metavar="MODEL")
    calibrate.add_argument("--tokens", type=int, default=4096, help="sampled tokens to average")
    calibrate.add_argument("--seed", type=int, default=0)
    summary = "Show how many tokens fit in some memory, for each page format."
    capacity = commands.add_parser("capacity", help=summary, description=summary)
    capacity.set_defaults(command=run_capacity)
    capacity.add_argument(
        "model", metavar="MODEL_CONFIG", help="known shape (qwen3-32b, ...), config.json, or folder"
    )
    capacity.add_argument("--memory", default="128GiB", help='bytes, or text such as "80GB"')
    capacity.add_argument("--weights", default="bf16", help="fp32, bf16, fp8, q8_0 or q4_0")
    capacity.add_argument("--json", action="store_true")


def _add_quality(commands: Any) -> None:
    summary = "Measure what page formats cost: perplexity, KL, top-1, attention, needle, greedy."
    quality = commands.add_parser("quality", help=summary, description=summary)
    quality.set_defaults(command=run_quality)
    quality.add_argument("model", metavar="MODEL")
    quality.add_argument("--formats", nargs="+", metavar="FORMAT", help="default: all of them")
    quality.add_argument(
        "--ablate", nargs="*", metavar="FORMAT", help="measure these for K only and V only too"
    )
    quality.add_argument("--contexts", nargs="+", type=int, default=[512, 2048], metavar="N")
    quality.add_argument("--tokens", type=int, default=16384, help="scored, for each context")
    quality.add_argument(
        "--protect",
        nargs="*",
        metavar="FORMAT",
        help="measure these with K centred and first pages in bf16 too",
    )
    quality.add_argument(
        "--layers", nargs="*", default=[], metavar="LAYER=FORMAT", help="for example 0=bf16 -1=bf16"
    )
    quality.add_argument("--no-tasks", action="store_true", help="leave out needle and greedy")
    quality.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to measure on")
    quality.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    quality.add_argument("--html", type=Path, metavar="FILE", help="write the figure there")


def run_quality(arguments: argparse.Namespace) -> int:
    """Measure, print the table; 1 when a format misses its gate."""
    from dendrite_lab.quality import Settings, measure_quality, report

    options: dict[str, Any] = {}
    if arguments.formats is not None:
        options.update(formats=tuple(arguments.formats), ablate=(), protect=())
    if arguments.protect is not None:
        options["protect"] = tuple(arguments.protect)
    if arguments.ablate is not None:
        options["ablate"] = tuple(arguments.ablate)
    if arguments.no_tasks:
        options.update(needle_lengths=(), greedy_tokens=0)
    settings = Settings(
        contexts=tuple(arguments.contexts),
        tokens=arguments.tokens,
        layers=dict(_layer(item) for item in arguments.layers),
        text=arguments.text,
        progress=sys.stderr.isatty(),
        **options,
    )
    found = measure_quality(arguments.model, settings)
    print(report.table(found))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.html is not None:
        report.write_html(found, arguments.html)
    return EXIT_MISSED if any(row["gate"] == "MISSED" for row in found["rows"]) else 0


def _layer(item: str) -> tuple[int, str]:
    index, separator, name = item.partition("=")
    if not separator or not index.lstrip("-").isdigit():
        raise InvalidArgument(f"--layers takes LAYER=FORMAT, as in -1=bf16; got {item!r}")
    return int(index), name


def run_calibrate(arguments: argparse.Namespace) -> int:
    """Calibrate and print the file."""
    from dendrite_lab.quality.calibrate import calibrate

    print(calibrate(arguments.model, arguments.tokens, arguments.seed))
    return 0


def run_capacity(arguments: argparse.Namespace) -> int:
    """Print a table, or JSON."""
    from dendrite_lab.capacity import capacity, format_text, read_shape

    memory = parse_bytes(arguments.memory, "--memory")
    found = capacity(read_shape(arguments.model), memory, arguments.weights)
    print(json.dumps(found, indent=2) if arguments.json else format_text(found))
    return 0
