"""Weights out of a generator: models of real shapes without their files, for benchmarks."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from dendrite_engine.models.config import ModelConfig

_STD = 0.02


class RandomWeights:
    """Seeded random tensors with the interface of WeightReader.

    Matrices are normal with a standard deviation of 0.02, norms are 1 and biases 0, so activations
    and logits stay of order 1 for any number of layers. A tensor depends on its name, shape and the
    seed only, not on what was read before it.

    Example:
        >>> source = RandomWeights(config, torch.device("cuda"), torch.bfloat16)  # doctest: +SKIP
        >>> source.get("model.norm.weight", config.hidden_size)                   # doctest: +SKIP
    """

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self._tied = config.tie_embeddings
        self._device, self._dtype, self._seed = device, dtype, seed

    def __contains__(self, name: str) -> bool:
        return name != "lm_head.weight" or not self._tied

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor [*shape] in the dtype and on the device of this source."""
        options: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        if name.endswith("norm.weight"):
            return torch.ones(shape, **options)
        if name.endswith(".bias"):
            return torch.zeros(shape, **options)
        generator = torch.Generator(self._device)
        generator.manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
        drawn = torch.empty(shape, device=self._device).normal_(0.0, _STD, generator=generator)
        return drawn.to(self._dtype)  # every dtype rounds the same numbers
