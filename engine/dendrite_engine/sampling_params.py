"""How the next token of a branch is chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dendrite_engine.errors import InvalidArgument

MAX_LOGPROBS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token of a branch is chosen. Immutable; `replace` makes a changed copy.

    Order of application: logit bias, repetition / presence / frequency penalties, temperature,
        top-k,
    top-p on what is left, min-p, then one draw from a counter-based generator keyed by (seed,
    branch path, position), so a result depends neither on the batch nor on timing.

    Attributes:
        temperature: 0 picks the most likely token (ties: lowest id); > 0 divides the logits.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set whose probability reaches top_p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one; 0 drops none.
        repetition_penalty: > 1 makes tokens of prompt and output less likely (Keskar et al. 2019).
        presence_penalty: subtracted once from the logit of each token already generated.
        frequency_penalty: subtracted for each time the token was generated.
        logit_bias: token id -> number added to its logit (-inf forbids it).
        stop: strings that end the branch; the token that completes one is kept.
        stop_token_ids: ids that end the branch; the token is kept.
        max_tokens: tokens to generate at most.
        ignore_eos: go on after the end-of-turn token.
        logprobs: how many of the most likely tokens to report at each position (0..64).
        seed: overrides the engine's seed.

    Raises:
        InvalidArgument: a value is out of range; the message names it.

    Example:
        >>> SamplingParams(temperature=0.8, top_p=0.95).replace(max_tokens=5).max_tokens
        5
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    max_tokens: int = 16
    ignore_eos: bool = False
    logprobs: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._check_finite()
        _check("temperature", self.temperature, self.temperature >= 0, ">= 0")
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "an integer >= 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "> 0")
        _check(
            "max_tokens",
            self.max_tokens,
            _is_int(self.max_tokens) and self.max_tokens >= 1,
            "an integer >= 1",
        )
        _check(
            "logprobs",
            self.logprobs,
            _is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS,
            f"an integer in 0..{MAX_LOGPROBS}",
        )
        _check("seed", self.seed, self.seed is None or _is_int(self.seed), "an integer or None")
        self._normalise_stops()
        self._check_bias()

    def _check_finite(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
            _check(name, value, ok and math.isfinite(value), "a finite number")

    def _normalise_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            _check("stop", text, isinstance(text, str) and text != "", "non-empty strings")
        ids = tuple(self.stop_token_ids)
        for token_id in ids:
            _check("stop_token_ids", token_id, _is_int(token_id) and token_id >= 0, "token ids")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", ids)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        bias: dict[int, float] = {}
        for token_id, value in self.logit_bias.items():
            _check("logit_bias", token_id, _is_int(token_id) and token_id >= 0, "token ids as keys")
            ok = isinstance(value, (int, float)) and (math.isfinite(value) or value == -math.inf)
            _check("logit_bias", value, ok, "finite numbers (or -inf to forbid a token) as values")
            bias[int(token_id)] = float(value)
        object.__setattr__(self, "logit_bias", bias)

    @property
    def has_penalties(self) -> bool:
        """Whether any penalty differs from its neutral value."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with these fields changed, validated again."""
        return dataclasses.replace(self, **changes)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise InvalidArgument(f"SamplingParams.{name} must be {wanted}, got {value!r}")
