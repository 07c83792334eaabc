"""A real JupyterLab server, a real Chromium, and a second client of the notebook's kernel."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from playwright.sync_api import TimeoutError as PlaywrightTimeout

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "artifacts"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"


def find_browser() -> str | None:
    """Path of a Chromium or Chrome, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Lab:
    """JupyterLab serving a copy of the notebooks from a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port, self.token = directory, _free_port(), uuid.uuid4().hex
        shutil.copytree(ROOT / "notebooks", directory / "notebooks")
        self._settings(
            "@jupyterlab/apputils-extension/notification", fetchNews="false", checkForUpdates=False
        )
        self._log = (directory / "lab.log").open("w")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--ip=127.0.0.1",
                f"--port={self.port}",
                "--ServerApp.port_retries=0",
                "--allow-root",
                f"--IdentityProvider.token={self.token}",
                f"--ServerApp.root_dir={directory}",
                "--LabApp.news_url=null",
            ],
            env=self._environment(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._wait_until_up()

    def _environment(self) -> dict[str, str]:
        runtime = self.directory / "runtime"
        runtime.mkdir()
        runtime.chmod(0o700)
        return {
            **os.environ,
            "JUPYTERLAB_SETTINGS_DIR": str(self.directory / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.directory / "workspaces"),
            "JUPYTER_RUNTIME_DIR": str(runtime),
        }

    def theme(self, name: str) -> None:
        """Use this JupyterLab theme from the next page load on."""
        self._settings("@jupyterlab/apputils-extension/themes", theme=name)

    def _settings(self, plugin: str, **values: Any) -> None:
        path = self.directory / "settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))

    def _wait_until_up(self) -> None:
        url = f"http://127.0.0.1:{self.port}/api?token={self.token}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"JupyterLab ended: {(self.directory / 'lab.log').read_text()}")
            try:
                with urllib.request.urlopen(url, timeout=1):
                    return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError("JupyterLab did not answer within 120 s")

    def url(self, notebook: str) -> str:
        """Address of a notebook in a fresh workspace."""
        workspace = uuid.uuid4().hex[:8]
        base = f"http://127.0.0.1:{self.port}/lab/workspaces/{workspace}"
        return f"{base}/tree/notebooks/{notebook}?token={self.token}&reset"

    def kernel(self) -> Kernel:
        """A second client of the one running kernel."""
        (connection,) = (self.directory / "runtime").glob("kernel-*.json")
        return Kernel(connection)

    def close(self) -> None:
        """End the server and its kernels."""
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._log.close()


class Kernel:
    """Runs code in the notebook's kernel beside the browser, to check the Python side."""

    def __init__(self, connection: Path) -> None:
        from jupyter_client import BlockingKernelClient

        self._client = BlockingKernelClient(connection_file=str(connection))
        self._client.load_connection_file()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    def start(self, code: str) -> str:
        """Start running `code` as a cell; returns at once."""
        message: str = self._client.execute(code, store_history=False, allow_stdin=False)
        return message

    def wait_for_output(self, message: str, timeout: float = 60) -> None:
        """Wait until the cell that `start` began prints something: it runs then. What the page
        shows may be late, and is gone when the cell has ended.
        """
        while True:
            said = self._client.get_iopub_msg(timeout=timeout)
            if said["parent_header"].get("msg_id") == message and said["msg_type"] == "stream":
                return

    def finish(self, message: str, timeout: float = 120) -> None:
        """Wait for what `start` began; RuntimeError when it raised."""
        while True:
            reply = self._client.get_shell_msg(timeout=timeout)
            if reply["parent_header"].get("msg_id") == message:
                break
        if reply["content"]["status"] != "ok":
            raise RuntimeError("\n".join(reply["content"]["traceback"]))

    def evaluate(self, expression: str, timeout: float = 120) -> Any:
        """Value of a JSON-serialisable Python expression."""
        content = self._client.execute_interactive(
            "",
            user_expressions={"value": f"__import__('json').dumps({expression})"},
            store_history=False,
            allow_stdin=False,
            timeout=timeout,
        )["content"]
        result = content["user_expressions"]["value"]
        if result["status"] != "ok":
            raise RuntimeError("\n".join(result["traceback"]))
        return json.loads(ast.literal_eval(result["data"]["text/plain"]))

    def close(self) -> None:
        """Let go of the kernel; it keeps running."""
        self._client.stop_channels()


def run_all(page: Any) -> None:
    """Menu Run > Run All Cells.

    A kernel that was only just started may drop the request, so it is repeated until a cell counts.
    """
    page.locator("#jp-main-statusbar >> text=| Idle").wait_for(timeout=90_000)
    started = page.locator(".jp-InputPrompt", has_text=re.compile(r"\[(\d+|\*)\]")).first
    for _ in range(8):
        for button in page.locator(".jp-Dialog .jp-mod-accept").all():
            button.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            started.wait_for(timeout=5000)
        except PlaywrightTimeout:
            continue
        return
    raise AssertionError("no cell started after eight attempts to run all")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
