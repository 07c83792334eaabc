"""One JupyterLab and one browser for all browser tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lab_browser import CHROMIUM_FLAGS, Lab, find_browser


@pytest.fixture(scope="module")
def lab(tmp_path_factory, default_model) -> Iterator[Lab]:
    """A running JupyterLab; the model is in the cache already."""
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A headless Chromium; missing is an error in CI, a stated skip elsewhere.

    Not for the whole session: while Playwright lives, no other test can run an event loop.
    """
    path = find_browser()
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium or Chrome found: the browser tests must run in CI")
        pytest.skip("no Chromium or Chrome found")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
