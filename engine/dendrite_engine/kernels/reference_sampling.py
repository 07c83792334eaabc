"""Twin of the sampling kernels: sorts every row, sums in float64.

The native kernels keep the same order of tokens and the same rules without sorting; a token can
differ only where `uniform` or a top-p boundary is within float rounding of a cumulative sum.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.kernels.sampling_batch import SamplingBatch

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


def sample(logits: torch.Tensor, batch: SamplingBatch) -> tuple[I32, F32]:
    """Choose one token per row; see `SamplingBatch` for the rules. O(V log V) per row."""
    rows, vocab = logits.shape
    if rows != batch.num_rows:
        raise InvalidArgument(f"sample: logits has {rows} rows, batch {batch.num_rows}")
    _check_ids("pen_ids", batch.pen_ids, vocab)
    _check_ids("bias_ids", batch.bias_ids, vocab)
    raw = logits.detach().numpy()
    tokens = np.full(rows, -1, np.int32)
    logprobs = np.full(rows, np.nan, np.float32)
    for row in range(rows):
        if not np.isfinite(raw[row]).all():
            continue
        tokens[row] = _choose(_process(raw[row], batch, row), batch, row)
        if tokens[row] >= 0:
            logprobs[row] = _log_softmax(raw[row])[tokens[row]]
    return tokens, logprobs


def top_logprobs(logits: torch.Tensor, k: int) -> tuple[I32, F32]:
    """The k most likely tokens of each row, value descending then id ascending."""
    rows, vocab = logits.shape
    if not 1 <= k <= vocab:
        raise InvalidArgument(f"top_logprobs: k must be in 1..{vocab}, got {k}")
    raw = logits.detach().numpy()
    ids = np.full((rows, k), -1, np.int32)
    logprobs = np.full((rows, k), np.nan, np.float32)
    for row in range(rows):
        if np.isfinite(raw[row]).all():
            ids[row] = np.argsort(-raw[row], kind="stable")[:k]
            logprobs[row] = _log_softmax(raw[row])[ids[row]]
    return ids, logprobs


def _check_ids(name: str, ids: I32, vocab: int) -> None:
    if len(ids) > 0 and (ids.min() < 0 or ids.max() >= vocab):
        raise InvalidArgument(
            f"sample: {name}: ids {ids.min()}..{ids.max()} leave the vocabulary of {vocab}"
        )


def _log_softmax(x: F32) -> F64:
    shifted = x.astype(np.float64) - float(x.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _process(raw: F32, batch: SamplingBatch, row: int) -> F32:
    """Bias, penalties and bitmask; banned tokens become -inf."""
    x = raw.copy()
    span = slice(batch.bias_indptr[row], batch.bias_indptr[row + 1])
    np.add.at(x, batch.bias_ids[span], batch.bias_values[span])
    span = slice(batch.pen_indptr[row], batch.pen_indptr[row + 1])
    ids, counts = batch.pen_ids[span], batch.pen_counts[span]
    repetition = batch.repetition[row]
    x[ids] = np.where(x[ids] > 0, x[ids] / repetition, x[ids] * repetition)
    x[ids] -= np.where(counts > 0, batch.presence[row], np.float32(0)) + batch.frequency[
        row
    ] * counts.astype(np.float32)
    if batch.mask is not None:
        bits = np.unpackbits(batch.mask[row].view(np.uint8), bitorder="little")[: len(x)]
        x[bits == 0] = -np.inf
    return x


def probabilities(raw: F32, batch: SamplingBatch, row: int) -> tuple[NDArray[np.int64], F64]:
    """The distribution that one row is drawn from: token ids and their probabilities, in the order
    of the draw. For a finite row [V] with temperature > 0 and a token that is allowed.
    """
    ids, weights = _kept(_process(raw, batch, row), batch, row)
    return ids, weights / weights.sum()


def _choose(x: F32, batch: SamplingBatch, row: int) -> int:
    if not np.isfinite(x.max()):
        return -1
    if batch.temperature[row] <= 0:
        return int(x.argmax())
    ids, weights = _kept(x, batch, row)
    running = np.cumsum(weights)
    target = batch.uniform[row] * running[-1]
    return int(ids[min(int((running <= target).sum()), len(ids) - 1)])


def _kept(x: F32, batch: SamplingBatch, row: int) -> tuple[NDArray[np.int64], F64]:
    """Tokens that temperature and filters leave, the likeliest first, and their weights."""
    top, temperature = x.max(), batch.temperature[row]
    order = np.argsort(-x, kind="stable")
    order = order[x[order] > -np.inf]
    with np.errstate(over="ignore"):
        distance = (top - x[order]) * (np.float32(1) / temperature)
    weights = np.exp(-distance.astype(np.float64))
    kept = len(order)
    if batch.top_k[row] > 0:
        kept = min(kept, int(batch.top_k[row]))
    if batch.top_p[row] < 1:
        running = np.cumsum(weights[:kept])
        kept = min(kept, 1 + int((running < float(batch.top_p[row]) * running[-1]).sum()))
    if batch.min_p[row] > 0:
        limit = -np.log(min(batch.min_p[row], np.float32(1)))
        kept = int((distance[:kept] <= limit).sum())
    return order[:kept], weights[:kept]
