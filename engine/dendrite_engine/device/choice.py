"""Which device the engine computes on, and with which numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dendrite_engine.config import EngineConfig
from dendrite_engine.errors import InvalidArgument

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMAT_OF = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Where forward passes run.

    Attributes:
        device: of weights, pages and activations.
        uses_device_path: the device runner, as against the CPU's kernels.
        is_twin: the device path with CPU tensors.
        ops: its operations; None on the CPU path.
        reason: in words, for `Engine.report()`.
    """

    device: torch.device
    uses_device_path: bool
    is_twin: bool
    ops: Any
    reason: str


def choose_device(config: EngineConfig) -> DeviceChoice:
    """The device that the configuration asks for.

    Raises:
        InvalidArgument: a CUDA device was asked for by name and can't be used; the text says why.
    """
    name = config.device
    cpu = torch.device("cpu")
    if name == "cpu":
        return DeviceChoice(cpu, False, False, None, "asked for")
    if name == "cuda-twin":
        from dendrite_engine.kernels.device_ops import DeviceKernels

        ops = DeviceKernels("twin", "asked for: CPU tensors, for tests")
        return DeviceChoice(cpu, True, True, ops, ops.reason)
    choice = _cuda(name)
    if isinstance(choice, DeviceChoice):
        return choice
    if name != "auto":
        raise InvalidArgument(f"device {name!r} can't be used: {choice}")
    return DeviceChoice(cpu, False, False, None, choice)


def _cuda(name: str) -> DeviceChoice | str:
    """The GPU `name`, or why it can't be used."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    device = torch.device("cuda" if name == "auto" else name)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} CUDA devices"
    from dendrite_engine.kernels.device_ops import device_kernels

    with torch.cuda.device(index):
        ops = device_kernels()
    if ops.name != "cuda":
        return ops.reason
    about = torch.cuda.get_device_properties(index)
    reason = f"{about.name}, compute capability {about.major}.{about.minor}"
    return DeviceChoice(torch.device("cuda", index), True, False, ops, reason)


def compute_dtype(config: EngineConfig, choice: DeviceChoice) -> torch.dtype:
    """Type of weights and activations.

    Raises:
        InvalidArgument: the CPU path computes in float32 only.
    """
    if config.dtype == "auto":
        return torch.bfloat16 if choice.device.type == "cuda" else torch.float32
    dtype = DTYPES[config.dtype]
    if dtype != torch.float32 and not choice.uses_device_path:
        raise InvalidArgument(
            f"dtype {config.dtype!r} needs a CUDA device, and the engine runs on the CPU "
            f"({choice.reason}); use dtype='float32'"
        )
    return dtype


def page_format_name(config: EngineConfig, dtype: torch.dtype) -> str:
    """Name of the page format: K and V have the compute dtype on either path."""
    return FORMAT_OF[dtype] if config.kv_format == "auto" else config.kv_format
