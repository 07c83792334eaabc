"""Finds the directory of a model: a local one, a built-in one, or one from the Hugging Face hub.

Weights are read from safetensors only, and no code of a model repository is ever run: nothing but
JSON, safetensors, tokenizer and chat template files is fetched.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from dendrite_engine.errors import DownloadError, ModelError
from dendrite_engine.models.builtin import BUILTIN_MODELS, ensure_builtin, find_builtin
from dendrite_engine.models.families import read_model_config
from dendrite_engine.models.progress import silent_tqdm

CACHE_VARIABLE = "DENDRITE_CACHE"
HUB_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "vocab.txt", "merges.txt", "*.jinja")
# other layouts of the same weights, adapters, and sub-folders (onnx/, original/, ...)
HUB_IGNORED = ("*/*", "consolidated*", "adapter_*", "*.py")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def cache_directory() -> Path:
    """Return the user's cache folder of dendrite-lab; it may not exist yet.

    `DENDRITE_CACHE` if set; else `dendrite-lab` under `XDG_CACHE_HOME`, or under the platform's
    place: `~/.cache`, `~/Library/Caches`, or `%LOCALAPPDATA%`.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    if not base and os.name == "nt":
        base = os.environ.get("LOCALAPPDATA")
    if not base:
        base = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(base).expanduser().absolute() / "dendrite-lab"


def resolve_model(name_or_path: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Return the local directory of a model, fetching it once when it is not there.

    Args:
        name_or_path: a Hugging Face directory, a built-in name (`"smollm2-135m-instruct"`), or a
            hub id (`"org/name"`, or `"org/name@revision"`). A directory wins over a name.
        progress: show bars on stderr while fetching and converting.

    Returns:
        A directory with `config.json` and safetensors weights.

    Raises:
        ModelError: nothing of that name, an unknown architecture, weights that are not safetensors,
            or an incomplete directory.
        DownloadError: not cached and not reachable.

    Example:
        >>> resolve_model("smollm2-135m-instruct").name  # doctest: +SKIP
        'smollm2-135m-instruct-bcc81830-1'
    """
    text = os.fspath(name_or_path).strip()
    if not text:
        raise ModelError(f"the model name is empty; {_choices()}")
    directory = Path(text).expanduser()
    if directory.is_dir():
        return check_directory(directory.resolve())
    builtin = find_builtin(text)
    if builtin is not None:
        return check_directory(ensure_builtin(builtin, cache_directory(), progress=progress))
    if directory.is_file():
        raise ModelError(f"{text} is a file; give the directory that holds config.json")
    if _HUB_ID.fullmatch(text):
        return check_directory(_from_hub(text, progress))
    raise ModelError(f"no model {text!r}: no such directory, and {_choices()}")


def check_directory(directory: Path) -> Path:
    """Check that a directory holds a known architecture and all its safetensors, and return it.

    Only names and JSON are read: O(files).

    Raises:
        ModelError: what is missing, that the architecture is unknown (with the known ones), or that
            the weights are pickles.
    """
    read_model_config(directory)
    from dendrite_engine.models.weights import weight_files  # loads torch

    weight_files(directory)
    return directory


def _choices() -> str:
    names = ", ".join(sorted(BUILTIN_MODELS))
    return f"the built-in models are: {names}; a hub id looks like 'org/name'"


def _from_hub(text: str, progress: bool) -> Path:
    """Fetch the config first: an unknown architecture is refused before gigabytes are read."""
    repository, _, revision = text.partition("@")
    read_model_config(_snapshot(repository, revision or None, ("config.json",), progress))
    return _snapshot(repository, revision or None, HUB_PATTERNS, progress)


def _snapshot(
    repository: str, revision: str | None, patterns: tuple[str, ...], progress: bool
) -> Path:
    from huggingface_hub import errors, snapshot_download

    try:
        path = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(HUB_IGNORED),
            tqdm_class=None if progress else silent_tqdm(),
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelError(
            f"the hub has no model {repository!r} at revision {revision or 'main'!r} that you may "
            "read; for a gated or private one log in with `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"{repository!r} is not a hub id: {error}") from error
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        said = str(error).strip().splitlines()
        raise DownloadError(
            f"{repository!r} is not in the hub cache and can't be fetched: "
            f"{said[0] if said else type(error).__name__}"
        ) from error
    return Path(path)
