"""From logits to the next token of each branch, independent of batch and timing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from dendrite_engine.kernels.sampling_batch import SamplingBatch
from dendrite_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dendrite_engine.kernels.sampling_pack import SamplingTable

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


def _mix64(values: np.ndarray) -> np.ndarray:
    """`mix64` of each of u64 [n]."""
    values = values + np.uint64(_GOLDEN)  # wraps, as every step here
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def uniform_rows(seeds: np.ndarray, path_keys: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """`uniform` of each row: u64 [n], u64 [n] and integers [n] to f64 [n]."""
    mixed = _mix64(_mix64(seeds) ^ _mix64(path_keys ^ _mix64(positions.astype(np.uint64))))
    draws: np.ndarray = (mixed >> np.uint64(11)) * 2.0**-53
    return draws


@dataclass(slots=True)
class SamplerState:
    """What one generating branch needs between tokens.

    Attributes:
        params: how to sample.
        seed: params.seed, or the engine's.
        path_key: key of the branch's path, see `child_key`.
        counts: token id -> occurrences in the text generated so far (penalties only).
        context_ids: ids of prompt and output (repetition penalty only).
        masked: a bitmask says each time which tokens may be chosen.
    """

    params: SamplingParams
    seed: int
    path_key: int
    counts: dict[int, int] = field(default_factory=dict)
    context_ids: set[int] = field(default_factory=set)
    masked: bool = False

    def accept(self, token_id: int) -> None:
        """Account for a token that was generated."""
        if self.params.has_penalties:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1
            self.context_ids.add(token_id)

    def load(self, token_ids: np.ndarray, generated: np.ndarray) -> None:
        """Start from what a branch holds: all ids, and which were generated (bool), both [n]."""
        self.context_ids = set(token_ids.tolist())
        ids, counts = np.unique(token_ids[generated], return_counts=True)
        self.counts = dict(zip(ids.tolist(), counts.tolist(), strict=True))


_FLOATS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


class SamplingRows:
    """How a set of rows is sampled, as arrays that serve every step of the same rows.

    Attributes:
        floats: f32 [6, R]: temperature, top_p, min_p and the penalties repetition, presence,
            frequency.
        top_k: i32 [R].
        seeds, path_keys: u64 [R].
        special: rows with penalties or a logit bias, and their states.
        masked: rows that get a bitmask with every step, bool [R].
        packed: the same for a device, when it was needed; see device.sampler.
        masks: row -> bitmask i32 [ceil(vocab / 32)] of what it may become; host kernels only.
    """

    def __init__(
        self,
        floats: np.ndarray,
        top_k: np.ndarray,
        seeds: np.ndarray,
        path_keys: np.ndarray,
        special: dict[int, SamplerState],
        masked: np.ndarray,
    ) -> None:
        self.floats, self.top_k = floats, top_k
        self.seeds, self.path_keys = seeds, path_keys
        self.special, self.masked = special, masked
        self.packed: SamplingTable | None = None
        self.masks: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, states: Sequence[SamplerState]) -> SamplingRows:
        """Arrays of these states. O(R)."""
        floats = [[getattr(state.params, name) for state in states] for name in _FLOATS]
        return cls(
            np.array(floats, np.float32),
            np.array([state.params.top_k for state in states], np.int32),
            np.array([state.seed & _MASK for state in states], np.uint64),
            np.array([state.path_key for state in states], np.uint64),
            {i: s for i, s in enumerate(states) if s.params.has_penalties or s.params.logit_bias},
            np.array([state.masked for state in states], bool),
        )

    def __len__(self) -> int:
        return len(self.top_k)

    def take(self, rows: np.ndarray) -> SamplingRows:
        """The rows i64 [n] of these, in this order; O(n)."""
        special: dict[int, SamplerState] = {}
        if self.special:
            known = self.special
            special = {i: known[row] for i, row in enumerate(rows.tolist()) if row in known}
        return SamplingRows(
            self.floats.take(rows, axis=1),
            self.top_k.take(rows),
            self.seeds.take(rows),
            self.path_keys.take(rows),
            special,
            self.masked.take(rows),
        )

    def joined(self, other: SamplingRows) -> SamplingRows:
        """These rows and then those of `other`."""
        special = {len(self) + row: state for row, state in other.special.items()}
        return SamplingRows(
            np.concatenate((self.floats, other.floats), axis=1),
            np.concatenate((self.top_k, other.top_k)),
            np.concatenate((self.seeds, other.seeds)),
            np.concatenate((self.path_keys, other.path_keys)),
            {**self.special, **special},
            np.concatenate((self.masked, other.masked)),
        )

    @cached_property
    def draws(self) -> bool:
        """Whether any row needs a random number."""
        return bool((self.floats[0] > 0).any())

    @cached_property
    def bias(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logit biases: indptr i32 [R + 1], ids i32, values f32."""
        lengths = np.zeros(len(self) + 1, np.int32)
        ids: list[int] = []
        values: list[float] = []
        for row, state in self.special.items():
            pairs = sorted((state.params.logit_bias or {}).items())
            lengths[row + 1] = len(pairs)
            ids += [token_id for token_id, _ in pairs]
            values += [value for _, value in pairs]
        indptr = np.cumsum(lengths, dtype=np.int32)
        return indptr, np.array(ids, np.int32), np.array(values, np.float32)

    def penalties(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens seen so far in rows with penalties: indptr i32 [R + 1], ids i32, counts i32."""
        lengths = np.zeros(len(self) + 1, np.int32)
        ids: list[int] = []
        counts: list[int] = []
        for row, state in self.special.items():
            if state.params.has_penalties:
                seen = sorted(state.context_ids)
                lengths[row + 1] = len(seen)
                ids += seen
                counts += [state.counts.get(token_id, 0) for token_id in seen]
        indptr = np.cumsum(lengths, dtype=np.int32)
        return indptr, np.array(ids, np.int32), np.array(counts, np.int32)

    @cached_property
    def mask_rows(self) -> np.ndarray:
        """Which of the step's bitmasks each row uses, i32 [R]; -1: none."""
        rows: np.ndarray = np.where(self.masked, np.cumsum(self.masked) - 1, -1).astype(np.int32)
        return rows

    def batch(self, positions: np.ndarray, masks: np.ndarray | None = None) -> SamplingBatch:
        """Settings of one step for the host's kernels.

        Args:
            positions: position of each row's new token, [R].
            masks: bitmasks of the masked rows, in their order, i32 [m, ceil(vocab / 32)].
        """
        draws = np.zeros(len(self), np.float64)
        if self.draws:
            draws = uniform_rows(self.seeds, self.path_keys, positions)
            draws[self.floats[0] <= 0] = 0.0
        mask = None
        if masks is not None:
            mask = np.full((len(self), masks.shape[1]), -1, np.int32)
            mask[self.masked] = masks
        return self._batch(draws, self.penalties(), mask)

    def neutral_batch(self) -> SamplingBatch:
        """`batch` without what changes from step to step: draws and tokens seen."""
        nothing = np.zeros(0, np.int32)
        indptr = np.zeros(len(self) + 1, np.int32)
        return self._batch(np.zeros(len(self), np.float64), (indptr, nothing, nothing))

    def _stack_masks(self) -> np.ndarray | None:
        """One bitmask a row, i32 [R, words]; None where no row has one."""
        if not self.masks:
            return None
        words = len(next(iter(self.masks.values())))
        stacked = np.full((len(self), words), -1, np.int32)
        for row, mask in self.masks.items():
            stacked[row] = mask
        return stacked

    def _batch(
        self,
        draws: np.ndarray,
        penalties: tuple[np.ndarray, np.ndarray, np.ndarray],
        mask: np.ndarray | None = None,
    ) -> SamplingBatch:
        temperature, top_p, min_p, repetition, presence, frequency = self.floats
        pen_indptr, pen_ids, pen_counts = penalties
        bias_indptr, bias_ids, bias_values = self.bias
        return SamplingBatch(
            temperature=temperature,
            top_k=self.top_k,
            top_p=top_p,
            min_p=min_p,
            uniform=draws,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            pen_indptr=pen_indptr,
            pen_ids=pen_ids,
            pen_counts=pen_counts,
            bias_indptr=bias_indptr,
            bias_ids=bias_ids,
            bias_values=bias_values,
            mask=self._stack_masks() if mask is None else mask,
        )


class PendingTokens(Protocol):
    """Tokens that are being computed.

    Attributes:
        drawn: where they will be on the device, i32 [n], for work that is queued behind them;
            None where they are in host memory.
    """

    @property
    def drawn(self) -> torch.Tensor | None:
        """See above."""

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """(token ids i32, log-probabilities f32), of the same shape and the caller's to keep."""


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """Tokens that are there already."""

    tokens: np.ndarray
    logprobs: np.ndarray
    drawn: None = None

    def wait(self) -> tuple[np.ndarray, np.ndarray]:
        """See `PendingTokens.wait`."""
        return self.tokens, self.logprobs


class TokenSampler(Protocol):
    """Chooses tokens from logits where the logits are; used by the engine thread only.

    Attributes:
        vocab_size: logits of a row.
    """

    vocab_size: int

    def begin(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        settings: SamplingRows,
        positions: np.ndarray,
        masks: np.ndarray | None = None,
    ) -> PendingTokens:
        """Start drawing one token for each of n rows: [n]; token -1 where a row is not finite, or
        its bitmask allows nothing.

        Args:
            logits: fp32 [R, vocab].
            rows: which rows of it, i64 [n].
            settings: how each is sampled.
            positions: position that each new token will take, i32 [n].
            masks: bitmasks of the rows that `settings.masked` names, in their order, i32
                [m, ceil(vocab / 32)]; the caller may change them when `begin` has returned.
        """

    def begin_top(self, logits: torch.Tensor, rows: np.ndarray, k: int) -> PendingTokens:
        """The k most likely tokens of the rows i64 [n] of logits fp32 [R, vocab]: [n, k]."""


class Sampler:
    """The sampler of logits in host memory: done when `begin` returns; see TokenSampler."""

    def __init__(self, ops: Any, vocab_size: int) -> None:
        self._ops = ops
        self.vocab_size = vocab_size

    def begin(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        settings: SamplingRows,
        positions: np.ndarray,
        masks: np.ndarray | None = None,
    ) -> SampledTokens:
        """See TokenSampler.begin."""
        batch = settings.batch(positions, masks)
        tokens, logprobs = self._ops.sample(_select(logits, rows), batch)
        return SampledTokens(np.asarray(tokens), np.asarray(logprobs))

    def begin_top(self, logits: torch.Tensor, rows: np.ndarray, k: int) -> SampledTokens:
        """See TokenSampler.begin_top."""
        k = min(k, self.vocab_size)
        ids, logprobs = self._ops.top_logprobs(_select(logits, rows), k)
        return SampledTokens(np.asarray(ids), np.asarray(logprobs))


def _select(logits: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """These rows; no copy when they are the first ones, in order."""
    if np.array_equal(rows, np.arange(len(rows))):
        return logits[: len(rows)]
    return logits.index_select(0, torch.from_numpy(rows))
