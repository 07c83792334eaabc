"""From logits to the next token of each branch, independent of batch and timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dendrite_engine.kernels.sampling_batch import SamplingBatch
from dendrite_engine.sampling_params import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix64(value: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014): a 64-bit bijection with full avalanche.

    Example:
        >>> mix64(0), mix64(1) == mix64(1 + 2**64)
        (16294208416658607535, True)
    """
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def child_key(parent_key: int, position: int, ordinal: int) -> int:
    """Key of the `ordinal`-th fork of a branch, made at `position`."""
    return mix64(parent_key ^ mix64((position << 32) ^ ordinal))


def uniform(seed: int, path_key: int, position: int) -> float:
    """The draw in [0, 1) of one position of one branch: a pure function of its arguments."""
    return (mix64(mix64(seed & _MASK) ^ mix64(path_key ^ mix64(position))) >> 11) * 2.0**-53


@dataclass(slots=True)
class SamplerState:
    """What one generating branch needs between tokens.

    Attributes:
        params: how to sample.
        seed: params.seed, or the engine's.
        path_key: key of the branch's path, see `child_key`.
        counts: token id -> occurrences in the text generated so far (penalties only).
        context_ids: ids of prompt and output (repetition penalty only).
    """

    params: SamplingParams
    seed: int
    path_key: int
    counts: dict[int, int] = field(default_factory=dict)
    context_ids: set[int] = field(default_factory=set)

    def accept(self, token_id: int) -> None:
        """Account for a token that was generated."""
        if self.params.has_penalties:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1
            self.context_ids.add(token_id)


class Sampler:
    """Samples a batch of rows in one kernel call."""

    def __init__(self, ops: Any, vocab_size: int) -> None:
        self._ops, self._vocab_size = ops, vocab_size

    def sample(
        self, logits: torch.Tensor, states: Sequence[SamplerState], positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw one token a row.

        Args:
            logits: fp32 [R, vocab].
            states: one a row.
            positions: position that the new token will take, one a row.

        Returns:
            (token ids i32 [R], log-probabilities f32 [R]); token -1 where a row is not finite.
        """
        batch = _batch(states, positions)
        tokens, logprobs = self._ops.sample(logits, batch)
        return np.asarray(tokens), np.asarray(logprobs)

    def top(self, logits: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k most likely tokens a row: (ids i32 [R, k], log-probabilities f32 [R, k])."""
        ids, logprobs = self._ops.top_logprobs(logits, min(k, self._vocab_size))
        return np.asarray(ids), np.asarray(logprobs)


def _batch(states: Sequence[SamplerState], positions: Sequence[int]) -> SamplingBatch:
    params = [state.params for state in states]
    draws = [
        uniform(state.seed, state.path_key, position) if state.params.temperature > 0 else 0.0
        for state, position in zip(states, positions, strict=True)
    ]
    pen_indptr, pen_ids, pen_counts = _penalty_rows(states)
    bias_indptr, bias_ids, bias_values = _bias_rows(params)
    return SamplingBatch(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        uniform=np.array(draws, np.float64),
        repetition=np.array([p.repetition_penalty for p in params], np.float32),
        presence=np.array([p.presence_penalty for p in params], np.float32),
        frequency=np.array([p.frequency_penalty for p in params], np.float32),
        pen_indptr=pen_indptr,
        pen_ids=pen_ids,
        pen_counts=pen_counts,
        bias_indptr=bias_indptr,
        bias_ids=bias_ids,
        bias_values=bias_values,
    )


def _penalty_rows(states: Sequence[SamplerState]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids: list[int] = []
    counts: list[int] = []
    indptr = [0]
    for state in states:
        if state.params.has_penalties:
            row = sorted(state.context_ids)
            ids += row
            counts += [state.counts.get(token_id, 0) for token_id in row]
        indptr.append(len(ids))
    return np.array(indptr, np.int32), np.array(ids, np.int32), np.array(counts, np.int32)


def _bias_rows(params: Sequence[SamplingParams]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids: list[int] = []
    values: list[float] = []
    indptr = [0]
    for row in params:
        for token_id, value in sorted((row.logit_bias or {}).items()):
            ids.append(token_id)
            values.append(value)
        indptr.append(len(ids))
    return np.array(indptr, np.int32), np.array(ids, np.int32), np.array(values, np.float32)
