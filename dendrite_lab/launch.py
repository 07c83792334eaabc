"""Starts JupyterLab on the quickstart notebook."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import webbrowser
from pathlib import Path

from dendrite_engine.errors import DendriteError, InvalidArgument

QUICKSTART = "00_quickstart.ipynb"
COPY_NAME = "dendrite-notebooks"
TEXT_BROWSERS = ("www-browser", "w3m", "lynx", "links", "elinks")


def launch_lab(
    *, port: int | None = None, open_browser: bool = True, folder: Path | None = None
) -> int:
    """Run `jupyter lab` on the tutorial notebooks until it ends.

    In a checkout the notebooks are served where they are. Installed from a wheel they are copied to
    `dendrite-notebooks` in the current folder first, leaving files that are already there alone.

    Args:
        port: None takes 8888 or the next free one.
        open_browser: False only prints the URL, as does a machine without a graphical browser.
        folder: serve this folder instead.

    Returns:
        The exit code of JupyterLab.

    Raises:
        DendriteError: the notebooks or JupyterLab are missing.
        InvalidArgument: the port or the folder can't be used.
    """
    if port is not None and not 0 <= port <= 65535:
        raise InvalidArgument(f"port must be 0..65535, got {port}")
    if importlib.util.find_spec("jupyterlab") is None:
        raise DendriteError("JupyterLab is not installed here: pip install jupyterlab")
    served = notebook_folder() if folder is None else folder.expanduser().resolve()
    if not served.is_dir():
        raise InvalidArgument(f"{served} is not a folder")
    command = lab_command(served, port=port, open_browser=open_browser and has_browser())
    print(f"Serving {served}; JupyterLab prints its URL below. Ctrl-C ends it.", flush=True)
    return _run(command)


def lab_command(folder: Path, *, port: int | None, open_browser: bool) -> list[str]:
    """Return the command line of JupyterLab for a folder."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}"]
    if (folder / QUICKSTART).is_file():
        command.append(f"--LabApp.default_url=/lab/tree/{QUICKSTART}")
    # no pop-up that asks about news, no look for updates: nothing but this machine is spoken to
    command += [
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    if port is not None:
        command.append(f"--ServerApp.port={port}")
    if not open_browser:
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # containers run as root; the token still guards the server
    return command


def notebook_folder() -> Path:
    """Return the folder of the tutorial notebooks, copied where they can be written if need be.

    Raises:
        DendriteError: neither a checkout nor an installed copy is there, or there is no place to
            copy it to.
    """
    package = Path(__file__).resolve().parent
    checkout = package.parent / "notebooks"
    if (checkout / QUICKSTART).is_file() and (package.parent / "pyproject.toml").is_file():
        return checkout
    installed = package / "notebooks"
    if not (installed / QUICKSTART).is_file():
        raise DendriteError(f"no tutorial notebooks beside {package}; name a folder with --dir")
    target = Path.cwd() / COPY_NAME
    try:
        copy_notebooks(installed, target)
    except OSError as error:
        raise DendriteError(f"can't copy the notebooks to {target}: {error}") from error
    return target


def copy_notebooks(source: Path, target: Path) -> None:
    """Copy notebooks into a folder; a file that is there, perhaps edited, stays as it is."""
    target.mkdir(exist_ok=True)
    for notebook in sorted(source.glob("*.ipynb")):
        if not (target / notebook.name).exists():
            shutil.copyfile(notebook, target / notebook.name)


def has_browser() -> bool:
    """Tell whether a graphical browser can be opened from here."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.environ.get("BROWSER")
    ):
        return False
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return False
    return getattr(browser, "name", "") not in TEXT_BROWSERS


def _run(command: list[str]) -> int:
    """Wait for the child; Ctrl-C reaches it from the terminal, and it asks before it ends."""
    process = subprocess.Popen(command)  # noqa: S603 - our own arguments, no shell
    code = None
    while code is None:
        with contextlib.suppress(KeyboardInterrupt):
            code = process.wait()
    return code
