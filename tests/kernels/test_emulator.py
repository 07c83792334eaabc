"""The device layer of the CUDA kernels: in the emulator, through nvcc, and on a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[2] / "cuda_ext" / "emulator" / "tests"

# Cases of device_tests.cu; what each checks is said there.
DEVICE_CASES = [
    "numbers", "math", "shuffles", "votes", "barriers", "matrices", "products", "copies",
    "atomics", "launches", "types",
]  # fmt: skip
ORDERS = ["forward", "backward", "shuffled"]

# Cases of misuse.cc, and what the emulator has to say about each wrong kernel.
MISTAKES = {
    "deadlock": r"block \(1, 0, 0\): deadlock, no thread can go on: threads 0 to 39 wait in"
    r" sync_block \(misuse.cc:\d+\); threads 40 to 63 wait in sync_warp \(misuse.cc:\d+\);"
    r" threads 64 to 95 returned",
    "two_barriers": r"thread 32 \(warp 1, lane 0\): calls sync_block \(misuse.cc:\d+\) while others"
    r" of its block wait in sync_block",
    "mixed_lanes": "thread 16 .*: calls ballot while others of its warp wait in shfl of 4 bytes",
    "mixed_sizes": "thread 1 .*: calls shfl of 4 bytes while .* wait in shfl of 8 bytes",
    "returned_lane": "shfl_xor of 4 bytes needs all 32 lanes, .* mask 0xffffffdf",
    "returns_last": "shfl_xor of 4 bytes needs all 32 lanes, .* mask 0x7fffffff",
    "partial_warp": "shfl_xor of 4 bytes needs all 32 lanes, .* mask 0xffff:",
    "ldmatrix_range": "thread 16 .*: ldmatrix_x4 .*: row at byte 512 .* which has 512 bytes",
    "ldmatrix_alignment": "thread 1 .*: ldmatrix_x4 .*: the address of a row is no multiple of 16",
    "copy_range": "thread 33 .*: cp_async_16: destination at byte 192 .* which has 200 bytes",
    "copy_before": "thread 33 .*: cp_async_16: destination at byte -16",
    "copy_alignment": "thread 33 .*: cp_async_16 into shared memory: .* no multiple of 16",
    "copy_source": "thread 33 .*: cp_async_16 from global memory: .* no multiple of 16",
    "copy_length": "valid_bytes is 17",
    "load_alignment": "thread 0 .*: load_16: the address is no multiple of 16",
    "global_load_alignment": "thread 0 .*: load_global_16: the address is no multiple of 16",
    "store_alignment": "thread 0 .*: store_16: the address is no multiple of 16",
    "wrong_space": "load_global_16: the address of global memory lies in shared memory",
    "write_past_end": r"block \(0, 0, 0\): wrote byte 101 of shared memory, which has 100 bytes",
    "write_before": "wrote 2 bytes before shared memory",
    "empty_grid": "a grid of 0 x 1 x 1 blocks is empty",
    "large_block": "a block of 1025 x 1 x 1 threads",
    "flat_block": "a block of 32 x 2 x 1 threads",
    "much_shared": "asks for 300000 bytes of shared memory, at most 232448",
}

# Cases of misuse.cc that check themselves what a careless kernel computes.
CONSEQUENCES = {
    "late_copies": "a copy that nobody waited for is NaN",
    "neighbours_copies": "a neighbour's copy is there only behind a barrier",
    "fresh_shared": "shared memory is NaN at the start of every block",
    "orders": "each order shows races that another one hides",
    "recovery": "after an error the emulator works as before",
    "device_size": "the device that launchers see can be set",
}

no_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def build(command: list[str], source: Path, program: Path) -> Path:
    """Compiles one file; any warning is an error of the test."""
    done = subprocess.run(
        [*command, str(source), "-o", str(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return program


def emulate(source: str, program: Path) -> Path:
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        pytest.skip("no C++ compiler on the PATH")
    flags = "-std=c++20 -O1 -Wall -Wextra -Wno-unknown-pragmas -DDENDRITE_EMULATE -x c++"
    return build([compiler, *flags.split()], TESTS / source, program)


def run(program: Path, *names: str) -> str | None:
    """Message of the first case that failed."""
    done = subprocess.run([str(program), *names], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.stderr if done.returncode else None


@pytest.fixture(scope="module")
def device_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulate("device_tests.cu", tmp_path_factory.mktemp("emulator") / "device_tests")


@pytest.fixture(scope="module")
def misuse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulate("misuse.cc", tmp_path_factory.mktemp("emulator") / "misuse")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", DEVICE_CASES)
def test_the_emulator_does_what_the_ptx_manual_says(device_tests, case, order):
    assert run(device_tests, order, case) is None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_kernel_is_named_with_its_block_and_thread(misuse, mistake):
    message = run(misuse, mistake)
    assert message is not None
    assert "launched at misuse.cc:" in message
    assert re.search(MISTAKES[mistake], message), message


@pytest.mark.parametrize("case", CONSEQUENCES)
def test_careless_kernels_show_it(misuse, case):
    assert run(misuse, case) is None


@no_nvcc
def test_nvcc_compiles_the_device_layer_for_hopper(tmp_path):
    command = ["nvcc", "-std=c++20", "-arch=sm_90a", "-Xcompiler", "-Wall", "-c"]
    assert build(command, TESTS / "device_tests.cu", tmp_path / "device_tests.o").stat().st_size > 0


@pytest.fixture(scope="module")
def gpu_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("cuda") / "device_tests"
    return build(["nvcc", "-std=c++20", "-arch=native"], TESTS / "device_tests.cu", program)


@no_nvcc
@no_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("case", DEVICE_CASES)
def test_a_gpu_does_what_the_emulator_does(gpu_tests, case):
    assert run(gpu_tests, case) is None
