"""Twins of `sample` and `top_logprobs` on a GPU: same arguments, on any device, no speed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels import reference_sampling
from dendrite_engine.kernels.sampling_batch import F64, I32, SamplingBatch
from dendrite_engine.kernels.sampling_pack import (
    EXPLICIT_UNIFORM,
    FLOATS,
    HEADER_WORDS,
    RECORD,
    RECORD_WORDS,
    U64,
    VERSION,
    uniforms,
)


def sample(
    logits: torch.Tensor, params: torch.Tensor, workspace: torch.Tensor, out: torch.Tensor,
    previous: torch.Tensor | None = None, greedy: bool = False, blocks: int = 0,
) -> None:  # fmt: skip
    """Choose one token per row.

    Args:
        logits: fp32 [N, V]; rows may lie apart.
        params: int32, written by `sampling_pack`.
        workspace: see `sampling_pack.make_workspace`; unused here.
        out: int32 [2, R], written: tokens, then log-probabilities by their bits. Rows past those of
            `params`, without a row of logits, or whose row is not finite, get -1 and NaN.
        previous: int32 [P] tokens that records may refer to.
        greedy: a promise that no row draws.
        blocks: blocks per row, a tuning knob without effect on results.
    """
    del workspace, greedy, blocks
    words = params.detach().cpu().numpy()
    tokens = None if previous is None else previous.detach().cpu().numpy()
    batch, rows = unpack_sampling(words, tokens)
    kept = np.flatnonzero((rows >= 0) & (rows < len(logits)))
    chosen = np.full(out.shape[1], -1, np.int32)
    logprobs = np.full(out.shape[1], np.nan, np.float32)
    used = logits.detach().cpu()[torch.from_numpy(rows[kept]).long()]
    chosen[kept], logprobs[kept] = reference_sampling.sample(used, _select(batch, kept))
    out.copy_(torch.from_numpy(np.stack([chosen, logprobs.view(np.int32)])))


def top_logprobs(
    logits: torch.Tensor, k: int, ids: torch.Tensor, logprobs: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """The k most likely tokens of each row, most likely first, then by id.

    Args:
        logits: fp32 [N, V]; rows may lie apart.
        k: 1 .. V.
        ids: int32 [R, k], written; -1 where the row is not finite or not there.
        logprobs: fp32 [R, k], written; NaN there.
        rows: int32 [R] rows of the logits; None: all.
    """
    source = np.arange(len(logits)) if rows is None else rows.cpu().numpy()
    kept = torch.from_numpy(np.flatnonzero((source >= 0) & (source < len(logits))))
    used = logits.detach().cpu()[torch.from_numpy(source).long()[kept]]
    found = reference_sampling.top_logprobs(used, k)
    ids.fill_(-1)
    logprobs.fill_(float("nan"))
    ids[kept.to(ids.device)] = torch.from_numpy(found[0]).to(ids.device)
    logprobs[kept.to(ids.device)] = torch.from_numpy(found[1]).to(ids.device)


def unpack_sampling(buffer: I32, previous: I32 | None = None) -> tuple[SamplingBatch, I32]:
    """The settings in a buffer, with the draws, and the rows of the logits [R].

    Args:
        buffer: what `pack` wrote.
        previous: the tokens that records may refer to.

    Raises:
        InvalidArgument: the buffer is of another version.
    """
    if buffer[0] != VERSION:
        raise InvalidArgument(f"sampling: parameters of version {buffer[0]}, not {VERSION}")
    count, words = int(buffer[1]), int(buffer[3])
    bias_at, bias_values_at, mask_at, pens_at, pen_counts_at = (int(at) for at in buffer[4:9])
    end = HEADER_WORDS + count * RECORD_WORDS
    records = buffer[HEADER_WORDS:end].reshape(count, RECORD_WORDS)
    bias_ptr, bias = _ranges(records, "bias", bias_at, bias_values_at)
    pen_ptr, pens = _ranges(records, "pen", pens_at, pen_counts_at)
    tables = (bias_ptr, buffer[bias[0]], buffer[bias[1]].view(np.float32))
    pen_tables = _add_previous(
        (pen_ptr, buffer[pens[0]], buffer[pens[1]]), records[:, RECORD["previous"]], previous
    )
    masks = buffer[mask_at:pens_at].reshape(-1, words)
    mask_rows = records[:, RECORD["mask_row"]]
    mask = None
    if len(masks) > 0:
        mask = np.where(mask_rows[:, None] < 0, np.int32(-1), masks[mask_rows])
    floats = {
        name: np.ascontiguousarray(records[:, RECORD[name]]).view(np.float32) for name in FLOATS
    }
    batch = SamplingBatch(
        **floats, top_k=np.ascontiguousarray(records[:, RECORD["top_k"]]),
        uniform=_uniform_column(records), pen_indptr=pen_tables[0], pen_ids=pen_tables[1],
        pen_counts=pen_tables[2], bias_indptr=tables[0], bias_ids=tables[1], bias_values=tables[2],
        mask=mask,
    )  # fmt: skip
    return batch, records[:, RECORD["logits_row"]].copy()


def _select(batch: SamplingBatch, rows: np.ndarray) -> SamplingBatch:
    """The settings of some rows."""
    arrays = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    picked = {
        name: array[rows]
        for name, array in arrays.items()
        if array is not None and not name.startswith(("pen_", "bias_"))
    }
    for prefix, parts in (("pen", ("ids", "counts")), ("bias", ("ids", "values"))):
        indptr = arrays[f"{prefix}_indptr"]
        lengths = np.diff(indptr)[rows]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        places = np.repeat(indptr[:-1][rows] - starts[:-1], lengths) + np.arange(starts[-1])
        picked[f"{prefix}_indptr"] = starts
        picked |= {f"{prefix}_{part}": arrays[f"{prefix}_{part}"][places] for part in parts}
    return SamplingBatch(**picked)


def _load_64(records: I32, name: str) -> U64:
    column = RECORD[name]
    pairs: U64 = np.ascontiguousarray(records[:, column : column + 2]).view(np.uint64)[:, 0]
    return pairs


def _uniform_column(records: I32) -> F64:
    path_keys = _load_64(records, "path_key")
    drawn = uniforms(
        _load_64(records, "seed_key"), path_keys, records[:, RECORD["position"]].astype(np.int64)
    )
    explicit = records[:, RECORD["flags"]] & EXPLICIT_UNIFORM
    return np.where(explicit != 0, path_keys.view(np.float64), drawn)


def _ranges(records: I32, prefix: str, *starts: int) -> tuple[I32, list[NDArray[np.int64]]]:
    """Offsets [R + 1] of the rows' entries, and their places in the arrays from `starts` on."""
    begin = records[:, RECORD[f"{prefix}_begin"]].astype(np.int64)
    end = records[:, RECORD[f"{prefix}_end"]].astype(np.int64)
    indptr = np.concatenate([[0], np.cumsum(end - begin)])
    places = np.repeat(begin - indptr[:-1], end - begin) + np.arange(indptr[-1])
    return indptr.astype(np.int32), [start + places for start in starts]


def _add_previous(
    penalties: tuple[I32, I32, I32], indices: I32, previous: I32 | None
) -> tuple[I32, I32, I32]:
    """Counts the token that a record refers to once more."""
    indptr, ids, counts = penalties
    if previous is None or not (indices >= 0).any():
        return penalties
    rows: list[dict[int, int]] = []
    for row, index in enumerate(indices):
        span = slice(indptr[row], indptr[row + 1])
        seen = dict(zip(ids[span].tolist(), counts[span].tolist(), strict=True))
        if 0 <= index < len(previous) and previous[index] >= 0:
            token = int(previous[index])
            seen[token] = seen.get(token, 0) + 1
        rows.append(seen)
    flat = [entry for seen in rows for entry in sorted(seen.items())]
    return (
        np.cumsum([0, *(len(seen) for seen in rows)]).astype(np.int32),
        np.array([entry[0] for entry in flat], np.int32),
        np.array([entry[1] for entry in flat], np.int32),
    )
