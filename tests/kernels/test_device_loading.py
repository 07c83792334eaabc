"""Loading the device kernels: schemas, twins behind the ops, and reasons instead of errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dendrite_engine.kernels import device_ops, device_reference

ROW_OPS = ("embed", "add_rms_norm", "rope_store_kv", "silu_mul", "copy_pages")


def row_arguments() -> dict[str, tuple]:
    """Small CPU arguments of each row operation."""
    generator = torch.Generator().manual_seed(0)
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pages = (randn(3, 1, 8, 16), randn(3, 1, 8, 16))
    return {
        "embed": (ints(1, 0), randn(3, 8), randn(2, 8)),
        "add_rms_norm": (randn(2, 8), randn(2, 8), randn(8), 1e-5, randn(2, 8), None),
        "rope_store_kv": (
            randn(2, 4 * 16), ints(0, 1), randn(4, 8), randn(4, 8), ints(3, -1), *pages,
            randn(2, 2, 16), randn(16), None, 1e-6,
        ),
        "silu_mul": (randn(2, 16), randn(2, 8)),
        "copy_pages": (randn(2, 3, 1, 8, 16), randn(2, 3, 1, 8, 16), ints(0, 1, 3)[None], ints(1)),
    }  # fmt: skip


@pytest.mark.parametrize("name", ROW_OPS)
def test_an_op_on_cpu_tensors_is_its_twin(name):
    op, twin = getattr(torch.ops.dendrite, name).default, getattr(device_reference, name)
    ours, theirs = row_arguments()[name], row_arguments()[name]
    op(*ours)
    twin(*theirs)
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want


@pytest.mark.parametrize("name", ROW_OPS)
def test_schemas_say_what_is_written(name):
    torch.library.opcheck(
        getattr(torch.ops.dendrite, name).default,
        row_arguments()[name],
        test_utils=("test_schema", "test_faketensor"),
    )


def test_every_operation_is_a_method_of_the_kernels():
    ops = device_ops.DeviceKernels("twin", "for this test")
    for name in device_ops.OPS:
        assert callable(getattr(ops, name))


def test_without_cuda_the_twins_stand_in_and_the_reason_is_kept():
    ops = device_ops.device_kernels()
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert ops.name == "twin"
    assert "without CUDA" in ops.reason or "no CUDA device" in ops.reason
    gate_up, out = torch.randn(2, 16), torch.empty(2, 8)
    ops.silu_mul(gate_up, out)
    torch.testing.assert_close(out, torch.nn.functional.silu(gate_up[:, :8]) * gate_up[:, 8:])


def test_a_file_that_is_no_library_is_reported_not_raised(tmp_path):
    path = tmp_path / "libdendrite_emulated.so"
    path.write_bytes(b"not a library")
    result = device_ops.load_emulated(path)
    assert not result.loaded
    assert "libdendrite_emulated.so can't be loaded" in result.reason
    assert result.path == path


def test_a_missing_library_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(device_ops, "_find", lambda name: None)
    result = device_ops._load("libdendrite_cuda.so", None)
    assert not result.loaded
    assert "libdendrite_cuda.so was not built" in result.reason


def test_importing_the_schemas_loads_no_library():
    script = (
        "import dendrite_engine.kernels.device_ops as d;"
        "assert not any('libdendrite' in line for line in open('/proc/self/maps'));"
        "assert d.load_cuda.cache_info().currsize == 0"
    )
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_cuda_library_registers_every_operation_on_a_torch_without_cuda_too():
    path = device_ops._find("libdendrite_cuda.so")
    if path is None:
        pytest.skip("libdendrite_cuda.so was not built here (no nvcc)")
    script = (
        "import sys, torch; from dendrite_engine.kernels import device_ops as d;"
        "torch.ops.load_library(sys.argv[1]);"
        "print(*[n for n in d.OPS"
        " if not torch._C._dispatch_has_kernel_for_dispatch_key('dendrite::' + n, 'CUDA')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_the_cuda_library_brings_nothing_of_the_machine_that_built_it():
    path = device_ops._find("libdendrite_cuda.so")
    if path is None:
        pytest.skip("libdendrite_cuda.so was not built here (no nvcc)")
    data = path.read_bytes()
    assert b"libcudart.so" not in data  # linked statically
    assert b"libpython" not in data
    assert str(torch.__path__[0]).encode() not in data
