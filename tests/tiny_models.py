"""Random tiny models in Hugging Face layout, made by transformers itself, and a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from wide_models import WIDE, make_wide_model, write_tokenizer

EOS = "<|end|>"
VOCAB = 259

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2560,
    "eos_token_id": VOCAB - 1,
    "bos_token_id": None,
    "initializer_range": 0.25,
}


def config_of(kind: str):
    """The transformers config called `kind`."""
    from transformers import LlamaConfig, MistralConfig, Qwen3Config

    llama3_rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    yarn = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 640,
    }  # fmt: skip
    table = {
        "llama": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=True),
        "llama-bias": lambda: LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
        "llama-llama3-rope": lambda: LlamaConfig(**_COMMON, rope_parameters=llama3_rope),
        "llama-yarn": lambda: LlamaConfig(**_COMMON, rope_parameters=yarn),
        "llama-linear": lambda: LlamaConfig(
            **_COMMON,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        ),
        "mistral": lambda: MistralConfig(**_COMMON, sliding_window=None),
        "mistral-window": lambda: MistralConfig(**_COMMON, sliding_window=37),
        "qwen3": lambda: Qwen3Config(**_COMMON, tie_word_embeddings=True),
        "qwen3-window": lambda: Qwen3Config(
            **_COMMON, use_sliding_window=True, sliding_window=24, max_window_layers=1
        ),
    }
    return table[kind]()


KINDS = (
    "llama", "llama-bias", "llama-llama3-rope", "llama-yarn", "llama-linear",
    "mistral", "mistral-window", "qwen3", "qwen3-window",
)  # fmt: skip


def make_model(kind: str, directory: Path, seed: int = 0) -> Path:
    """Write a random model of this kind to `directory` and return it."""
    if kind.endswith(WIDE):
        return make_wide_model(kind, directory, seed)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(kind)).to(torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):  # defaults of 1 and 0 would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def reference_model(directory: Path):
    """The same model in transformers, fp32, eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
