"""Fixtures of the lab tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fakes import FakeEngine


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def explorer(engine):
    from dendrite_lab import Explorer

    widget = Explorer(engine, "Once upon a time there was")
    yield widget
    widget.close()
