"""The text that quality is measured on: the Python language reference, as every Python ships it.

`pydoc_data.topics` is what `help("if")` prints: English prose with some code, about 460,000
characters in Python 3.11. It is part of Python, under the PSF licence version 2; it differs a
little between Python versions, so a report names the version and the text's hash.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

from dendrite_engine.errors import InvalidArgument


def licensed_text() -> str:
    """Every topic, in the order of their names.

    Raises:
        InvalidArgument: this Python came without its documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InvalidArgument(
            "this Python has no pydoc_data.topics, the text that quality is measured on; name a "
            "file with --text"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


def read_text(path: Path | None) -> tuple[str, str]:
    """The text and what to call it in a report.

    Raises:
        InvalidArgument: the file can't be read as UTF-8.
    """
    if path is None:
        text = licensed_text()
        source = f"Python {platform.python_version()} language reference (PSF-2.0), pydoc_data"
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"--text {path}: {error}") from error
        source = path.name
    return text, f"{source}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def windows(ids: Sequence[int], length: int, count: int) -> list[list[int]]:
    """`count` windows of `length` + 1 tokens, evenly spaced, that do not overlap.

    Raises:
        InvalidArgument: the text is too short.
    """
    if count * (length + 1) > len(ids):
        raise InvalidArgument(
            f"{count} windows of {length} tokens need {count * (length + 1)}, the text has "
            f"{len(ids)}: ask for fewer --tokens, or name a longer --text"
        )
    step = len(ids) // count
    return [list(ids[i * step : i * step + length + 1]) for i in range(count)]
