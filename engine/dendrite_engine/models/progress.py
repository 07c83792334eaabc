"""A progress bar on stderr, or none: the same two calls either way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Report = Callable[[int, int], None]


@contextmanager
def progress_bar(title: str, unit: str, enabled: bool) -> Iterator[Report]:
    """Show a bar while the block runs.

    Args:
        title: shown left of the bar.
        unit: what is counted; `"B"` is scaled to kB and MB.
        enabled: False shows nothing.

    Yields:
        A function of (done, in all).
    """
    if not enabled:
        yield _ignore
        return
    from tqdm import tqdm

    is_bytes = unit == "B"
    with tqdm(desc=title, unit=unit, unit_scale=is_bytes, unit_divisor=1000, total=0) as shown:

        def report(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield report


def silent_tqdm() -> type[Any]:
    """Return a tqdm class that shows nothing, for libraries that want a class."""
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[misc]  # tqdm ships no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _ignore(_done: int, _total: int) -> None:
    """The report of a bar that is not shown."""
