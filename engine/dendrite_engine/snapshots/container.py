"""One snapshot file: a safetensors file with a JSON body, a schema version and a checksum.

Layout: the tensors of the caller, and `body`, UTF-8 JSON as u8. The metadata of the header holds
`format`, `kind`, `schema` and `checksum`, the BLAKE2b-256 of the whole file with the checksum's own
64 digits taken as zeros, so that any changed bit is noticed wherever it is. Reading runs no code
and changes nothing; it happens completely before anybody touches a page.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dendrite_engine.errors import InvalidArgument, SnapshotRejected

FORMAT = "dendrite-snapshot"
SCHEMA = 1
_ZEROS = b"0" * 64
_MARK = b'"checksum":"'


@dataclass(frozen=True)
class Snapshot:
    """What a file holds.

    Attributes:
        body: the JSON part.
        arrays: tensors by name.
    """

    body: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def array(self, name: str, dtype: str) -> np.ndarray:
        """A one-dimensional tensor of this dtype.

        Raises:
            SnapshotRejected: it is missing or of another kind.
        """
        found = self.arrays.get(name)
        if found is None or found.ndim != 1 or found.dtype != np.dtype(dtype):
            got = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise SnapshotRejected(name, f"expected one dimension of {dtype}, found {got}")
        return found


def write_snapshot(
    path: str | os.PathLike[str], kind: str, body: Mapping[str, Any], arrays: dict[str, np.ndarray]
) -> int:
    """Write a snapshot; a crash at any moment leaves the old file, or the new one, whole.

    The bytes go to a temporary file beside `path`, are flushed to the disk and renamed.

    Args:
        path: the file, replaced where it exists.
        kind: what it is a snapshot of.
        body: JSON-serialisable.
        arrays: further tensors.

    Returns:
        Bytes written.

    Raises:
        OSError: the file can't be written.
    """
    from safetensors.numpy import save

    text = json.dumps(body, allow_nan=False, separators=(",", ":")).encode()
    metadata = {"format": FORMAT, "kind": kind, "schema": str(SCHEMA), "checksum": _ZEROS.decode()}
    data = save({"body": np.frombuffer(text, np.uint8), **arrays}, metadata)
    at = data.index(_MARK) + len(_MARK)
    digest = hashlib.blake2b(data, digest_size=32).hexdigest().encode()
    _replace(Path(path), data[:at] + digest + data[at + 64 :])
    return len(data)


def _replace(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(name).unlink()
        raise
    with suppress(OSError):  # the rename is durable too, where folders can be synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_snapshot(path: str | os.PathLike[str], kind: str) -> Snapshot:
    """Read and check a snapshot.

    Args:
        path: the file.
        kind: what it has to be a snapshot of.

    Raises:
        InvalidArgument: there is no such file.
        SnapshotRejected: it is truncated, damaged, of another kind or of a newer version; its
            `field` says which.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    file = Path(path)
    if not file.is_file():
        raise InvalidArgument(f"path: there is no file {file}")
    data = file.read_bytes()
    _check_header(data, kind)
    _check_sum(data)
    try:
        arrays = load(data)
        body = json.loads(arrays.pop("body").tobytes())
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise SnapshotRejected("body", f"can't be read: {error}") from error
    if not isinstance(body, dict):
        raise SnapshotRejected("body", "is no JSON object")
    return Snapshot(body, arrays)


def kind_of(path: str | os.PathLike[str]) -> str:
    """What a file is a snapshot of, by its header alone.

    Raises:
        SnapshotRejected: it is no snapshot that this version reads.
    """
    return _check_header(Path(path).read_bytes(), None)


def _check_header(data: bytes, kind: str | None) -> str:
    """Length, format, version and kind, in the order in which they can be trusted."""
    size = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= size <= len(data) - 8:
        raise SnapshotRejected("length", f"{len(data)} bytes hold no header of {size} bytes")
    try:
        header = json.loads(data[8 : 8 + size])
        ends = [int(entry["data_offsets"][1]) for k, entry in header.items() if k != "__metadata__"]
        metadata = dict(header["__metadata__"])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise SnapshotRejected("format", f"the header can't be read: {error}") from error
    if metadata.get("format") != FORMAT:
        raise SnapshotRejected("format", f"{metadata.get('format')!r} is not {FORMAT!r}")
    expected = 8 + size + max(ends, default=0)
    if len(data) != expected:
        raise SnapshotRejected("length", f"{len(data)} bytes where {expected} were written")
    if metadata.get("schema") != str(SCHEMA):
        raise SnapshotRejected(
            "schema",
            f"version {metadata.get('schema')}; this dendrite_engine reads version {SCHEMA}. Use "
            "the one that wrote the file, or a newer one",
        )
    found = str(metadata.get("kind"))
    if kind is not None and found != kind:
        raise SnapshotRejected("kind", f"{found!r} where {kind!r} is wanted")
    return found


def _check_sum(data: bytes) -> None:
    at = data.find(_MARK) + len(_MARK)
    written = data[at : at + 64]
    blank = data[:at] + _ZEROS + data[at + 64 :]
    if hashlib.blake2b(blank, digest_size=32).hexdigest().encode() != written:
        raise SnapshotRejected("checksum", "the file was changed or damaged after it was written")
