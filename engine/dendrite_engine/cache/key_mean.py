"""The static mean of each head's K, calibrated once per model and stored beside its weights.

Quantising K - mean instead of K loses less where a head's K has large constant offsets. Softmax
does not see the difference: for one query the mean adds the same to the score of every token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dendrite_engine.cache.formats import PageShape
from dendrite_engine.errors import InvalidArgument, ModelError

FILE = "kv_mean.safetensors"
TENSOR = "key_mean"


def load_key_mean(directory: Path, unit: PageShape) -> torch.Tensor:
    """The mean of K, fp32 [num_layers, kv_heads, head_dim].

    Raises:
        InvalidArgument: the model was not calibrated.
        ModelError: the file can't be read, or is of another model.
    """
    path = directory / FILE
    if not path.exists():
        raise InvalidArgument(
            f"kv_center needs {path}, which is not there: run `dendrite-lab calibrate "
            f"{directory.name}` once"
        )
    wanted = (unit.num_layers, unit.kv_heads, unit.head_dim)
    try:
        mean = load_file(path)[TENSOR].float()
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{path} can't be read: {error}; calibrate the model again") from error
    if tuple(mean.shape) != wanted or not bool(torch.isfinite(mean).all()):
        raise ModelError(
            f"{path} holds {list(mean.shape)}, the model needs finite {list(wanted)}; calibrate it "
            "again"
        )
    return mean.contiguous()


def save_key_mean(directory: Path, mean: torch.Tensor) -> Path:
    """Write the mean beside the weights; returns the file.

    Raises:
        ModelError: the folder can't be written.
    """
    path = directory / FILE
    partial = path.with_suffix(".partial")
    try:
        save_file({TENSOR: mean.float().contiguous()}, partial)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} can't be written: {error}") from error
    return path
