"""From the name in `kv_format` to a page format of the CPU path or of the device path."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dendrite_engine.cache.formats import (
    DEVICE_PAGE_FORMATS,
    PAIRS,
    VECTOR_FORMATS,
    PageFormat,
    PageShape,
)
from dendrite_engine.cache.formats.dense import DenseFp32
from dendrite_engine.cache.formats.device_packed import DevicePackedFormat
from dendrite_engine.cache.formats.packed import LayerFormat, PackedFormat
from dendrite_engine.errors import InvalidArgument, UnknownName


def format_names() -> list[str]:
    """Every name that `kv_format` takes, besides pairs "K/V"."""
    return sorted([*VECTOR_FORMATS.names(), *PAIRS])


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
    layers = layer_table(name, unit, overrides)
    if all(layer.name == "fp32" for layer in layers):
        return DenseFp32()
    title = layers_title(name, layers)
    begun = None if first is None else layer_format(first)
    packed = PackedFormat(title, layers, key_mean, begun)
    packed.check(unit)
    return packed


def choose_device_format(
    name: str,
    unit: PageShape,
    device: torch.device,
    dense: str,
    overrides: Mapping[int, str] | None = None,
    key_mean: torch.Tensor | None = None,
) -> PageFormat:
    """The page format of the device path.

    Args:
        name: see `layer_format`.
        unit: sizes of the model and the page.
        device: of the pool.
        dense: the format whose numbers are those of the compute dtype: pages of it alone are not
            packed.
        overrides: other names for single layers; -1 is the last layer.
        key_mean: see PackedFormat.

    Raises:
        UnknownName: a name is unknown.
        InvalidArgument: a layer does not exist, or head_dim or page_size do not fit the format.
    """
    layers = layer_table(name, unit, overrides)
    if key_mean is None and all(layer.name == dense for layer in layers):
        return DEVICE_PAGE_FORMATS.get(dense)(device)
    packed = DevicePackedFormat(layers_title(name, layers), layers, device, key_mean)
    packed.check(unit)
    return packed


def layer_table(
    name: str, unit: PageShape, overrides: Mapping[int, str] | None
) -> list[LayerFormat]:
    """The format of every layer: `name`, but for the overrides.

    Raises:
        UnknownName: a name is unknown.
        InvalidArgument: a layer does not exist.
    """
    layers = [layer_format(name)] * unit.num_layers
    for index, other in (overrides or {}).items():
        if not -unit.num_layers <= index < unit.num_layers:
            raise InvalidArgument(
                f"kv_layers names layer {index}, but the model has {unit.num_layers} layers"
            )
        layers[index] = layer_format(other)
    return layers


def layers_title(name: str, layers: list[LayerFormat]) -> str:
    """`name`, and how many layers differ."""
    usual = layer_format(name).name
    others: dict[str, int] = {}
    for layer in layers:
        if layer.name != usual:
            others[layer.name] = others.get(layer.name, 0) + 1
    notes = ", ".join(f"{count} layers {other}" for other, count in others.items())
    return f"{name} ({notes})" if notes else name
