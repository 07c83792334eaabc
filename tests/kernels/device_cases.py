"""What tests of the device operations share: the kernels that run here, tensors, tolerances.

A test takes the fixture `target` and runs twice: on the emulated kernels, which run anywhere, and,
marked `cuda`, on the GPU. It compares `target.ops` with the twins of `device_reference`:

    def test_silu(target):
        gate_up = target.randn(3, 64, dtype=torch.bfloat16)
        out, want = target.poisoned(2, 3, 32, dtype=torch.bfloat16)
        target.ops.silu_mul(gate_up, out)
        device_reference.silu_mul(gate_up, want)
        assert_close(out, want)
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

import pytest
import torch

from dendrite_engine.kernels import device_ops

NAN = float("nan")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TARGETS = ["emulated", pytest.param("cuda", marks=pytest.mark.cuda)]
_GUARD = 64  # elements on both sides of a tensor that nothing may write

# Kernel and twin round the same value once, but reach it in another order.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass
class Target:
    """Kernels under test and the device of their tensors."""

    ops: device_ops.DeviceKernels
    device: str
    _guarded: list[torch.Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """ "emulated" or "cuda"."""
        return self.ops.name

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, a copy even on the CPU, with guards around it."""
        whole = torch.empty(tensor.numel() + 2 * _GUARD, dtype=tensor.dtype, device=self.device)
        whole.fill_(_poison(tensor.dtype))
        inside = whole[_GUARD : _GUARD + tensor.numel()].view(tensor.shape)
        inside.copy_(tensor)
        self._guarded.append(whole)
        return inside

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        """Normal numbers that do not depend on the device."""
        generator = torch.Generator().manual_seed(seed)
        return self.put(torch.randn(*shape, generator=generator).to(dtype))

    def ints(self, values: object) -> torch.Tensor:
        """An int32 tensor."""
        return self.put(torch.tensor(values, dtype=torch.int32))

    def poisoned(
        self, copies: int, *shape: int, dtype: torch.dtype = torch.float32
    ) -> list[torch.Tensor]:
        """Output tensors full of NaN (of -1111 for integers)."""
        full = torch.full(shape, _poison(dtype), dtype=dtype)
        return [self.put(full) for _ in range(copies)]

    def check_guards(self) -> None:
        """Nothing was written next to a tensor of this target."""
        for whole in self._guarded:
            for guard in (whole[:_GUARD], whole[-_GUARD:]):
                kept = guard.isnan() if whole.is_floating_point() else guard == _poison(whole.dtype)
                assert bool(kept.all()), "a kernel wrote outside of its output"


def _poison(dtype: torch.dtype) -> float:
    return NAN if dtype.is_floating_point else -1111


def make_target(name: str) -> Target:
    """The kernels called `name` ("emulated" or "cuda"); skips the test, with the reason, if there
    are none. CI has to have the emulated ones.
    """
    load = device_ops.load_cuda if name == "cuda" else device_ops.load_emulated
    result = load()
    if not result.loaded:
        if name == "emulated" and os.environ.get("CI") and sys.platform == "linux":
            pytest.fail(f"CI has to run the emulated kernels: {result.reason}")
        pytest.skip(f"no {name} kernels: {result.reason}")
    device = "cuda" if name == "cuda" else "cpu"
    return Target(device_ops.DeviceKernels(name, result.reason), device)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, scale: float = 1.0) -> None:
    """Equal up to one rounding of their dtype (times `scale`); NaN equals NaN."""
    assert actual.dtype == expected.dtype
    tolerance = scale * TOLERANCE[actual.dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bitwise equality, of NaN too."""
    as_ints = torch.int32 if actual.dtype == torch.float32 else torch.int16
    return torch.equal(actual.contiguous().view(as_ints), expected.contiguous().view(as_ints))
