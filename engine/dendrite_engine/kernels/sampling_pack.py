"""Packs what `sample` on a GPU needs for one step into one int32 buffer, so that one copy moves it.

    header    16 words: version, rows, vocab, words of a row of the bitmask, then the offsets of
              bias ids, bias values, bitmask, penalty ids and penalty counts, and the size
    records   24 words a row, see `RECORD`; they name ranges of the arrays below
    bias      ids of all rows, sorted inside a row, then their values
    bitmask   [masks, words]: only rows that have one
    penalties ids of all rows, sorted inside a row, then their counts

Floats and 64-bit numbers are stored by their bits (little-endian); offsets count words. What does
not change while a set of rows stays together is made once, in a `SamplingTable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.sampling_batch import F32, F64, I32, SamplingBatch

U64 = NDArray[np.uint64]
_Values = TypeVar("_Values", F32, I32)

VERSION = 1
HEADER_WORDS, RECORD_WORDS = 16, 24
MAX_VOCAB = 1 << 19
EXPLICIT_UNIFORM = 1  # of the word "flags"
FLOATS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")  # of a batch
RECORD = {
    name: column
    for column, name in enumerate(
        (
            "temperature", "inverse_temperature", "top_k", "top_p", "min_p", "min_p_distance",
            "repetition", "presence", "frequency", "logits_row", "previous", "position",
            "seed_key", "seed_key_high", "path_key", "path_key_high", "pen_begin", "pen_end",
            "bias_begin", "bias_end", "mask_row", "flags",
        )
    )
}  # fmt: skip


class Penalties(NamedTuple):
    """Ids seen by each row and how often it generated them, as in `SamplingBatch`."""

    indptr: I32  # [R + 1]
    ids: I32
    counts: I32


def mix64(values: U64) -> U64:
    """SplitMix64's finaliser of every element, as in `dendrite_engine.sampling.mix64`."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniforms(seed_keys: U64, path_keys: U64, positions: NDArray[np.int64]) -> F64:
    """The draw of every row: `dendrite_engine.sampling.uniform` with seed_key = mix64(seed)."""
    bits = mix64(seed_keys ^ mix64(path_keys ^ mix64(positions.astype(np.uint64))))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


class SamplingTable:
    """The settings of a set of rows, packed; `pack` adds what changes from step to step.

    Args:
        batch: settings of every row. Its bias stays; its `uniform` is used when there are no keys;
            its penalties and bitmask are what `pack` takes when it is given none.
        vocab: logits of a row.
        seeds: one a row, or None for `batch.uniform`.
        path_keys: one a row, with `seeds`.
        mask_rows: [R] row of the bitmask that each row uses, -1 for none; None: row i uses mask i
            if the batch has a mask.

    Raises:
        InvalidArgument: an id is outside the vocabulary, or lengths disagree.
    """

    def __init__(
        self, batch: SamplingBatch, vocab: int, *, seeds: Sequence[int] | None = None,
        path_keys: Sequence[int] | None = None, mask_rows: I32 | None = None,
    ) -> None:  # fmt: skip
        if not 1 <= vocab <= MAX_VOCAB:
            raise InvalidArgument(f"sampling: the vocabulary must be 1..{MAX_VOCAB}, got {vocab}")
        self.rows, self.vocab, self.words = batch.num_rows, vocab, -(-vocab // 32)
        self._penalties = Penalties(batch.pen_indptr, batch.pen_ids, batch.pen_counts)
        self._mask = batch.mask
        self._penalised = (batch.repetition != 1) | (batch.presence != 0) | (batch.frequency != 0)
        self._has_penalties = bool(self._penalised.any())
        if mask_rows is None:
            mask_rows = np.arange(self.rows, dtype=np.int32) - (
                0 if batch.mask is not None else 1 << 30
            )
        self.masks = max(0, int(mask_rows.max(initial=-1)) + 1)
        self._template = self._make_template(batch, np.maximum(mask_rows, -1))
        self._set_keys(batch, seeds, path_keys)
        self.greedy = not bool(
            (self._records(self._template)[:, RECORD["inverse_temperature"]]).any()
        )

    def _make_template(self, batch: SamplingBatch, mask_rows: I32) -> I32:
        _check_ids("bias_ids", batch.bias_ids, self.vocab)
        bias_ids, bias_values = _sorted_rows(batch.bias_indptr, batch.bias_ids, batch.bias_values)
        start = HEADER_WORDS + self.rows * RECORD_WORDS
        entries = len(bias_ids)
        template = np.zeros(start + 2 * entries, np.int32)
        template[:7] = (
            VERSION, self.rows, self.vocab, self.words, start, start + entries, start + 2 * entries,
        )  # fmt: skip
        template[start : start + entries] = bias_ids
        template[start + entries :] = bias_values.view(np.int32)
        columns: dict[str, F32 | I32] = {**_derived(batch)}
        columns |= {name: getattr(batch, name) for name in FLOATS}
        columns |= {
            "top_k": batch.top_k, "logits_row": np.arange(self.rows, dtype=np.int32),
            "previous": np.full(self.rows, -1, np.int32), "mask_row": mask_rows,
            "bias_begin": batch.bias_indptr[:-1], "bias_end": batch.bias_indptr[1:],
        }  # fmt: skip
        records = self._records(template)
        for name, values in columns.items():
            records[:, RECORD[name]] = values.view(np.int32)
        return template

    def _set_keys(
        self, batch: SamplingBatch, seeds: Sequence[int] | None, path_keys: Sequence[int] | None
    ) -> None:
        records = self._records(self._template)
        if seeds is None or path_keys is None:
            records[:, RECORD["flags"]] = EXPLICIT_UNIFORM
            _store_64(records, "path_key", batch.uniform)
            return
        if len(seeds) != self.rows or len(path_keys) != self.rows:
            raise InvalidArgument(
                f"sampling: {self.rows} rows need as many seeds and path keys, got {len(seeds)} "
                f"and {len(path_keys)}"
            )
        _store_64(records, "seed_key", mix64(_as_uint64(seeds)))
        _store_64(records, "path_key", _as_uint64(path_keys))

    def _records(self, buffer: I32) -> I32:
        end = HEADER_WORDS + self.rows * RECORD_WORDS
        return buffer[HEADER_WORDS:end].reshape(self.rows, RECORD_WORDS)

    def size(self, penalty_entries: int = 0) -> int:
        """Words that `pack` writes with that many penalised ids."""
        return len(self._template) + self.masks * self.words + 2 * penalty_entries

    def mask_view(self, buffer: I32) -> I32:
        """The bitmask [masks, words] inside a buffer, to be filled in place around `pack`."""
        start = len(self._template)
        return buffer[start : start + self.masks * self.words].reshape(self.masks, self.words)

    def pack(
        self, positions: ArrayLike = 0, *, rows: ArrayLike | None = None,
        previous: ArrayLike | None = None, mask: I32 | None = None,
        penalties: Penalties | None = None, out: I32 | None = None,
    ) -> I32:  # fmt: skip
        """One step's buffer. About 10 us for 256 rows without bitmask and penalties.

        Args:
            positions: [R] position that the new token will take.
            rows: [R] row of the logits to read, -1: no token is wanted; default 0 .. R - 1.
            previous: [R] index, in the `previous` tensor of the call, of a token that this row
                generated and `penalties` doesn't count yet; -1 for none.
            mask: [masks, words]; None leaves what `mask_view` shows (or takes the batch's).
            penalties: instead of the batch's.
            out: buffer to write, such as pinned memory; None makes one.

        Returns:
            The part of `out` that was written.

        Raises:
            InvalidArgument: `out` is too small, or an array has the wrong shape.
        """
        penalties = self._penalties if penalties is None else penalties
        entries = len(penalties.ids) if self._has_penalties else 0
        size, fixed = self.size(entries), len(self._template)
        if out is None:
            out = np.empty(size, np.int32)
        elif len(out) < size:
            raise InvalidArgument(f"sampling: the buffer has {len(out)} words, {size} are needed")
        out[:fixed] = self._template
        records = self._records(out)
        records[:, RECORD["position"]] = positions
        if rows is not None:
            records[:, RECORD["logits_row"]] = rows
        self._write_mask(out, self._mask if mask is None else mask)
        start = fixed + self.masks * self.words
        out[7:10] = start, start + entries, size
        if self._has_penalties:
            self._write_penalties(records, out[start:size], penalties, previous)
        return out[:size]

    def _write_mask(self, out: I32, mask: I32 | None) -> None:
        if self.masks == 0 or mask is None:
            return
        if mask.shape[0] < self.masks or mask.shape[1] != self.words:
            raise InvalidArgument(
                f"sampling: the mask must be [{self.masks}, {self.words}], got {list(mask.shape)}"
            )
        self.mask_view(out)[:] = mask[: self.masks]

    def _write_penalties(
        self, records: I32, space: I32, penalties: Penalties, previous: ArrayLike | None
    ) -> None:
        indptr, ids, counts = penalties
        if len(indptr) != self.rows + 1 or indptr[-1] != len(ids) or len(ids) != len(counts):
            raise InvalidArgument(
                f"sampling: penalties of {self.rows} rows need {self.rows + 1} offsets up to the "
                f"number of ids, got {len(indptr)} offsets, {len(ids)} ids, {len(counts)} counts"
            )
        _check_ids("pen_ids", ids, self.vocab)
        ids, counts = _sorted_rows(indptr, ids, counts)
        space[: len(ids)] = ids
        space[len(ids) :] = counts
        records[:, RECORD["pen_begin"]] = indptr[:-1]
        records[:, RECORD["pen_end"]] = np.where(self._penalised, indptr[1:], indptr[:-1])
        if previous is not None:
            records[:, RECORD["previous"]] = np.where(self._penalised, previous, -1)


def pack_sampling(batch: SamplingBatch, vocab: int, rows: ArrayLike | None = None) -> I32:
    """The buffer of a batch whose draws are given as `batch.uniform`."""
    return SamplingTable(batch, vocab).pack(rows=rows)


def workspace_bytes(vocab: int) -> int:
    """Device memory that one row needs in `sample`; a multiple of 16."""
    return 16 + 32 + 4 * 2048 + 8 * 2048 + 32 * 64 + -(-vocab // 512) * 16


def make_workspace(vocab: int, rows: int, device: torch.device | str) -> torch.Tensor:
    """Zeroed memory for `sample`, uint8; calls on one stream may share it.

    With room for fewer rows than a call has, they are done one after another.
    """
    return torch.zeros(max(rows, 1) * workspace_bytes(vocab), dtype=torch.uint8, device=device)


def _derived(batch: SamplingBatch) -> dict[str, F32]:
    """What the kernel would have to compute from the settings, and rounds as the twin does."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.float32(1) / batch.temperature
        distance = -np.log(np.minimum(batch.min_p, np.float32(1)))
    return {
        "inverse_temperature": np.where(
            (batch.temperature > 0) & np.isfinite(inverse), inverse, np.float32(0)
        ).astype(np.float32),
        "min_p_distance": np.where(batch.min_p > 0, distance, np.inf).astype(np.float32),
    }


def _check_ids(name: str, ids: I32, vocab: int) -> None:
    if len(ids) > 0 and (ids.min() < 0 or ids.max() >= vocab):
        raise InvalidArgument(
            f"sample: {name}: ids {ids.min()}..{ids.max()} leave the vocabulary of {vocab}"
        )


def _sorted_rows(indptr: I32, ids: I32, values: _Values) -> tuple[I32, _Values]:
    """Ids (and their values) in ascending order inside every row; equal ids keep their order."""
    if len(ids) < 2:
        return ids, values
    falls = ids[1:] < ids[:-1]
    edges = indptr[1:-1]
    falls[edges[(edges > 0) & (edges < len(ids))] - 1] = False
    if not falls.any():
        return ids, values
    order = np.lexsort((ids, np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))))
    return ids[order], values[order]


def _as_uint64(values: Sequence[int]) -> U64:
    if isinstance(values, np.ndarray):
        return values.astype(np.uint64)
    return np.array([value & 0xFFFFFFFFFFFFFFFF for value in values], np.uint64)


def _store_64(records: I32, name: str, values: NDArray[np.generic]) -> None:
    column = RECORD[name]
    records[:, column : column + 2] = np.ascontiguousarray(values).view(np.int32).reshape(-1, 2)
