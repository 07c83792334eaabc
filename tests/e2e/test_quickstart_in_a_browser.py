"""The main job in a real browser: run the quickstart, fork by clicking, steer a search, stay live.

Times are compared on one clock: `time.perf_counter_ns` is the system clock in the kernel's
process and in this one, and every event of the engine's trace carries it.
"""

from __future__ import annotations

import time

import pytest
from lab_browser import ARTIFACTS, IDLE, Kernel, run_all

pytestmark = [pytest.mark.browser, pytest.mark.model, pytest.mark.timeout(600)]

NOTEBOOK = "00_quickstart.ipynb"
MINUTE = 60_000
ANSWER_SECONDS = 0.3  # on top of one decode step
BUSY_SECONDS = 30  # of a cell at most; it ends earlier, once what it waits for was seen
BUSY = """
import os as _os, time as _time
busy_from = _look = _time.perf_counter_ns()
print("busy", flush=True)
while _look - busy_from < {seconds} * 10**9 and not ({done}):
    _look += 20_000_000
    while _time.perf_counter_ns() < _look:
        sum(range(1000))
busy_to = _time.perf_counter_ns()
"""
FORKED = "any(e.kind == 'fork' for e in engine.trace.since({seq}))"
FORKS_SINCE = """[[e.t_ns, e.branch_id] for e in engine.trace.since({seq}) if e.kind == 'fork']"""
EXTENDED = """[e.branch_id for e in engine.trace.since({seq}) if e.kind == 'extend']"""
SEARCH_RUNS = """() => [...document.querySelectorAll('.dl-strip')]
    .some(e => e.textContent.includes('running'))"""
UNTIL_VISITED = """
import time as _time
while panel.handle.stats().visits.max(initial=0) < 12:
    _time.sleep(0.02)
"""
STAMP_PAUSE = """
import time as _time
def _stamped(pause=panel.handle.pause):
    global paused_at_ns
    pause()
    paused_at_ns = _time.perf_counter_ns()
panel.handle.pause = _stamped
"""
HOSTILE = (
    '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'
    "<svg onload='window.pwned=1'></svg>javascript:window.pwned=1 {{window.pwned=1}}"
)


class Desk:
    """The notebook in the browser, and its kernel beside it."""

    def __init__(self, page, kernel: Kernel) -> None:
        self.page, self.kernel = page, kernel
        self.root = page.locator(".dl-root").first
        self.stage = self.root.locator(".dl-stage")

    def key(self, *keys: str) -> None:
        """Press keys with the tree focused."""
        self.stage.focus()
        for key in keys:
            self.page.keyboard.press(key)

    def seq(self) -> int:
        """Number of events logged so far."""
        return self.kernel.evaluate("len(engine.trace)")

    def until(self, condition: str) -> None:
        """Ask the kernel until a Python condition holds; AssertionError after a minute."""
        deadline = time.monotonic() + 60
        while not self.kernel.evaluate(f"bool({condition})"):
            assert time.monotonic() < deadline, f"never became true: {condition}"

    def keep_busy(self, until: str) -> str:
        """Start a cell that computes until a Python condition holds; returns once it runs."""
        cell = self.kernel.start(BUSY.format(seconds=BUSY_SECONDS, done=until))
        self.kernel.wait_for_output(cell)
        return cell

    def allowed_seconds(self) -> float:
        """One decode step, the slowest of late, and the agreed rest."""
        return self.kernel.evaluate("max(engine._loop.step_ms) / 1e3") + ANSWER_SECONDS


@pytest.fixture(scope="module")
def desk(lab, browser):
    """The quickstart, all cells run, in the light theme."""
    page = browser.new_page(viewport={"width": 1400, "height": 1050})
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    ARTIFACTS.mkdir(exist_ok=True)
    lab.theme("JupyterLab Light")
    page.goto(lab.url(NOTEBOOK))
    try:
        run_all(page)
        page.wait_for_selector(".dl-root .dl-dot.dl-live", timeout=2 * MINUTE)
        kernel = lab.kernel()
        page.wait_for_selector(IDLE, timeout=2 * MINUTE)
        yield Desk(page, kernel)
        kernel.close()
    finally:
        page.screenshot(path=ARTIFACTS / "quickstart-end.png")
        page.close()


def test_every_cell_of_the_quickstart_ran_without_an_error(desk):
    assert desk.page.locator(".jp-OutputArea-output[data-mime-type*='error']").count() == 0
    assert desk.kernel.evaluate("engine.check_integrity()") is None


def test_forking_by_key_and_streaming_into_two_branches_at_once(desk):
    desk.root.scroll_into_view_if_needed()
    seq = desk.seq()
    desk.key("Home", "2", "F")
    desk.page.wait_for_function(
        "() => [...document.querySelectorAll('.dl-speed')].some(e => e.textContent)", timeout=MINUTE
    )
    desk.root.screenshot(path=ARTIFACTS / "explorer-streaming.png")
    desk.page.wait_for_function(
        "() => [...document.querySelectorAll('.dl-speed')].every(e => !e.textContent)",
        timeout=MINUTE,
    )
    forks = [branch for _, branch in desk.kernel.evaluate(FORKS_SINCE.format(seq=seq))]
    assert len(forks) == 2
    extended = desk.kernel.evaluate(EXTENDED.format(seq=seq))
    first, second = (extended.index(branch) for branch in forks)
    last = min(len(extended) - 1 - extended[::-1].index(branch) for branch in forks)
    assert max(first, second) < last, "both branches streamed at the same time"


def test_clicking_fork_makes_a_branch_that_python_sees(desk):
    desk.root.scroll_into_view_if_needed()
    desk.key("Home", "1")
    before = desk.kernel.evaluate("len(engine.branches)")
    desk.root.get_by_role("button", name="Fork").click()
    desk.until(f"len(engine.branches) == {before + 1}")
    assert desk.kernel.evaluate("explorer.selected is not None")


def test_the_outline_shows_the_same_tree_as_text(desk):
    desk.root.scroll_into_view_if_needed()
    desk.key("g")
    items = desk.root.get_by_role("treeitem")
    items.first.wait_for(timeout=10_000)
    shown = " ".join(items.all_inner_texts())
    words = desk.kernel.evaluate("engine.branches[0].text.split()")
    assert any(word in shown for word in words if len(word) > 3)
    desk.key("g")


@pytest.mark.parametrize("publishing", [False, True], ids=["silent", "publishing"])
def test_a_click_during_a_busy_cell_is_answered_within_a_step(desk, publishing):
    """The cell holds the main shell until the answer is there, and if that takes half a minute; in
    the second case it also writes to the same comm.
    """
    desk.root.scroll_into_view_if_needed()
    desk.key("Home", "1")
    if publishing:
        desk.kernel.finish(desk.kernel.start("explorer.selected = engine.branches[0]"))
    seq = desk.seq()
    busy = desk.keep_busy(until=FORKED.format(seq=seq))
    clicked = time.perf_counter_ns()
    desk.root.get_by_role("button", name="Fork").click()
    desk.kernel.finish(busy)
    ((answered, _),) = desk.kernel.evaluate(FORKS_SINCE.format(seq=seq))
    assert desk.kernel.evaluate("busy_from") < clicked
    assert answered < desk.kernel.evaluate("busy_to"), "answered only after the cell had ended"
    assert (answered - clicked) / 1e9 < desk.allowed_seconds()


def test_a_running_search_is_paused_by_a_click_while_a_cell_is_busy(desk, tmp_path):
    seen = tmp_path / "seen"
    panel = desk.page.locator(".widget-button", has_text="Start").first
    panel.scroll_into_view_if_needed()
    panel.click()
    desk.page.wait_for_function(SEARCH_RUNS, timeout=MINUTE)
    desk.kernel.finish(desk.kernel.start(UNTIL_VISITED))
    desk.key("Home", "0")
    desk.root.screenshot(path=ARTIFACTS / "explorer-search.png")
    assert desk.kernel.evaluate("panel.handle.state") == "running"
    desk.kernel.finish(desk.kernel.start(STAMP_PAUSE))
    busy = desk.keep_busy(until=f"_os.path.exists({str(seen)!r})")
    clicked = time.perf_counter_ns()
    desk.page.locator(".widget-button", has_text="Pause").first.click()
    desk.page.locator(".widget-button", has_text="Resume").first.wait_for(timeout=20_000)
    seen.touch()
    desk.kernel.finish(busy)
    assert desk.kernel.evaluate("panel.handle.state") == "paused"
    answered = desk.kernel.evaluate("paused_at_ns")
    assert desk.kernel.evaluate("busy_from") < clicked
    assert answered < desk.kernel.evaluate("busy_to"), "answered only after the cell had ended"
    assert (answered - clicked) / 1e9 < desk.allowed_seconds()
    desk.page.screenshot(path=ARTIFACTS / "quickstart-search-paused.png")
    desk.kernel.finish(desk.kernel.start("panel.stop(); panel.handle.wait(60)"))


def test_model_text_is_never_run_as_markup(desk):
    desk.kernel.finish(desk.kernel.start(f"explorer.simulate('prompt', text={HOSTILE!r})"))
    desk.root.scroll_into_view_if_needed()
    desk.key("g")
    shown = desk.root.get_by_role("treeitem").filter(has_text="<img src=x")
    shown.first.wait_for(timeout=MINUTE)
    desk.key("g")
    assert desk.page.evaluate("window.pwned") is None
    assert desk.page.locator(".dl-root img, .dl-root script").count() == 0


def test_a_reload_in_the_dark_theme_shows_the_same_tree(desk, lab):
    before = desk.root.locator(".dl-statusbar").inner_text()
    desk.page.get_by_role("menuitem", name="File", exact=True).click()
    desk.page.get_by_text("Save Notebook", exact=True).first.click()
    desk.page.wait_for_selector(".lm-TabBar-tab.jp-mod-dirty", state="detached", timeout=MINUTE)
    lab.theme("JupyterLab Dark")
    desk.page.goto(desk.page.url.split("?")[0] + f"?token={lab.token}")
    desk.page.wait_for_selector(".dl-root .dl-dot.dl-live", timeout=MINUTE)
    desk.root.scroll_into_view_if_needed()
    nodes = before.split("\u00b7")[0].strip()
    desk.root.locator(".dl-statusbar", has_text=nodes).wait_for(timeout=MINUTE)
    desk.root.screenshot(path=ARTIFACTS / "explorer-dark.png")


def test_no_script_error_was_raised_in_the_page(desk):
    assert desk.page.problems == []
