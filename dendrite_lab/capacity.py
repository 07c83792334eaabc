"""`dendrite-lab capacity`: how many tokens of a model fit in some memory, for each page format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dendrite_engine.cache.formats import PageShape
from dendrite_engine.cache.formats.choice import choose_format
from dendrite_engine.errors import InvalidArgument, ModelError

# Bits of a weight; those of 4 bits with an fp16 scale for 32 numbers, as GGUF's Q4_0 and Q8_0.
WEIGHT_BITS = {"fp32": 32.0, "bf16": 16.0, "fp8": 8.0, "q8_0": 8.5, "q4_0": 4.5}
FORMATS = (
    "bf16", "fp8_e4m3", "mxfp8", "k8v4", "tq4", "k4v2", "tq3", "tq2",
)  # fmt: skip
PAGE_SIZE = 16
# Shapes that are published with the models, for machines without the files:
# layers, heads, kv heads, head_dim, hidden, intermediate, vocabulary, tied embeddings.
KNOWN = {
    "smollm2-135m": (30, 9, 3, 64, 576, 1536, 49152, True),
    "llama-3.1-8b": (32, 32, 8, 128, 4096, 14336, 128256, False),
    "qwen3-8b": (36, 32, 8, 128, 4096, 12288, 151936, False),
    "qwen3-32b": (64, 64, 8, 128, 5120, 25600, 151936, False),
    "llama-3.1-70b": (80, 64, 8, 128, 8192, 28672, 128256, False),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides about memory.

    Attributes:
        name: of the model.
        layers, heads, kv_heads, head_dim, hidden, intermediate, vocab: as in config.json.
        tied: input and output embeddings are one matrix.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def weights(self) -> int:
        """Numbers in the matrices and norms of a Llama-like decoder; biases are left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * (attention + mlp + 2 * self.hidden) + embeddings + self.hidden

    def page(self) -> PageShape:
        """Sizes of one page."""
        return PageShape(self.layers, 1, self.kv_heads, self.head_dim, PAGE_SIZE)


def read_shape(model: str) -> Shape:
    """The shape of a known model, or of a config.json or the folder that holds one.

    Raises:
        ModelError: it is neither, or its config.json is not of a supported family.
    """
    if model.lower() in KNOWN:
        return Shape(model.lower(), *KNOWN[model.lower()])
    path = Path(model)
    if not path.exists():
        raise ModelError(
            f"{model!r} is neither a known shape ({', '.join(KNOWN)}) nor a config.json"
        )
    from dendrite_engine.models.families import read_model_config

    config = read_model_config(path if path.is_dir() else path.parent)
    return Shape(
        path.name if path.is_dir() else path.parent.name, config.num_layers, config.num_heads,
        config.num_kv_heads, config.head_dim, config.hidden_size, config.intermediate_size,
        config.vocab_size, config.tie_embeddings,
    )  # fmt: skip


def capacity(shape: Shape, memory: int, weights: str = "bf16") -> dict[str, Any]:
    """Tokens that fit, for each format that the model's head_dim allows.

    Args:
        shape: the model.
        memory: bytes, for weights and pages; activations and the system are not counted.
        weights: how weights are stored, a key of WEIGHT_BITS.

    Raises:
        InvalidArgument: unknown weights.
    """
    if weights not in WEIGHT_BITS:
        raise InvalidArgument(f"weights must be one of {', '.join(WEIGHT_BITS)}; got {weights!r}")
    taken = int(shape.weights * WEIGHT_BITS[weights] / 8)
    free = max(memory - taken, 0)
    rows: list[dict[str, Any]] = []
    for name in FORMATS:
        unit = shape.page()
        try:
            page_format = choose_format(name, unit)
        except InvalidArgument as error:
            rows.append({"format": name, "error": str(error)})
            continue
        page_bytes = page_format.bytes_per_page(unit)
        rows.append(
            {
                "format": name,
                "bytes_per_token": page_format.bytes_per_token(unit),
                "ratio": round(page_format.ratio(unit), 2),
                "tokens": free // page_bytes * PAGE_SIZE,
                "gb_at_1e6_tokens": round(page_format.bytes_per_token(unit) * 1e6 / 1e9, 1),
            }
        )
    return {
        "model": shape.name,
        "weights": weights,
        "weights_bytes": taken,
        "parameters": shape.weights,
        "memory_bytes": memory,
        "rows": rows,
    }


def format_text(found: dict[str, Any]) -> str:
    """A capacity as aligned lines."""
    weights = f"{found['weights_bytes'] / 1e9:.1f} GB as {found['weights']}"
    memory = f"{found['memory_bytes'] / 1e9:.1f} GB"
    titles = ("format", "bytes/token", "x smaller", "tokens that fit", "GB for 1e6 tokens")
    widths = (10, 12, 10, 16, 18)
    lines = [
        f"{found['model']}: {found['parameters'] / 1e9:.2f} billion weights, {weights}; {memory}",
        " ".join(title.rjust(width) for title, width in zip(titles, widths, strict=True)),
    ]
    for row in found["rows"]:
        if "error" in row:
            lines.append(f"{row['format']:>10} {row['error']}")
        else:
            lines.append(
                f"{row['format']:>10} {row['bytes_per_token']:>12,} {row['ratio']:>10.2f} "
                f"{row['tokens']:>16,} {row['gb_at_1e6_tokens']:>18,.1f}"
            )
    return "\n".join(lines)
