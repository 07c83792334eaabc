"""The subcommand about trees in files: `tree`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FORMATS = ("text", "mermaid", "dot", "json")


def add_commands(commands: Any) -> None:
    """Add the parser."""
    summary = "Show a tree from a file: exported JSON, a saved search or branches, a TreeLog."
    tree = commands.add_parser("tree", help=summary, description=summary)
    tree.set_defaults(command=run_tree)
    tree.add_argument("file", metavar="FILE", type=Path)
    tree.add_argument("--format", choices=FORMATS, default="text", help="default: text")
    tree.add_argument(
        "--model", metavar="MODEL", help="decode tokens with this model's tokenizer, where a file "
        "has no text (built-in name, or directory)"
    )  # fmt: skip
    tree.add_argument("--width", type=int, default=60, help="characters of a node's text at most")
    tree.add_argument("--output", metavar="FILE", type=Path, help="write there instead of printing")


def run_tree(arguments: argparse.Namespace) -> int:
    """Print a tree, or write it to a file."""
    from dendrite_lab import trees
    from dendrite_lab.trees.drawing import outline

    tree = trees.read(arguments.file)
    if arguments.model is not None:
        from dendrite_engine.models.hub import resolve_model
        from dendrite_engine.models.tokenizer import Tokenizer

        tree.decode(Tokenizer(resolve_model(arguments.model)))
    width = max(8, arguments.width)
    made = {
        "text": lambda: outline(tree, width),
        "mermaid": lambda: tree.to_mermaid(width=width),
        "dot": lambda: tree.to_dot(width=width),
        "json": lambda: tree.to_json(indent=1),
    }[arguments.format]()
    if arguments.output is None:
        print(made)
    else:
        arguments.output.write_text(made + "\n", encoding="utf-8")
    return 0
