"""Model families: architecture name in config.json -> how to read its config.

To add a family that shares the Llama block, write its `read_config` and one registry line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dendrite_engine.errors import ModelError
from dendrite_engine.models.config import ModelConfig, base_config, read_json
from dendrite_engine.registry import Registry

FAMILIES: Registry[Callable[[dict[str, Any]], ModelConfig]] = Registry(
    "model architecture",
    {
        "LlamaForCausalLM": "dendrite_engine.models.families:llama",
        "MistralForCausalLM": "dendrite_engine.models.families:mistral",
        "Qwen3ForCausalLM": "dendrite_engine.models.families:qwen3",
    },
)


def llama(data: dict[str, Any]) -> ModelConfig:
    """Llama 2/3 and everything published in its format (SmolLM2, TinyLlama)."""
    layers = int(data.get("num_hidden_layers", 0))
    return base_config(
        data,
        "LlamaForCausalLM",
        attention_bias=bool(data.get("attention_bias", False)),
        mlp_bias=bool(data.get("mlp_bias", False)),
        windows=(0,) * layers,
    )


def mistral(data: dict[str, Any]) -> ModelConfig:
    """Mistral: one sliding window for every layer, or none."""
    window = int(data.get("sliding_window") or 0)
    layers = int(data.get("num_hidden_layers", 0))
    return base_config(data, "MistralForCausalLM", windows=(window,) * layers)


def qwen3(data: dict[str, Any]) -> ModelConfig:
    """Qwen3: RMSNorm on q and k per head; optionally a sliding window on some layers."""
    layers = int(data.get("num_hidden_layers", 0))
    return base_config(
        data,
        "Qwen3ForCausalLM",
        head_dim=int(data.get("head_dim") or 128),
        attention_bias=bool(data.get("attention_bias", False)),
        qk_norm=True,
        windows=_qwen3_windows(data, layers),
    )


def _qwen3_windows(data: dict[str, Any], layers: int) -> tuple[int, ...]:
    window = int(data.get("sliding_window") or 0) if data.get("use_sliding_window") else 0
    if not window:
        return (0,) * layers
    kinds = data.get("layer_types")
    if kinds is None:
        first = int(data.get("max_window_layers", 28))
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def read_model_config(directory: Path) -> ModelConfig:
    """ModelConfig of a Hugging Face model directory.

    Raises:
        ModelError: config.json is missing or malformed, or its architecture is unknown; the message
            lists the known ones. Code in the directory (`auto_map`) is never run.
    """
    data = read_json(directory / "config.json")
    names = data.get("architectures") or []
    known = [name for name in names if name in FAMILIES]
    if not known:
        raise ModelError(
            f"architecture {names or 'missing'} in {directory / 'config.json'} is not supported; "
            f"known: {', '.join(FAMILIES.names())}. Remote code is never run."
        )
    config = FAMILIES.get(known[0])(data)
    return _with_generation_eos(config, directory)


def _with_generation_eos(config: ModelConfig, directory: Path) -> ModelConfig:
    """generation_config.json may name more end-of-turn ids than config.json."""
    path = directory / "generation_config.json"
    if not path.exists():
        return config
    eos = read_json(path).get("eos_token_id")
    if eos is None:
        return config
    ids = tuple(eos) if isinstance(eos, list) else (int(eos),)
    return dataclasses.replace(config, eos_token_ids=ids)
