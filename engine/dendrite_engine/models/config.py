"""What the engine needs to know about a model, read from a Hugging Face config.json."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dendrite_engine.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and arithmetic of a decoder-only transformer with RoPE, RMSNorm and SwiGLU.

    Attributes:
        architecture: name from config.json, a key of the family registry.
        vocab_size, hidden_size, intermediate_size, num_layers: as usual.
        num_heads, num_kv_heads, head_dim: query heads share K/V heads in groups (GQA).
        rms_eps: epsilon of every RMSNorm.
        rope: the rope parameters (`rope_type`, `rope_theta`, and what the type needs).
        max_context: positions the model was made for.
        tie_embeddings: whether the output matrix is the embedding matrix.
        attention_bias, mlp_bias: whether the projections have biases.
        qk_norm: RMSNorm over head_dim on q and k before RoPE (Qwen3).
        windows: per layer, the sliding window in tokens, or 0 for full attention.
        eos_token_ids: ids that end a turn.
        bos_token_id: id put before a plain prompt by some tokenizers, or None.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope: dict[str, Any]
    max_context: int
    tie_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """Factor on q.k before softmax: 1 / sqrt(head_dim)."""
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def num_parameters(self) -> int:
        """Weights of the model, norms included."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        norms = self.hidden_size * (2 * self.num_layers + 1)
        return self.num_layers * (attention + mlp) + embeddings + norms


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object file of a model directory; ModelError when missing or malformed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}; a model directory needs one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def base_config(data: dict[str, Any], architecture: str, **overrides: Any) -> ModelConfig:
    """The fields that Llama, Mistral and Qwen3 share; `overrides` are a family's own."""
    try:
        hidden, heads = int(data["hidden_size"]), int(data["num_attention_heads"])
        values: dict[str, Any] = {
            "architecture": architecture,
            "vocab_size": int(data["vocab_size"]),
            "hidden_size": hidden,
            "intermediate_size": int(data["intermediate_size"]),
            "num_layers": int(data["num_hidden_layers"]),
            "num_heads": heads,
            "num_kv_heads": int(data.get("num_key_value_heads") or heads),
            "head_dim": int(data.get("head_dim") or hidden // heads),
            "rms_eps": float(data.get("rms_norm_eps", 1e-6)),
            "rope": _rope_parameters(data),
            "max_context": int(data.get("max_position_embeddings", 2048)),
            "tie_embeddings": bool(data.get("tie_word_embeddings", False)),
            "eos_token_ids": _ids(data.get("eos_token_id")),
            "bos_token_id": data.get("bos_token_id"),
        }
    except KeyError as error:
        raise ModelError(f"config.json of {architecture} lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"config.json of {architecture} has a malformed field: {error}") from error
    values.update(overrides)
    _refuse_unsupported(data, values)
    return ModelConfig(**values)


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)


def _rope_parameters(data: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` + `rope_scaling` of earlier releases."""
    if data.get("rope_parameters"):
        rope = dict(data["rope_parameters"])
    else:
        rope = dict(data.get("rope_scaling") or {})
    rope.setdefault("rope_theta", float(data.get("rope_theta") or 10000.0))
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    return rope


def _refuse_unsupported(data: dict[str, Any], values: dict[str, Any]) -> None:
    """Stop before wrong numbers come out: say what this model wants that is not implemented."""
    activation = data.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"hidden_act {activation!r} is not supported, only 'silu'")
    partial = data.get("partial_rotary_factor", values["rope"].get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise ModelError(f"partial_rotary_factor {partial} is not supported, only 1.0")
    if values["num_heads"] % values["num_kv_heads"]:
        raise ModelError(
            f"num_attention_heads {values['num_heads']} must be a multiple of "
            f"num_key_value_heads {values['num_kv_heads']}"
        )
    if values["head_dim"] % 8:
        raise ModelError(f"head_dim must be a multiple of 8, got {values['head_dim']}")
    if data.get("quantization_config"):
        raise ModelError("quantised weights (quantization_config) are not supported")
