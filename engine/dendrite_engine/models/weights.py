"""Reads a model's tensors from safetensors files, memory-mapped, one tensor at a time."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from dendrite_engine.errors import ModelError
from dendrite_engine.models.config import read_json

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in name order.

    Raises:
        ModelError: there are none; says so when only pickled weights exist, which are never loaded.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [directory / name for name in names]
        missing = [file.name for file in files if not file.exists() or file.parent != directory]
        if missing:
            raise ModelError(f"{index} names files that are missing: {', '.join(missing)}")
        return files
    files = sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    if pickled:
        raise ModelError(
            f"{directory} has only pickled weights ({', '.join(pickled)}), which can run code when "
            "loaded and are refused; convert them to safetensors"
        )
    raise ModelError(f"{directory} has no .safetensors weights")


class WeightSource(Protocol):
    """Where a model's tensors come from, by their name in a Hugging Face checkpoint."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor, in the compute dtype and on the compute device."""


class WeightReader:
    """Context manager over the tensors of a model directory.

    Tensors are read straight into the memory of `device` and cast to `dtype` there. On the CPU they
    may be views of the file, at any address; with `aligned` one that does not start at a multiple
    of 16 bytes is copied, for kernels that load vectors.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        aligned: bool = False,
    ) -> None:
        self._directory, self._dtype, self._device = directory, dtype, str(device)
        self._aligned = aligned
        self._handles: list[Any] = []
        self._where: dict[str, Any] = {}

    def __enter__(self) -> WeightReader:
        from safetensors import SafetensorError, safe_open

        for file in weight_files(self._directory):
            try:
                handle = safe_open(file, framework="pt", device=self._device)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file} is not a readable safetensors file: {error}") from error
            self._handles.append(handle)
            names: list[str] = list(handle.keys())
            self._where.update(dict.fromkeys(names, handle))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._where.clear()
        self._handles.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name` in the compute dtype; ModelError when missing or of another shape."""
        handle = self._where.get(name)
        if handle is None:
            raise ModelError(f"{self._directory} lacks the tensor {name}")
        tensor: torch.Tensor = handle.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"{name} has shape {tuple(tensor.shape)}, config.json implies {shape}")
        if not tensor.is_floating_point():
            raise ModelError(
                f"{name} has dtype {tensor.dtype}; quantised weights are not supported"
            )
        tensor = tensor.to(self._dtype)
        return tensor.clone() if self._aligned and tensor.data_ptr() % 16 else tensor
