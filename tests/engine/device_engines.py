"""Engines on the device path, for tests: the torch twins, the emulated kernels, or a GPU."""

from __future__ import annotations

import pytest
import torch

from wide_models import WIDE

ON_A_GPU = pytest.param("cuda", marks=pytest.mark.cuda)


def why_no_gpu() -> str:
    """Why CUDA tests can't run here; empty where they can."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    from dendrite_engine.kernels.device_ops import load_cuda

    result = load_cuda()
    return "" if result.loaded else result.reason


def engine_maker(where: str, make_engine, monkeypatch):
    """Makes engines on the device path: with the torch twins, with the kernels' source in the
    emulator, or on a GPU. The models are wide, because the kernels need heads of 64.
    """
    if where == "cuda" and (reason := why_no_gpu()):
        pytest.skip(reason)
    if where == "emulated":
        emulate(monkeypatch)

    def make(kind: str = "llama", **options):
        device = "cuda" if where == "cuda" else "cuda-twin"
        return make_engine(kind + WIDE, **{"device": device, "dtype": "float32", **options})

    return make


def emulate(monkeypatch) -> None:
    """Engines of the device cuda-twin run the kernels' source from now on."""
    from dendrite_engine.kernels import device_ops

    result = device_ops.load_emulated()
    if not result.loaded:
        pytest.skip(result.reason)
    real = device_ops.DeviceKernels
    monkeypatch.setattr(
        device_ops, "DeviceKernels", lambda name, reason: real("emulated", result.reason)
    )


def need_packed_kernels(where: str) -> None:
    """Skip where the library in use does not implement packed pages."""
    if where == "twin":
        return
    namespace, key = ("dendrite", "CUDA") if where == "cuda" else ("dendrite_emulated", "CPU")
    for operation in ("rope_store_packed", "copy_packed", "tree_attention_packed"):
        name = f"{namespace}::{operation}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, key):
            pytest.skip(f"the {where} library has no {operation}")
