"""Shapes of published models by name, and the floors of what a step on them can take.

A floor is the larger of two times: the bytes that must move once (weights, and each live K/V token
of the tree once), and the arithmetic, at the rates that one H100 80GB was measured to reach. No
implementation runs much faster; how far above it one runs is what the benchmarks show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dendrite_engine.errors import InvalidArgument

BYTES_PER_S = 3.0e12  # device memory, read and written, of a large copy
FLOP_PER_S = 790e12  # a large bf16 matrix product
ELEMENT = 2  # bytes of bf16, fp16


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder-only model, without weights.

    Attributes:
        name: as `--shape` takes it.
        family: architecture in config.json.
        layers, hidden, inner: blocks, width, width of the feed-forward part.
        heads, kv_heads, head_dim: of attention.
        vocab: tokens.
        tied: the output matrix is the embedding matrix.
        rope_theta: base of the rotary embedding.
        max_context: positions; where the published model has fewer, raised for the benchmarks.
        rope_scaling: as in config.json, or None.
    """

    name: str
    family: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    rope_theta: float
    max_context: int = 49152
    rope_scaling: tuple[tuple[str, Any], ...] | None = None

    def config(self) -> dict[str, Any]:
        """The contents of a Hugging Face config.json."""
        data: dict[str, Any] = {
            "architectures": [self.family],
            "model_type": self.family.removesuffix("ForCausalLM").lower(),
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.max_context,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "bos_token_id": self.vocab - 2,
            "eos_token_id": self.vocab - 1,
        }
        if self.rope_scaling is not None:
            data["rope_scaling"] = dict(self.rope_scaling)
        return data

    @property
    def layer_weights(self) -> int:
        """Weights of all blocks' matrices."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all matrices once; of the embedding, rows."""
        return ELEMENT * (self.layer_weights + self.vocab * self.hidden)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V of one token, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * ELEMENT

    def decode_floor_ms(self, rows: int, unique_tokens: float, context: float) -> float:
        """One step of `rows` branches with `context` tokens each, `unique_tokens` in all."""
        moved = self.weight_bytes + self.kv_bytes * unique_tokens
        flops = rows * (
            2 * (self.layer_weights + self.vocab * self.hidden)
            + 4 * self.layers * self.heads * self.head_dim * context
        )
        return 1e3 * max(moved / BYTES_PER_S, flops / FLOP_PER_S)

    def prefill_floor_ms(self, tokens: int) -> float:
        """A prompt of `tokens`, causal, and one row of logits."""
        moved = self.weight_bytes + self.kv_bytes * tokens
        attention = 2 * self.layers * self.heads * self.head_dim * tokens * tokens
        flops = 2 * self.layer_weights * tokens + attention + 2 * self.vocab * self.hidden
        return 1e3 * max(moved / BYTES_PER_S, flops / FLOP_PER_S)

    def branches_floor_ms(self, branches: int, prefix: int, tokens: int) -> float:
        """`tokens` decode steps of `branches` that share `prefix`: the first token comes from the
        prefix's logits, each further one from a step over one more token a branch.
        """
        return sum(
            self.decode_floor_ms(branches, prefix + branches * step, prefix + step)
            for step in range(1, tokens)
        )


_LLAMA3_ROPE = (
    ("rope_type", "llama3"), ("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0),
    ("original_max_position_embeddings", 8192),
)  # fmt: skip
_LLAMA, _MISTRAL, _QWEN3 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"
_ALL = (
    Shape("tinyllama-1.1b", _LLAMA, 22, 2048, 5632, 32, 4, 64, 32000, False, 1e4),
    Shape("llama-3.1-8b", _LLAMA, 32, 4096, 14336, 32, 8, 128, 128256, False, 5e5, 131072,
          _LLAMA3_ROPE),
    Shape("mistral-7b", _MISTRAL, 32, 4096, 14336, 32, 8, 128, 32768, False, 1e6),
    Shape("qwen3-0.6b", _QWEN3, 28, 1024, 3072, 16, 8, 128, 151936, True, 1e6),
    Shape("smollm2-135m", _LLAMA, 30, 576, 1536, 9, 3, 64, 49152, True, 1e5),
    # Runs anywhere in a second: for trying a benchmark out and for tests.
    Shape("tiny", _LLAMA, 2, 64, 128, 4, 2, 16, 512, True, 1e4),
)  # fmt: skip
SHAPES = {shape.name: shape for shape in _ALL}


def shape_of(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        InvalidArgument: no such shape; the message lists them.
    """
    shape = SHAPES.get(name)
    if shape is None:
        raise InvalidArgument(f"unknown shape {name!r}; known: {', '.join(SHAPES)}")
    return shape


def attention_floor_us(
    rows: int, unique_tokens: int, context_sum: int, heads: int, kv_heads: int, head_dim: int
) -> float:
    """Attention of one layer over a tree: `rows` queries, each K/V token once.

    Args:
        rows: queries.
        unique_tokens: K/V tokens of the tree.
        context_sum: tokens that each query attends to, summed over the queries.
        heads, kv_heads, head_dim: of the layer.
    """
    moved = ELEMENT * head_dim * (2 * kv_heads * unique_tokens + 2 * heads * rows)
    flops = 4 * heads * head_dim * context_sum
    return 1e6 * max(moved / BYTES_PER_S, flops / FLOP_PER_S)
