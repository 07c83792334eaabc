"""Options of the engine tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--core-examples",
        type=int,
        help="runs of the control plane's state machine, 50 steps each, drawn at random; without"
        " it the same runs every time",
    )


@pytest.fixture(scope="session")
def core_examples(request: pytest.FixtureRequest) -> int | None:
    return request.config.getoption("--core-examples", default=None)
