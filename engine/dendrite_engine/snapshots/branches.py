"""Saving branches and making them again: token ids, log-probabilities, keys and parents.

A branch is stored as what it adds to the branch before it with which it shares the longest prefix,
so a file grows with the tree and not with the sum of its paths. K/V are not stored: they are
computed again from the tokens, shared prefixes once.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dendrite_engine.errors import InvalidArgument, SnapshotRejected
from dendrite_engine.snapshots.container import Snapshot, read_snapshot, write_snapshot
from dendrite_engine.tree.draws import Draws, draws_of, set_draws

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

KIND = "branches"


def describe_engine(engine: Any) -> dict[str, Any]:
    """What of an engine has to be the same, or is good to know, where a snapshot is read."""
    config = engine.config
    return {
        "model": engine.fingerprint,
        "model_name": engine.model_path.name,
        "vocab_size": engine.model_config.vocab_size,
        "seed": config.seed,
        "numbers": {name: str(getattr(config, name)) for name in ("device", "dtype", "kv_format")},
    }


def check_engine(engine: Any, written: Any) -> None:
    """Refuse a snapshot of another model or seed.

    Raises:
        SnapshotRejected: naming what differs.
    """
    here = describe_engine(engine)
    if not isinstance(written, dict):
        raise SnapshotRejected("engine", "is missing")
    if written.get("model") != here["model"]:
        raise SnapshotRejected(
            "model",
            f"written with {written.get('model_name')!r} ({written.get('model')}); this engine "
            f"runs {here['model_name']!r} ({here['model']})",
        )
    for name, hint in (("vocab_size", ""), ("seed", "; make the engine with that seed")):
        if written.get(name) != here[name]:
            raise SnapshotRejected(
                f"engine.{name}", f"was {written.get(name)!r}, here it is {here[name]!r}{hint}"
            )


def save_branches(
    engine: Any, path: str | os.PathLike[str], branches: Sequence[Branch]
) -> dict[str, int]:
    """Write live branches to a file; see `Engine.save`.

    Returns:
        `bytes` written, `branches`, and `tokens` stored (those of shared prefixes once).
    """
    if not branches:
        raise InvalidArgument("branches: give at least one")
    order = sorted(branches, key=lambda branch: branch.id)
    if len({branch.id for branch in order}) < len(order):
        raise InvalidArgument("branches: one is listed twice")
    places = {branch.id: place for place, branch in enumerate(order)}
    trie = _Trie()
    rows: list[dict[str, Any]] = []
    tokens: list[np.ndarray] = []
    logprobs: list[np.ndarray] = []
    for branch in order:
        # one reading of each: the branch may be generating
        ids = np.asarray(branch.token_ids, np.int32)
        values = np.array([np.nan if x is None else x for x in branch.logprobs], np.float64)
        ids = ids[: len(values)]
        values = values[: len(ids)]
        source, shared = trie.add(ids, _saved_parent(branch, places))
        tokens.append(ids[shared:])
        logprobs.append(values[shared:])
        draws = draws_of(branch)
        rows.append(
            {
                "id": branch.id,
                "source": source,
                "shared": shared,
                "added": len(ids) - shared,
                "key": draws.key,
                "forks": draws.forks,
                "label": branch.label,
            }
        )
    body = {
        "engine": describe_engine(engine),
        "branches": rows,
        "order": [places[branch.id] for branch in branches],
    }
    arrays = {"tokens": np.concatenate(tokens), "logprobs": np.concatenate(logprobs)}
    written = write_snapshot(path, KIND, body, arrays)
    return {"bytes": written, "branches": len(rows), "tokens": len(arrays["tokens"])}


def _saved_parent(branch: Branch, places: dict[int, int]) -> int | None:
    """Place of the nearest ancestor that is saved too."""
    above = branch.parent
    while above is not None:
        if above.id in places:
            return places[above.id]
        above = above.parent
    return None


class _Trie:
    """Token runs added so far, kept sorted: the longest common prefix is with a neighbour."""

    def __init__(self) -> None:
        self._sorted: list[tuple[bytes, int]] = []  # big-endian ids sort as the ids do
        self._ids: list[np.ndarray] = []

    def add(self, ids: np.ndarray, parent: int | None) -> tuple[int, int]:
        """Returns `(place of an earlier run or -1, tokens shared with it)`; the parent on ties.

        O(log n) comparisons and an O(n) insertion.
        """
        key = (ids.astype(">i4").tobytes(), len(self._ids))
        at = bisect_left(self._sorted, key)
        near = [place for _, place in self._sorted[max(0, at - 1) : at + 1]]
        if parent is not None:
            near.insert(0, parent)
        found = max(((self._common(ids, p), -i, p) for i, p in enumerate(near)), default=(0, 0, -1))
        self._sorted.insert(at, key)
        self._ids.append(ids)
        return (found[2], found[0]) if found[0] else (-1, 0)

    def _common(self, ids: np.ndarray, place: int) -> int:
        other = self._ids[place]
        size = min(len(ids), len(other))
        differs = np.flatnonzero(ids[:size] != other[:size])
        return int(differs[0]) if len(differs) else size


def load_branches(
    engine: Any, path: str | os.PathLike[str], namespace: str = ""
) -> tuple[list[Branch], list[Branch]]:
    """Make the branches of a file again, without K/V; see `Engine.load`.

    Returns:
        `(branches in the order in which they were given to save, the same in the order made)`.

    Raises:
        SnapshotRejected: before any page is touched.
        OutOfPages, BudgetExceeded: they don't fit; those made already are pruned.
    """
    snapshot = read_snapshot(path, KIND)
    rows, runs, values = _checked(engine, snapshot)
    made: list[Branch] = []
    try:
        for row, ids, logprobs in zip(rows, runs, values, strict=True):
            branch = _remake(engine, made, row, ids, logprobs, namespace)
            made.append(branch)
            branch.label = row["label"]
        for branch, row in zip(made, rows, strict=True):  # only now: forking counts
            set_draws(branch, Draws(row["key"], row["forks"]))
    except BaseException:
        for branch in reversed(made):
            branch.prune()
        raise
    return [made[place] for place in snapshot.body["order"]], made


def _checked(
    engine: Any, snapshot: Snapshot
) -> tuple[list[dict[str, Any]], list[np.ndarray], list[np.ndarray]]:
    """Rows with their tokens and log-probabilities, once everything in the file adds up."""
    body = snapshot.body
    check_engine(engine, body.get("engine"))
    tokens, logprobs = snapshot.array("tokens", "int32"), snapshot.array("logprobs", "float64")
    if len(tokens) != len(logprobs):
        raise SnapshotRejected("logprobs", f"{len(logprobs)} of them for {len(tokens)} tokens")
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < engine.model_config.vocab_size:
        raise SnapshotRejected("tokens", "an id is outside the vocabulary")
    rows = body.get("branches")
    kinds = {"id": int, "source": int, "shared": int, "added": int, "forks": int, "label": str}
    if not isinstance(rows, list) or not rows:
        raise SnapshotRejected("branches", "there are none")
    lengths: list[int] = []
    ends = [0]
    for place, row in enumerate(rows):
        if not isinstance(row, dict) or any(type(row.get(k)) is not t for k, t in kinds.items()):
            raise SnapshotRejected(f"branches[{place}]", f"needs {', '.join(kinds)}; has {row!r}")
        source, shared, added = row["source"], row["shared"], row["added"]
        held = lengths[source] if 0 <= source < place else 0
        if not -1 <= source < place or not 0 <= shared <= held or added < 0 or not shared + added:
            raise SnapshotRejected(f"branches[{place}]", f"source {source}, shared {shared}")
        if shared + added > engine.max_context:
            raise SnapshotRejected(
                f"branches[{place}]", f"{shared + added} tokens exceed {engine.max_context}"
            )
        lengths.append(shared + added)
        ends.append(ends[-1] + added)
    if ends[-1] != len(tokens):
        raise SnapshotRejected("tokens", f"{len(tokens)} stored, the branches have {ends[-1]}")
    order = body.get("order")
    if not isinstance(order, list) or sorted(order) != list(range(len(rows))):
        raise SnapshotRejected("order", "does not name every branch once")
    return rows, np.split(tokens, ends[1:-1]), np.split(logprobs, ends[1:-1])


def _remake(
    engine: Any,
    made: Sequence[Branch],
    row: dict[str, Any],
    ids: np.ndarray,
    logprobs: np.ndarray,
    namespace: str,
) -> Branch:
    if row["source"] < 0:
        return plant(engine, ids.tolist(), logprobs.tolist(), namespace)
    source, shared = made[row["source"]], row["shared"]
    fork: Branch = source.fork(1, at=shared)[0]
    try:
        grow(fork, ids.tolist(), logprobs.tolist())
    except BaseException:
        fork.prune()
        raise
    return fork


def plant(
    engine: Any, ids: Sequence[int], logprobs: Sequence[float], namespace: str = ""
) -> Branch:
    """A new root branch: the given tokens as a prompt, generated ones appended as such.

    Args:
        engine: where it grows.
        ids: token ids, at least one.
        logprobs: of each, NaN for those that were given.
        namespace: of the prompt.

    Raises:
        OutOfPages: it does not fit; nothing is left.
    """
    generated = [index for index, value in enumerate(logprobs) if value == value]
    given = max(1, generated[0]) if generated else len(ids)
    root: Branch = engine.prompt(list(ids[:given]), namespace=namespace)
    try:
        return grow(root, ids[given:], logprobs[given:])
    except BaseException:
        root.prune()
        raise


def grow(branch: Branch, ids: Sequence[int], logprobs: Sequence[float]) -> Branch:
    """Append tokens, each run of given (NaN) or generated ones in one call."""
    start = 0
    for end in range(1, len(ids) + 1):
        given = logprobs[start] != logprobs[start]
        if end == len(ids) or (logprobs[end] != logprobs[end]) != given:
            branch.extend(list(ids[start:end]), None if given else list(logprobs[start:end]))
            start = end
    return branch
