"""Options of the search tests; lets them import `search_fakes`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

BEAM_PROMPTS, BEAM_TOKENS = 3, 32


@pytest.fixture(scope="session")
def beam_size(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Prompts, and tokens of each, to compare with transformers."""
    full = request.config.getoption("--beam-full", default=False)
    return (10, 64) if full else (BEAM_PROMPTS, BEAM_TOKENS)
