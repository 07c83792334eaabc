"""Random tiny models with heads of 64, the smallest that the GPU's kernels take; made without
transformers, which a machine with a GPU may lack.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

WIDE = "-wide"  # suffix of a kind
EOS = "<|end|>"
VOCAB = 259

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2560,
    "eos_token_id": VOCAB - 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama-bias": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": None},
    "mistral-window": {"architectures": ["MistralForCausalLM"], "sliding_window": 37},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
    "qwen3-window": {
        "architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 24,
        "max_window_layers": 1,
    },
    **{
        f"llama-of-{layers}": {
            "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers,
        }
        for layers in (1, 2, 9)
    },
}  # fmt: skip


class _Recorder:
    """A source of random weights that remembers what was asked of it."""

    def __init__(self, tied: bool, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._tied = tied
        self._generator = torch.Generator().manual_seed(seed)

    def __contains__(self, name: str) -> bool:
        return name != "lm_head.weight" or not self._tied

    def get(self, name: str, *shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator)
        if name.endswith("norm.weight"):  # 1 and 0 would hide mistakes
            values = 1 + 0.2 * values
        else:
            values *= 0.2 if name.endswith("bias") else 0.25
        self.tensors[name] = values
        return values


def wide_config(kind: str) -> dict[str, Any]:
    """The config.json of a wide kind."""
    return {**_COMMON, **_KINDS[kind.removesuffix(WIDE)]}


def make_wide_model(kind: str, directory: Path, seed: int = 0) -> Path:
    """Write a random model of this kind to `directory` and return it."""
    from safetensors.torch import save_file

    from dendrite_engine.models.families import read_model_config
    from dendrite_engine.models.transformer import Transformer

    (directory / "config.json").write_text(json.dumps(wide_config(kind)))
    config = read_model_config(directory)
    source = _Recorder(config.tie_embeddings, seed)
    Transformer(config, source, lambda weight, bias=None: None)
    save_file(source.tensors, directory / "model.safetensors")
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
