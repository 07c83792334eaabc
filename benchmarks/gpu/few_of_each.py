"""A pytest plugin for slow tools: of every test function only the first and the last few cases.

python -m pytest -p few_of_each --of-each 2 ...      (with this folder on PYTHONPATH)
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--of-each N`."""
    parser.addoption("--of-each", type=int, default=2, help="cases of a test function at most")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the others; runs after `-m` and `-k` have chosen."""
    most = int(config.getoption("--of-each"))
    groups: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        name = getattr(item, "originalname", None) or item.name
        groups.setdefault((str(item.path), name), []).append(item)
    kept = {id(item) for group in groups.values() for item in _ends(group, most)}
    dropped = [item for item in items if id(item) not in kept]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if id(item) in kept]


def _ends(group: list[pytest.Item], most: int) -> list[pytest.Item]:
    """`most` items, half from the front and half from the back."""
    if len(group) <= most:
        return group
    front = most - most // 2
    return group[:front] + (group[-(most // 2) :] if most > 1 else [])
