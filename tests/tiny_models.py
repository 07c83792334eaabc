"""Random tiny models in Hugging Face layout, made by transformers itself, and a byte tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

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


WIDE = "-wide"  # suffix of a kind: heads of 64, the smallest that the GPU's kernels take
_WIDE = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 64}


def config_of(kind: str):
    """The transformers config called `kind`."""
    config = _config_of(kind.removesuffix(WIDE))
    if kind.endswith(WIDE):
        config.update(_WIDE)
    return config


def _config_of(kind: str):
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


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer: ids 0..255 are the bytes, then three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|user|>", "<|assistant|>", EOS)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}" + EOS + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": EOS})
    )


def reference_model(directory: Path):
    """The same model in transformers, fp32, eager attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
