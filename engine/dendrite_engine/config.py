"""The one object through which settings reach the engine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from dendrite_engine.errors import InvalidArgument

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|cuda-twin")


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
class GrammarLimits:
    """How much a grammar may cost; what goes beyond is refused, or ends its branch.

    The fuels are llguidance's (its ParserLimits): they bound work in a way that does not depend on
    the machine. The seconds are what is left to say where fuel does not count.

    Attributes:
        compile_seconds: wall clock of compiling one grammar, its first mask included.
        mask_seconds: wall clock of filling the mask of one branch; it gets a second try on its own.
        cache_bytes: estimated bytes of compiled grammars that are kept.
        source_bytes: length of a grammar's text.
        properties: properties of one object of a JSON schema.
        lexer_fuel: work on the terminals when a grammar is compiled.
        step_lexer_fuel: work on terminals for one mask, about 14,000 a millisecond.
        step_items: parser items for one mask, about 20,000 a millisecond.
        row_items: parser items of one row.
        lexer_states: states of the terminals' automaton, 1 to 2 kB each.
        symbols: symbols in all productions.
        threads: threads that fill masks; None: up to 8, one less than there are cores.
    """

    compile_seconds: float = 0.5
    mask_seconds: float = 0.3
    cache_bytes: int | str = "64MiB"
    source_bytes: int | str = "256KiB"
    properties: int = 2000
    lexer_fuel: int = 1_000_000
    step_lexer_fuel: int = 200_000
    step_items: int = 50_000
    row_items: int = 2000
    lexer_states: int = 50_000
    symbols: int = 200_000
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("compile_seconds", "mask_seconds"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise InvalidArgument(f"GrammarLimits.{name} must be seconds > 0, got {value!r}")
        for name in ("cache_bytes", "source_bytes"):
            parse_bytes(getattr(self, name), f"GrammarLimits.{name}")
        for name in (
            "properties", "lexer_fuel", "step_lexer_fuel", "step_items", "row_items",
            "lexer_states", "symbols",
        ):  # fmt: skip
            _positive(f"GrammarLimits.{name}", getattr(self, name))
        if self.threads is not None:
            _positive("GrammarLimits.threads", self.threads)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine; immutable. `Engine.from_pretrained` builds it from its keywords.

    Attributes:
        device: "auto" (CUDA where torch finds a GPU and the kernels load, else the CPU), "cpu",
            "cuda" or "cuda:N". "cuda-twin" runs the GPU's path on CPU tensors, for tests.
        dtype: compute type: "auto" (bfloat16 on CUDA, float32 on CPU), "float32", "bfloat16" or
            "float16"; the last two need CUDA.
        kv_format: how a page stores K and V. "auto" never quantises: numbers as in dtype. Also
            "fp32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2", "mxfp8", "tq4", "tq3", "tq2", the pairs
            "k8v4" and "k4v2", or any pair "K/V" such as "fp8_e4m3/tq3"; docs/tuning.md says which
            to take when. Numbers other than dtype's need a page_size that is a multiple of 16.
        kv_layers: another kv_format for single layers, for example {0: "bf16", -1: "bf16"}; -1 is
            the last layer.
        kv_first_page: another kv_format for the pages that hold position 0 ("bf16", an 8-bit
            format), or None. Attention rests on the first tokens, so errors there cost most. There
            is room for one such page in 16. CPU only.
        kv_center: subtract each head's mean K, as found once by `dendrite-lab calibrate MODEL`,
            before it is quantised.
        kv_budget: bytes for pages, or "auto": 1 GiB on CPU; on CUDA nine tenths of the memory that
            weights and working buffers leave free. Ignored when num_pages is given.
        num_pages: pages in the pool, or None to derive them from kv_budget.
        page_size: tokens per page: a power of two, 1..256.
        attention: "auto", "tree" (the engine's kernels), "reference" (plain torch) or "flashinfer".
        seed: default seed of the sampling generator.
        deterministic: make a branch's logits bitwise independent of what runs beside it.
        debug: fill fresh, freed and tail slots with NaN and checksum full pages.
        prefix_cache: reuse pages of earlier prompts.
        max_batch_tokens: rows of one forward pass at most; None: 512 on CPU, 2048 on CUDA.
        prefill_chunk: prompt tokens of one forward pass at most while other branches decode; None:
            256 on CPU, 1024 on CUDA.
        max_branches: live branches at most.
        max_context: tokens a branch may hold; None takes the model's own limit.
        core: "auto", "native" or "reference": which page-and-tree core to use.
        graph_rows: on CUDA, batches of up to this many rows are padded to a few sizes and run as
            CUDA graphs; 0 turns both off.
        grammar_limits: what the grammars of `Branch.constrain` may cost.
        weights: "safetensors", or "random": seeded numbers of the shapes in config.json, so that
            benchmarks need no weight files.
    """

    device: str = "auto"
    dtype: str = "auto"
    kv_format: str = "auto"
    kv_layers: Mapping[int, str] = field(default_factory=dict)
    kv_first_page: str | None = None
    kv_center: bool = False
    kv_budget: int | str = "auto"
    num_pages: int | None = None
    page_size: int = 16
    attention: str = "auto"
    seed: int = 0
    deterministic: bool = False
    debug: bool = False
    prefix_cache: bool = True
    max_batch_tokens: int | None = None
    prefill_chunk: int | None = None
    max_branches: int = 1_000_000
    max_context: int | None = None
    core: str = "auto"
    graph_rows: int = 256
    grammar_limits: GrammarLimits = field(default_factory=GrammarLimits)
    weights: str = "safetensors"

    def __post_init__(self) -> None:
        for name in ("max_branches", "page_size"):
            _positive(name, getattr(self, name))
        for name in ("num_pages", "max_context", "max_batch_tokens", "prefill_chunk"):
            if getattr(self, name) is not None:
                _positive(name, getattr(self, name))
        if self.page_size > 256 or self.page_size & (self.page_size - 1):
            raise InvalidArgument(
                f"page_size must be a power of two in 1..256, got {self.page_size}"
            )
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise InvalidArgument(f"seed must be an integer, got {self.seed!r}")
        if self.kv_budget != "auto":
            parse_bytes(self.kv_budget)
        if not isinstance(self.graph_rows, int) or isinstance(self.graph_rows, bool):
            raise InvalidArgument(f"graph_rows must be an integer, got {self.graph_rows!r}")
        if self.graph_rows < 0:
            raise InvalidArgument(f"graph_rows must be 0 or more, got {self.graph_rows}")
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise InvalidArgument(
                f"device must be auto, cpu, cuda or cuda:N (cuda-twin for tests); "
                f"got {self.device!r}"
            )
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _check_layers(self.kv_layers)
        if not isinstance(self.grammar_limits, GrammarLimits):
            raise InvalidArgument(
                f"grammar_limits must be GrammarLimits, got {type(self.grammar_limits).__name__}"
            )
        _choice("core", self.core, ("auto", "native", "reference"))
        _choice("weights", self.weights, ("safetensors", "random"))

    def kv_bytes(self, default: int) -> int:
        """Bytes of kv_budget; `default` for "auto"."""
        return default if self.kv_budget == "auto" else parse_bytes(self.kv_budget)


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(f"{name} must be an integer >= 1, got {value!r}")


def _check_layers(layers: object) -> None:
    if not isinstance(layers, Mapping) or not all(
        isinstance(index, int) and not isinstance(index, bool) and isinstance(name, str)
        for index, name in layers.items()
    ):
        raise InvalidArgument(
            f"kv_layers must map layers to formats, as in {{0: 'bf16', -1: 'bf16'}}; got {layers!r}"
        )


def _choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(f"{name} must be one of {', '.join(known)}; got {value!r}")
