"""Weights of the blocks that Llama, Mistral and Qwen3 share, fused as they are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from dendrite_engine.models.config import ModelConfig
from dendrite_engine.models.weights import WeightSource

L = TypeVar("L")
MakeLinear = Callable[[torch.Tensor, "torch.Tensor | None"], L]


@dataclass(slots=True)
class Layer(Generic[L]):
    """Weights of one block; q, k, v and gate, up are fused into one matrix each."""

    input_norm: torch.Tensor  # [hidden]
    qkv: L  # hidden -> (heads + 2 kv_heads) * head_dim
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    out: L  # heads * head_dim -> hidden
    post_norm: torch.Tensor  # [hidden]
    gate_up: L  # hidden -> 2 * intermediate
    down: L  # intermediate -> hidden
    window: int


def load_layers(config: ModelConfig, source: WeightSource, linear: MakeLinear[L]) -> list[Layer[L]]:
    """Read all blocks.

    Raises:
        ModelError: a tensor is missing or has another shape than config.json implies.
    """
    return [_load_layer(config, source, linear, index) for index in range(config.num_layers)]


def output_matrix(
    config: ModelConfig, source: WeightSource, embedding: torch.Tensor
) -> torch.Tensor:
    """The matrix [vocab, hidden] that makes logits; the embedding where the two are tied."""
    if config.tie_embeddings or "lm_head.weight" not in source:
        return embedding
    return source.get("lm_head.weight", config.vocab_size, config.hidden_size)


def _load_layer(
    config: ModelConfig, source: WeightSource, linear: MakeLinear[L], index: int
) -> Layer[L]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_out, kv_out = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    prefix = f"model.layers.{index}."

    def fused(names: list[tuple[str, int]], inputs: int, bias: bool) -> L:
        weight = _joined([source.get(f"{prefix}{n}.weight", out, inputs) for n, out in names])
        if not bias:
            return linear(weight, None)
        return linear(weight, _joined([source.get(f"{prefix}{n}.bias", out) for n, out in names]))

    def head_norm(name: str) -> torch.Tensor | None:
        if not config.qk_norm:
            return None
        return source.get(f"{prefix}self_attn.{name}.weight", config.head_dim)

    qkv = [(f"self_attn.{n}_proj", q_out if n == "q" else kv_out) for n in "qkv"]
    return Layer(
        input_norm=source.get(f"{prefix}input_layernorm.weight", hidden),
        qkv=fused(qkv, hidden, config.attention_bias),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        out=fused([("self_attn.o_proj", hidden)], q_out, config.attention_bias),
        post_norm=source.get(f"{prefix}post_attention_layernorm.weight", hidden),
        gate_up=fused([("mlp.gate_proj", inner), ("mlp.up_proj", inner)], hidden, config.mlp_bias),
        down=fused([("mlp.down_proj", hidden)], inner, config.mlp_bias),
        window=config.windows[index] if config.windows else 0,
    )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]
