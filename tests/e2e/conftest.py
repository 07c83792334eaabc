"""One JupyterLab and one browser for all browser tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from lab_browser import ARTIFACTS, CHROMIUM_FLAGS, Lab, find_browser  # noqa: E402


@pytest.fixture(scope="session")
def lab(tmp_path_factory, default_model) -> Iterator[Lab]:
    """A running JupyterLab; the model is in the cache already."""
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A headless Chromium; missing is an error in CI, a stated skip elsewhere."""
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


@pytest.fixture
def page(browser, request) -> Iterator:
    """A page that collects errors, and leaves a screenshot and its console when a test fails."""
    page = browser.new_page(viewport={"width": 1400, "height": 1050})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    yield page
    ARTIFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTIFACTS / f"{request.node.name}-end.png")
    page.close()
