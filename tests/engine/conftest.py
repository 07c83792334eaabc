"""Options of the engine tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def core_examples(request: pytest.FixtureRequest) -> int | None:
    return request.config.getoption("--core-examples", default=None)
