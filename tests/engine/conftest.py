"""Options of the engine tests."""

from __future__ import annotations

import pytest

CORE_EXAMPLES = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--core-examples",
        type=int,
        default=CORE_EXAMPLES,
        help="runs of the control plane's state machine, 50 steps each; more than the default are"
        " drawn at random",
    )


@pytest.fixture(scope="session")
def core_examples(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--core-examples", default=CORE_EXAMPLES)
