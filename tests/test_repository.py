"""Rules that every file of the repository keeps: layers, sizes, safety, notebooks, one version."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "engine" / "dendrite_engine"
LAB = ROOT / "dendrite_lab"

# Lowest first; an import may only point to a lower row, or stay inside its own component.
# The first row is the vocabulary that everything shares: its modules may import each other.
LAYERS = (
    ("errors", "config", "registry", "sampling_params", "trace", "types"),
    ("kernels",),
    ("cache", "sampling"),
    ("tree", "attention"),
    ("models", "grammar"),
    ("runner",),
    ("device",),
    ("scheduler", "jobs", "scoring"),
    ("lanes",),
    ("ahead",),
    ("forward",),
    ("guided",),
    ("drawn",),
    ("decoding",),
    ("speculation",),
    ("step",),
    ("loop",),
    ("build", "requests", "snapshots"),
    ("engine",),
    ("search", "agents"),
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# An engine offers `engine.search(...)`; the import happens inside that call.
UPWARD_AT_CALL_TIME = {("engine", "search")}
NOT_IN_ENGINE = {
    "dendrite_lab", "IPython", "ipykernel", "ipywidgets", "anywidget", "plotly", "matplotlib",
    "pandas", "jupyterlab", "jupyter_server", "notebook", "requests", "fastapi", "flask",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_SCRIPT = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
)
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/\w")
REGISTRY = re.compile(
    r"https?://[^\s\"'<>)]*(?:pypi|pythonhosted|npmjs|registry|mirror|artifactory|nexus)[^\s\"']*"
)
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|HACK)\b")
MAX_LINES = 400
MAX_FUNCTION_P90 = 35


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    paths = (ROOT / name for name in listed.decode().split("\0") if name)
    return tuple(sorted(path for path in paths if path.is_file()))


def sources(*suffixes: str, under: tuple[Path, ...] = (ROOT,)) -> list[Path]:
    """Hand-written files with these suffixes."""
    return [
        path
        for path in tracked()
        if path.suffix in suffixes
        and any(path.is_relative_to(folder) for folder in under)
        and not path.is_relative_to(LAB / "static")
    ]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def package_of(path: Path) -> list[str]:
    """Dotted name, as a list, of the package that a file is in."""
    base = ENGINE.parent if path.is_relative_to(ENGINE) else ROOT
    return list(path.relative_to(base).parts[:-1])


def imports(path: Path) -> list[tuple[str, str | None, bool]]:
    """(module, imported name or None, inside a function) of every import that can run."""
    return list(walk_imports(parse(path), package_of(path), False))


def walk_imports(node: ast.AST, package: list[str], in_function: bool):
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(child, ast.Import):
            yield from ((alias.name, None, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) + 1 - child.level] if child.level else []
            module = ".".join([*base, *filter(None, [child.module])])
            yield from ((module, alias.name, inside) for alias in child.names)
        else:
            yield from walk_imports(child, package, inside)


def component(module: str, name: str | None) -> str | None:
    """`dendrite_engine.cache.pages` -> `cache`; None for anything outside, or for the package."""
    parts = module.split(".")
    if parts[0] != "dendrite_engine":
        return None
    return parts[1] if len(parts) > 1 else name


def test_every_engine_module_has_a_layer():
    names = {path.relative_to(ENGINE).parts[0].removesuffix(".py") for path in engine_modules()}
    assert names - set(RANKS) == set()


def engine_modules() -> list[Path]:
    return [path for path in sources(".py", under=(ENGINE,)) if path != ENGINE / "__init__.py"]


def test_imports_of_the_engine_point_down_the_layers():
    wrong = []
    for path in engine_modules():
        own = path.relative_to(ENGINE).parts[0].removesuffix(".py")
        for module, name, in_function in imports(path):
            other = component(module, name)
            if other not in RANKS or other == own:
                continue
            down = RANKS[other] < RANKS[own] or RANKS[other] == RANKS[own] == 0
            if not down and not (in_function and (own, other) in UPWARD_AT_CALL_TIME):
                wrong.append(f"{relative(path)} imports {other}")
    assert wrong == []


def test_the_engine_knows_neither_the_workbench_nor_a_front_end():
    wrong = [
        f"{relative(path)} imports {module}"
        for path in sources(".py", under=(ENGINE,))
        for module, _, _ in imports(path)
        if module.split(".")[0] in NOT_IN_ENGINE
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("dendrite_engine", {"torch", "transformers", "numpy", "tokenizers", "gguf"}),
        ("dendrite_lab", {"torch", "transformers", "numpy", "ipywidgets", "plotly", "anywidget"}),
        ("dendrite_lab.cli", {"torch", "transformers", "numpy", "ipywidgets", "plotly"}),
        ("dendrite_engine.models.hub", {"torch", "transformers", "huggingface_hub"}),
    ],
)
def test_importing_is_cheap(module, unwanted):
    script = f"import sys, {module}; print(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) & unwanted == set()


def unsafe_python(path: Path):
    """What in a module could run code that came as data."""
    for module, _, _ in imports(path):
        if module.split(".")[0] in UNSAFE_MODULES:
            yield f"imports {module}"
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "torch.load", "os.system", "yaml.load"):
            yield f"calls {called}"
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and value != "False":
                yield f"passes {keyword.arg}={value}"


def test_no_source_runs_data_as_code():
    wrong = [
        f"{relative(path)}: {what}"
        for path in sources(".py", under=(ENGINE, LAB, ROOT / "benchmarks"))
        for what in unsafe_python(path)
    ]
    assert wrong == []


def test_widgets_put_text_on_the_page_only_as_text():
    wrong = [
        f"{relative(path)}:{number}"
        for path in sources(".ts", ".js", ".mjs", under=(ROOT / "widgets" / "src",))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if UNSAFE_SCRIPT.search(line.split("//")[0]) and not line.lstrip().startswith("*")
    ]
    assert wrong == []


def test_every_module_postpones_annotations():
    wrong = [
        relative(path)
        for path in sources(".py", under=(ENGINE, LAB, ROOT / "tests", ROOT / "benchmarks"))
        if any(not isinstance(node, ast.Expr) for node in parse(path).body)  # more than a docstring
        and "from __future__ import annotations" not in path.read_text("utf-8")
    ]
    assert wrong == []


def test_ruff_finds_no_mistake_and_nothing_too_new_for_python_3_10():
    command = [sys.executable, "-m", "ruff", "check", "--select", "E9,F,B", "--output-format"]
    done = subprocess.run([*command, "concise", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_source_file_is_longer_than_400_lines():
    long = {
        relative(path): lines
        for path in sources(".py", ".ts", ".mjs", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh")
        if (lines := path.read_bytes().count(b"\n")) > MAX_LINES
    }
    assert long == {}


def test_nine_of_ten_functions_have_at_most_35_lines():
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for path in sources(".py", under=(ENGINE, LAB))
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    assert lengths[int(0.9 * (len(lengths) - 1))] <= MAX_FUNCTION_P90


def text_files() -> list[tuple[Path, str]]:
    """Every text file but the built widgets and this one, which has to name what it forbids."""
    found = []
    for path in tracked():
        if path == Path(__file__).resolve() or path.is_relative_to(LAB / "static"):
            continue
        data = path.read_bytes()
        if b"\0" not in data:
            found.append((path, data.decode("utf-8")))
    return found


@pytest.mark.parametrize(
    "pattern", [MACHINE_PATH, REGISTRY, UNFINISHED], ids=["path", "host", "todo"]
)
def test_no_file_names_a_machine_a_registry_or_unfinished_work(pattern):
    wrong = [
        f"{relative(path)}: {found.group()}"
        for path, text in text_files()
        if (found := pattern.search(text))
    ]
    assert wrong == []


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_notebooks_of_the_readme_are_there():
    names = {path.stem for path in notebooks()}
    assert {"00_quickstart", "01_fork_and_copy_on_write", "02_mcts_live"} <= names


@pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
def test_notebooks_hold_no_output_and_name_their_kernel(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    for cell in notebook["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


def test_the_version_is_the_same_everywhere():
    import dendrite_engine
    import dendrite_lab

    project = (ROOT / "pyproject.toml").read_text("utf-8")
    declared = re.search(r'^version = "([^"]+)"', project, re.MULTILINE)
    widgets = json.loads((ROOT / "widgets" / "package.json").read_text("utf-8"))["version"]
    assert declared is not None
    found = {declared.group(1), dendrite_engine.__version__, dendrite_lab.__version__, widgets}
    assert len(found) == 1


def test_the_sources_that_are_tested_are_those_of_this_checkout():
    import dendrite_engine
    import dendrite_lab

    assert Path(dendrite_engine.__file__).resolve() == ENGINE / "__init__.py"
    assert Path(dendrite_lab.__file__).resolve() == LAB / "__init__.py"
