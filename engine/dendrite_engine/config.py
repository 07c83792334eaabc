"""The one object through which settings reach the engine."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dendrite_engine.errors import InvalidArgument

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(value: int | str, name: str = "kv_budget") -> int:
    """Bytes of `value`: an integer, or text such as "512MiB", "1.5 GB".

    Raises:
        InvalidArgument: not a size, or not positive.

    Example:
        >>> parse_bytes("1GiB")
        1073741824
    """
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise InvalidArgument(f'{name} must be bytes or text such as "1GiB", got {value!r}')
        unit = (match.group(2) or "").lower()
        size = int(float(match.group(1)) * {**_UNITS, **_BINARY}[unit])
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        raise InvalidArgument(f"{name} must be bytes or text, got {type(value).__name__}")
    if size <= 0:
        raise InvalidArgument(f"{name} must be positive, got {value!r}")
    return size


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine; immutable. `Engine.from_pretrained` builds it from its keywords.

    Attributes:
        device: "auto" or "cpu".
        dtype: compute type: "auto" (float32 on CPU) or "float32".
        kv_format: how a page stores K and V: "auto" (fp32 on CPU) or a registered page format.
        kv_budget: bytes for pages; ignored when num_pages is given.
        num_pages: pages in the pool, or None to derive them from kv_budget.
        page_size: tokens per page: a power of two, 1..256.
        attention: "auto", "tree" (native kernels) or "reference" (plain torch).
        seed: default seed of the sampling generator.
        deterministic: make a branch's logits bitwise independent of what runs beside it.
        debug: fill fresh, freed and tail slots with NaN and checksum full pages.
        prefix_cache: reuse pages of earlier prompts.
        max_batch_tokens: rows of one forward pass at most.
        prefill_chunk: prompt tokens of one forward pass at most while other branches decode.
        max_branches: live branches at most.
        max_context: tokens a branch may hold; None takes the model's own limit.
        core: "auto", "native" or "reference": which page-and-tree core to use.
    """

    device: str = "auto"
    dtype: str = "auto"
    kv_format: str = "auto"
    kv_budget: int | str = "1GiB"
    num_pages: int | None = None
    page_size: int = 16
    attention: str = "auto"
    seed: int = 0
    deterministic: bool = False
    debug: bool = False
    prefix_cache: bool = True
    max_batch_tokens: int = 512
    prefill_chunk: int = 256
    max_branches: int = 1_000_000
    max_context: int | None = None
    core: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "prefill_chunk", "max_branches", "page_size"):
            _positive(name, getattr(self, name))
        for name in ("num_pages", "max_context"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.page_size > 256 or self.page_size & (self.page_size - 1):
            raise InvalidArgument(
                f"page_size must be a power of two in 1..256, got {self.page_size}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InvalidArgument(f"seed must be an integer, got {self.seed!r}")
        parse_bytes(self.kv_budget)
        _choice("device", self.device, ("auto", "cpu"))
        _choice("dtype", self.dtype, ("auto", "float32"))
        _choice("core", self.core, ("auto", "native", "reference"))


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"{name} must be an integer >= 1, got {value!r}")


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(f"{name} must be one of {', '.join(known)}; got {value!r}")
