"""From the name in `kv_format` to a page format of the CPU path."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dendrite_engine.cache.formats import PAIRS, VECTOR_FORMATS, PageFormat, PageShape
from dendrite_engine.cache.formats.dense import DenseFp32
from dendrite_engine.cache.formats.packed import LayerFormat, PackedFormat
from dendrite_engine.errors import InvalidArgument, UnknownName


def format_names() -> list[str]:
    """Every name that `kv_format` takes on the CPU, besides pairs "K/V"."""
    return sorted([*VECTOR_FORMATS.names(), *PAIRS])


def is_cpu_format(name: str) -> bool:
    """Whether `layer_format` knows the name."""
    try:
        layer_format(name)
    except UnknownName:
        return False
    return True


def layer_format(name: str) -> LayerFormat:
    """The pair of vector formats called `name`.

    Args:
        name: a format ("tq4"), a named pair ("k8v4"), or "K/V" ("tq4/fp32").

    Raises:
        UnknownName: there is no such format; the message lists those there are.
    """
    parts = PAIRS[name] if name in PAIRS else tuple(name.split("/")) * (1 if "/" in name else 2)
    if len(parts) != 2 or not all(part in VECTOR_FORMATS for part in parts):
        raise UnknownName(
            f"unknown page format {name!r}; known: {', '.join(format_names())}, and pairs such as "
            "tq4/fp8_e4m3 (K, then V)"
        )
    return LayerFormat(VECTOR_FORMATS.get(parts[0])(), VECTOR_FORMATS.get(parts[1])())


def choose_format(
    name: str,
    unit: PageShape,
    overrides: Mapping[int, str] | None = None,
    key_mean: torch.Tensor | None = None,
    first: str | None = None,
) -> PageFormat:
    """The page format of the CPU path.

    Args:
        name: see `layer_format`.
        unit: sizes of the model and the page.
        overrides: other names for single layers; -1 is the last layer.
        key_mean: see PackedFormat.
        first: name of the format of pages with position 0, or None: as the others.

    Raises:
        UnknownName: a name is unknown.
        InvalidArgument: a layer does not exist, or head_dim or page_size do not fit the format.
    """
    layers = [layer_format(name)] * unit.num_layers
    for index, other in (overrides or {}).items():
        if not -unit.num_layers <= index < unit.num_layers:
            raise InvalidArgument(
                f"kv_layers names layer {index}, but the model has {unit.num_layers} layers"
            )
        layers[index] = layer_format(other)
    if all(layer.name == "fp32" for layer in layers):
        return DenseFp32()
    title = layers_title(name, layers)
    begun = None if first is None else layer_format(first)
    packed = PackedFormat(title, layers, key_mean, begun)
    packed.check(unit)
    return packed


def layers_title(name: str, layers: list[LayerFormat]) -> str:
    """`name`, and how many layers differ."""
    usual = layer_format(name).name
    others: dict[str, int] = {}
    for layer in layers:
        if layer.name != usual:
            others[layer.name] = others.get(layer.name, 0) + 1
    notes = ", ".join(f"{count} layers {other}" for other, count in others.items())
    return f"{name} ({notes})" if notes else name
