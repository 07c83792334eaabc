"""What ptxas said when the CUDA kernels were compiled: no kernel spills registers."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from dendrite_engine.kernels import device_ops

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n"
    r"(?:.*\n)*?\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers"
)


class Kernel(NamedTuple):
    """One kernel for one architecture."""

    file: str
    name: str
    arch: str
    spilled: int
    registers: int


def parse(report: str) -> list[Kernel]:
    """The kernels of a report of cuda_ext/ops/join_logs.cmake."""
    kernels = []
    for part in report.split("== ")[1:]:
        file, _, log = part.partition("\n")
        for found in _KERNEL.finditer(log):
            spilled = int(found["stores"]) + int(found["loads"])
            registers = int(found["registers"])
            kernels.append(Kernel(file, found["name"], found["arch"], spilled, registers))
    return kernels


def report() -> list[Kernel]:
    library = device_ops._find("libdendrite_cuda.so")
    if library is None:
        pytest.skip("libdendrite_cuda.so was not built here (no nvcc)")
    return parse(library.with_suffix(".ptxas.txt").read_text("utf-8"))


# One loop variable of the warps that make numbers out of codes, stored and read once a tile: what a
# block starts with leaves them 64 to 88 registers.
KNOWN = {"32tree_attention_packed_tma_kernel": 20}


def allowed(kernel: Kernel) -> int:
    """Bytes that a kernel may spill."""
    return max((most for name, most in KNOWN.items() if name in kernel.name), default=0)


def test_no_kernel_spills_registers_but_one_that_is_known():
    spills = [
        f"{k.file} {k.name} {k.arch}: {k.spilled} bytes" for k in report() if k.spilled > allowed(k)
    ]
    assert not spills, "\n".join(spills)


def test_the_report_has_every_kernel_for_the_same_architectures():
    kernels = report()
    archs = {kernel.arch for kernel in kernels}
    assert archs
    for file in {kernel.file for kernel in kernels}:
        names = [(kernel.name, kernel.arch) for kernel in kernels if kernel.file == file]
        assert len(names) == len(set(names)) == len({name for name, _ in names}) * len(archs)
    files = {kernel.file for kernel in kernels}
    assert {"norm.cu", "rope_store.cu", "elementwise.cu", "copy_pages.cu"} <= files


def test_a_spill_is_found():
    kernels = parse(
        "== a.cu\n"
        "ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Z1fv\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z1gv\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers\n"
    )
    assert kernels == [
        Kernel("a.cu", "_Z1fv", "sm_90a", 20, 255),
        Kernel("a.cu", "_Z1gv", "sm_80", 0, 8),
    ]
