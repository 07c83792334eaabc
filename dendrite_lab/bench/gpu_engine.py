"""An engine with random weights of a real shape, made as any other engine is made."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dendrite_engine import Engine
from dendrite_engine.config import EngineConfig
from dendrite_engine.errors import InvalidArgument
from dendrite_lab.bench.shapes import SHAPES, Shape, shape_of
from dendrite_lab.bench.synthetic import write_model

SLACK_PAGES = 256


def wants_device(argv: Sequence[str]) -> bool:
    """Whether the arguments ask for the benchmark's GPU form: `--shape` or `--device` is given."""
    return any(word.partition("=")[0] in ("--shape", "--device") for word in argv)


def parser_of(name: str) -> argparse.ArgumentParser:
    """A parser with the options that all GPU benchmarks share."""
    parser = argparse.ArgumentParser(prog=f"dendrite-lab bench {name}")
    parser.add_argument("--shape", default="tinyllama-1.1b", help=", ".join(SHAPES))
    parser.add_argument("--device", default="cuda", help="as Engine.from_pretrained takes it")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peers", nargs="*", default=None, metavar="NAME",
        help="hf, vllm, sglang; default: all that are installed; no name: none",
    )  # fmt: skip
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", dest="options",
        help="further options of the engine, as attention=flashinfer or graph_rows=512",
    )  # fmt: skip
    return parser


def case_of(text: str, form: str) -> tuple[int, int]:
    """The two counts of a case such as 64x4096; `form` names them in the error."""
    first, _, second = text.partition("x")
    if not (first.isdecimal() and second.isdecimal() and int(first) and int(second)):
        raise InvalidArgument(f"not a case: {text!r}; write {form}, as 64x4096")
    return int(first), int(second)


def engine_options(words: Sequence[str]) -> dict[str, Any]:
    """Keywords of Engine.from_pretrained out of OPTION=VALUE words.

    Raises:
        InvalidArgument: an unknown option, or no value.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, given, value = word.partition("=")
        if not given or name not in EngineConfig.__dataclass_fields__:
            known = ", ".join(EngineConfig.__dataclass_fields__)
            raise InvalidArgument(f"--set {word!r}: write OPTION=VALUE; options: {known}")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    constants = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    return int(text) if text.lstrip("-").isdigit() else text


@contextmanager
def open_engine(args: argparse.Namespace, tokens: int, **options: Any) -> Iterator[Engine]:
    """An engine whose pool holds `tokens` tokens and some slack; its memory is freed afterwards."""
    shape = shape_of(args.shape)
    settings: dict[str, Any] = {
        "device": args.device,
        "weights": "random",
        "num_pages": -(-tokens // 16) + SLACK_PAGES,
        **options,
        **engine_options(args.options),
    }
    with model_directory(shape) as path:
        engine = Engine.from_pretrained(path, **settings)
    try:
        yield engine
    finally:
        engine.close()
        engine.prune_all()
        del engine
        release()


@contextmanager
def model_directory(shape: Shape) -> Iterator[Path]:
    """A temporary directory with config.json and tokenizer.json of the shape."""
    with tempfile.TemporaryDirectory(prefix=f"{shape.name}-") as folder:
        yield write_model(Path(folder), shape)


def release() -> None:
    """Give freed device memory back, so that the next engine or peer finds it."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(args: argparse.Namespace) -> None:
    """Wait for the device."""
    import torch

    if args.device.startswith("cuda") and torch.cuda.is_available():
        torch.cuda.synchronize()
