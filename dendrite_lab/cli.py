"""The command `dendrite-lab`. Each subcommand imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dendrite_engine.errors import DendriteError
from dendrite_lab import formats_cli, trees_cli

DEFAULT_MODEL = "smollm2-135m-instruct"
EXIT_MISMATCH = 1
EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        0 on success, 1 where `golden` finds a difference, 2 after an error (message on stderr; with
        `--debug` the traceback too), 130 after Ctrl-C.
    """
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    command: Command = arguments.command
    if rest and command is not run_bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        return command(arguments)
    except DendriteError as error:
        if arguments.debug:
            raise
        print(f"dendrite-lab: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) went away
        sys.stderr.close()
        return EXIT_ERROR


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="dendrite-lab", description="Explore branching LLM inference in JupyterLab."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_lab(commands)
    _add_generate(commands)
    _add_golden(commands)
    _add_bench(commands)
    formats_cli.add_commands(commands)
    trees_cli.add_commands(commands)
    _add_small(commands)
    return parser


def _add(commands: Any, name: str, command: Command, summary: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(command=command)
    return parser


def _add_lab(commands: Any) -> None:
    lab = _add(commands, "lab", run_lab, "Open JupyterLab on the quickstart notebook.")
    lab.add_argument("--port", type=int, default=None, help="port (default: 8888 or the next free)")
    lab.add_argument("--no-browser", action="store_true", help="only print the URL")
    lab.add_argument("--dir", type=Path, default=None, help="folder to serve instead of notebooks/")


def _add_generate(commands: Any) -> None:
    generate = _add(
        commands, "generate", run_generate, "Continue a prompt, on one or more branches."
    )
    generate.add_argument("model", metavar="MODEL", help="built-in name, directory, or hub id")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--max-tokens", type=int, default=128)
    generate.add_argument(
        "--temperature", type=float, default=None, help="default: 0 (greedy), or 0.8 with branches"
    )
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--branches", type=int, default=1, metavar="N")
    generate.add_argument("--raw", action="store_true", help="do not use the chat template")


def _add_golden(commands: Any) -> None:
    golden = _add(
        commands, "golden", run_golden, "Compare greedy tokens with Hugging Face in float32."
    )
    golden.add_argument("model", metavar="MODEL")
    golden.add_argument("--prompts", type=int, default=50, metavar="N")
    golden.add_argument("--tokens", type=int, default=64, metavar="N")


def _add_bench(commands: Any) -> None:
    bench = _add(commands, "bench", run_bench, "Run a benchmark; further arguments go to it.")
    bench.add_argument("name", metavar="NAME", help="fork, memory, tree, first-token, ...")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the result there")


def _add_small(commands: Any) -> None:
    doctor = _add(commands, "doctor", run_doctor, "Show versions, kernels in use, and problems.")
    doctor.add_argument("--json", action="store_true")
    fetch = _add(commands, "fetch", run_fetch, "Fetch a model into the cache; print its folder.")
    fetch.add_argument("model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL)
    _add(commands, "version", run_version, "Print the version.")


def run_lab(arguments: argparse.Namespace) -> int:
    """Start JupyterLab and stay with it."""
    from dendrite_lab.launch import launch_lab

    return launch_lab(
        port=arguments.port, open_browser=not arguments.no_browser, folder=arguments.dir
    )


def run_generate(arguments: argparse.Namespace) -> int:
    """Print a continuation as it comes, or several one after the other."""
    from dendrite_lab.generate import generate

    return generate(
        arguments.model,
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        branches=arguments.branches,
        raw=arguments.raw,
    )


def run_golden(arguments: argparse.Namespace) -> int:
    """Print a row for each prompt; 1 when a token differs."""
    from dendrite_lab.golden import compare, format_report

    report = compare(arguments.model, prompts=arguments.prompts, tokens=arguments.tokens)
    print(format_report(report))
    return EXIT_MISMATCH if report.mismatches else 0


def run_bench(arguments: argparse.Namespace) -> int:
    """Run a benchmark and write its result as JSON."""
    from dendrite_lab import bench

    result = bench.run(arguments.name, arguments.rest)
    text = json.dumps(result, indent=2) + "\n"
    if arguments.json is None:
        print(text, end="")
    else:
        arguments.json.write_text(text, encoding="utf-8")
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print what is installed and which paths run; 2 when something needed is missing."""
    from dendrite_lab.doctor import examine, format_text

    findings = examine()
    print(json.dumps(findings, indent=2) if arguments.json else format_text(findings))
    return EXIT_ERROR if findings["problems"] else 0


def run_fetch(arguments: argparse.Namespace) -> int:
    """Make sure a model is in the cache and print its directory."""
    from dendrite_engine.models.hub import resolve_model

    print(resolve_model(arguments.model))
    return 0


def run_version(_arguments: argparse.Namespace) -> int:
    """Print the version."""
    from dendrite_lab import __version__

    print(f"dendrite-lab {__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
