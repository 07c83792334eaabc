"""What one call of `sample` needs besides the logits: one entry per row, as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dendrite_engine.errors import InvalidArgument

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

_PER_ROW = (
    "temperature", "top_k", "top_p", "min_p", "uniform", "repetition", "presence", "frequency",
)  # fmt: skip
_DTYPES = {
    "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
    "uniform": np.float64, "repetition": np.float32, "presence": np.float32,
    "frequency": np.float32, "pen_indptr": np.int32, "pen_ids": np.int32, "pen_counts": np.int32,
    "bias_indptr": np.int32, "bias_ids": np.int32, "bias_values": np.float32,
}  # fmt: skip


def _no_rows() -> I32:
    return np.zeros(0, np.int32)


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling settings of R rows.

    Applied to a row of logits in this order: logit bias; repetition penalty (a positive logit is
    divided by it, a negative one multiplied) for every id in `pen_ids`; minus `presence` where the
    count is positive and minus `frequency * count`; bitmask; temperature; top-k (value descending,
    id ascending); top-p on what is left, renormalised (the token that crosses is kept); min-p
    (probability at least `min_p` times the largest); then the inverse of the cumulative
    distribution at `uniform`, over (probability descending, id ascending).

    Arrays must be C-contiguous with the dtypes below; `SamplingBatch.neutral(rows)` gives the
    values that switch everything off.

    Raises:
        InvalidArgument: an array has another dtype or length.
    """

    temperature: F32  # [R] 0 = greedy
    top_k: I32  # [R] 0 = off
    top_p: F32  # [R] 1 = off
    min_p: F32  # [R] 0 = off
    uniform: F64  # [R] in [0, 1)
    repetition: F32  # [R] 1 = off
    presence: F32  # [R] 0 = off
    frequency: F32  # [R] 0 = off
    pen_indptr: I32  # [R + 1] row i's penalised ids are pen_ids[pen_indptr[i] : pen_indptr[i + 1]]
    pen_ids: I32 = field(default_factory=_no_rows)  # distinct ids seen in the row's context
    pen_counts: I32 = field(default_factory=_no_rows)  # occurrences in the generated text
    bias_indptr: I32 = field(default_factory=_no_rows)  # [R + 1]
    bias_ids: I32 = field(default_factory=_no_rows)
    bias_values: F32 = field(default_factory=lambda: np.zeros(0, np.float32))
    mask: I32 | None = None  # [R, ceil(V / 32)] bit v % 32 of word v // 32 set: token v allowed

    def __post_init__(self) -> None:
        if len(self.bias_indptr) == 0:
            object.__setattr__(self, "bias_indptr", np.zeros(self.num_rows + 1, np.int32))
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                raise InvalidArgument(
                    f"SamplingBatch.{name}: {np.dtype(dtype)} with one dimension is needed, "
                    f"got {array.dtype} of shape {array.shape}"
                )
        for name in _PER_ROW:
            self._check_length(name, self.num_rows)
        for prefix, parts in (("pen", ("ids", "counts")), ("bias", ("ids", "values"))):
            self._check_length(f"{prefix}_indptr", self.num_rows + 1)
            entries = int(getattr(self, f"{prefix}_indptr")[-1])
            for part in parts:
                self._check_length(f"{prefix}_{part}", entries)

    def _check_length(self, name: str, length: int) -> None:
        if len(getattr(self, name)) != length:
            raise InvalidArgument(
                f"SamplingBatch.{name}: {length} entries are needed, got {len(getattr(self, name))}"
            )

    @property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return len(self.temperature)

    def arrays(self) -> tuple[NDArray[np.generic] | None, ...]:
        """Every array in the order that the native kernel takes them."""
        return (
            self.temperature, self.top_k, self.top_p, self.min_p, self.uniform, self.repetition,
            self.presence, self.frequency, self.pen_indptr, self.pen_ids, self.pen_counts,
            self.bias_indptr, self.bias_ids, self.bias_values, self.mask,
        )  # fmt: skip

    @classmethod
    def neutral(cls, rows: int, *, temperature: float = 0.0) -> SamplingBatch:
        """Settings for `rows` rows with every filter and penalty off (greedy by default)."""
        return cls(
            temperature=np.full(rows, temperature, np.float32),
            top_k=np.zeros(rows, np.int32),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            uniform=np.zeros(rows, np.float64),
            repetition=np.ones(rows, np.float32),
            presence=np.zeros(rows, np.float32),
            frequency=np.zeros(rows, np.float32),
            pen_indptr=np.zeros(rows + 1, np.int32),
        )
