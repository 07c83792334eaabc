"""Fixtures shared by all tests: tiny random models, and the real default model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Longer forms of two tests; here, so that `pytest tests` knows them."""
    parser.addoption(
        "--core-examples",
        type=int,
        help="runs of the control plane's state machine, 50 steps each, drawn at random; without"
        " it the same runs every time",
    )
    parser.addoption(
        "--beam-full",
        action="store_true",
        help="compare beam search with transformers on 10 prompts of 64 tokens (minutes)",
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a random tiny model of a kind from tests/tiny_models.py, made once."""
    import tiny_models

    made: dict[str, Path] = {}

    def get(kind: str = "llama") -> Path:
        if kind not in made:
            made[kind] = tiny_models.make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def _recount_after_every_step(engine) -> None:
    """A lie in the books fails the jobs of the very step that told it."""
    step = engine._loop._step

    def checked() -> None:
        step()
        engine.core.check_integrity()

    engine._loop._step = checked


@pytest.fixture
def make_engine(tiny_model) -> Iterator[Callable]:
    """Makes engines on tiny models, in debug mode unless told otherwise; closes them and
    recounts.
    """
    from dendrite_engine import Engine

    engines = []

    def make(kind: str = "llama", **options) -> Engine:
        options = {"num_pages": 512, "debug": True, **options}
        engine = Engine.from_pretrained(tiny_model(kind), **options)
        _recount_after_every_step(engine)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.check_integrity()
        engine.close()


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Directory of the converted default model (fetched once into the user's cache)."""
    from dendrite_engine.models.hub import resolve_model

    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def smollm2(default_model: Path) -> Iterator:
    """One engine on the real default model for the whole session."""
    from dendrite_engine import Engine

    engine = Engine.from_pretrained(default_model, num_pages=1200)
    yield engine
    engine.prune_all()
    engine.check_integrity()
    engine.close()
