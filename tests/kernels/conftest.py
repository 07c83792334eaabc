"""Fixtures of the kernel tests: every implementation that this machine can run."""

from __future__ import annotations

from collections.abc import Iterator

import device_cases
import pytest

from dendrite_engine import kernels


def _available() -> list[str]:
    if kernels.load("auto").name != "native":
        return []
    from dendrite_engine import _cpu

    return _cpu.available_isas()


NATIVE = _available()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", NATIVE)
    if "choice" in metafunc.fixturenames:
        metafunc.parametrize("choice", [*NATIVE, "reference"])


@pytest.fixture
def native(isa):
    """Native kernels at one instruction set, two threads."""
    return kernels.load("native", isa=isa, threads=2)


@pytest.fixture
def ops(choice):
    """Native kernels at each instruction set, then the reference."""
    if choice == "reference":
        return kernels.load("reference")
    return kernels.load("native", isa=choice, threads=2)


@pytest.fixture
def reference():
    """The torch twin."""
    return kernels.load("reference")


@pytest.fixture(params=device_cases.TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[device_cases.Target]:
    """The device kernels, emulated and on the GPU; see device_cases."""
    under_test = device_cases.make_target(request.param)
    yield under_test
    under_test.check_guards()
