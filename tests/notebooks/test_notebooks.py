"""What every notebook keeps: clean, runnable by nbmake, written with public names only."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = ("dendrite_engine", "dendrite_lab")
MAX_CELL_LINES = 30


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def code(path: Path) -> list[str]:
    return ["".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "code"]


def public_names(module: str) -> set[str]:
    loaded = importlib.import_module(module)
    listed = getattr(loaded, "__all__", None)
    own = {name for name in vars(loaded) if not name.startswith("_")}
    return own if listed is None else set(listed)


def imported(path: Path) -> list[tuple[str, str | None]]:
    """(module, name) of everything that a notebook imports from this project."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse("\n".join(code(path)))):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] in OURS]


def test_all_three_tutorials_are_there():
    stems = [path.stem for path in NOTEBOOKS]
    assert stems[:3] == ["00_quickstart", "01_fork_and_copy_on_write", "02_mcts_live"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_holds_no_output(self, path):
        for cell in read(path)["cells"]:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None
        assert "widgets" not in read(path)["metadata"]

    def test_names_the_kernel_that_every_installation_has(self, path):
        assert read(path)["metadata"]["kernelspec"]["name"] == "python3"

    def test_cells_have_ids_of_their_own(self, path):
        ids = [cell["id"] for cell in read(path)["cells"]]
        assert len(set(ids)) == len(ids)

    def test_imports_only_public_names(self, path):
        assert imported(path)
        for module, name in imported(path):
            assert name is not None, f"import names from {module}, not the module"
            assert name in public_names(module), f"{module}.{name} is not public"
            assert not any(part.startswith("_") for part in module.split("."))

    def test_touches_no_private_attribute(self, path):
        for node in ast.walk(ast.parse("\n".join(code(path)))):
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), f"private attribute {node.attr}"

    def test_checks_what_it_says(self, path):
        tree = ast.parse("\n".join(code(path)))
        assert sum(isinstance(node, ast.Assert) for node in ast.walk(tree)) >= 5

    def test_closes_its_explanations_with_links_that_lead_somewhere(self, path):
        text = "\n".join(
            "".join(c["source"]) for c in read(path)["cells"] if c["cell_type"] == "markdown"
        )
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (path.parent / target).exists() or target.startswith("https://"), target

    def test_is_not_left_out_of_the_run(self, path):
        metadata = read(path)["metadata"].get("execution", {})
        assert not metadata.get("allow_errors")
        for cell in read(path)["cells"]:
            tags = cell["metadata"].get("tags", [])
            assert not {"skip-execution", "raises-exception"} & set(tags)

    def test_has_cells_that_fit_on_a_screen(self, path):
        assert max(source.count("\n") + 1 for source in code(path)) <= MAX_CELL_LINES


def test_make_test_runs_the_notebooks():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^test-python:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    assert re.search(r"pytest .*\bnotebooks\b.*--nbmake\b", recipe.group(1))
