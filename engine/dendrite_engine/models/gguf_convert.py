"""Turns a GGUF file of the llama architecture into a Hugging Face directory.

The weights are dequantised by the `gguf` package and stored as **float16** safetensors. A Q4_1
value is `d * q + m` with float16 `d` and `m`, which needs more bits than either half format has, so
the storage type was chosen by measurement against the float32 values that transformers makes of the
same file (SmolLM2-135M-Instruct Q4_1; 8 chat prompts, 48 greedy tokens each, float32 compute):

| stored as | file    | relative weight error | largest logit difference | same greedy text |
|-----------|---------|-----------------------|--------------------------|------------------|
| float32   | 538 MB  | 0                     | 0                        | 8 of 8           |
| float16   | 269 MB  | 1.9e-4                | 0.05                     | 8 of 8           |
| bfloat16  | 269 MB  | 1.4e-3                | 0.28                     | 6 of 8           |

bfloat16 changes what the model says; float16 does not, and costs half of float32. A tensor with a
value outside float16's range stays float32.

Layout source: `convert_hf_to_gguf.py` of llama.cpp, which this undoes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dendrite_engine.errors import ModelError
from dendrite_engine.models.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from gguf import GGUFReader, ReaderTensor

KNOWN_ARCHITECTURES = ("llama",)
CONVERTED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
FLOAT16_MAX = float(np.finfo(np.float16).max)

_TOP_LEVEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(
    source: Path, target: Path, *, on_tensor: Callable[[int, int], None] | None = None
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer of a GGUF file into `target`.

    Args:
        source: the GGUF file.
        target: an existing directory; files of the same names are overwritten.
        on_tensor: called with (tensors done, tensors in all) after each tensor.

    Raises:
        ModelError: the file is no GGUF, has another architecture, or holds a tensor or rotary
            scaling that the conversion does not know.

    O(parameters) time; holds the converted weights in memory once.
    """
    reader = _open(source)
    config = llama_config(reader)
    weights = _convert_tensors(reader, config, on_tensor)
    _save_weights(weights, target / "model.safetensors")
    _write_json(target / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(target / "generation_config.json", {"_from_model_config": True, **ids})
    write_tokenizer(reader, target, max_length=config["max_position_embeddings"])


def llama_config(reader: GGUFReader) -> dict[str, Any]:
    """Return the Hugging Face `config.json` of a llama GGUF, from its metadata."""
    architecture = field(reader, "general.architecture")
    if architecture not in KNOWN_ARCHITECTURES:
        known = ", ".join(KNOWN_ARCHITECTURES)
        raise ModelError(
            f"GGUF architecture {architecture!r} can't be converted (known: {known}); "
            "give a Hugging Face directory with safetensors instead"
        )
    if field(reader, "llama.rope.scaling.type", "none") != "none":
        raise ModelError("this GGUF scales its rotary embedding, which can't be converted")
    heads = int(field(reader, "llama.attention.head_count"))
    hidden = int(field(reader, "llama.embedding_length"))
    names = {tensor.name for tensor in reader.tensors}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
        "hidden_size": hidden,
        "intermediate_size": int(field(reader, "llama.feed_forward_length")),
        "num_hidden_layers": int(field(reader, "llama.block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(field(reader, "llama.attention.head_count_kv", heads)),
        "head_dim": int(field(reader, "llama.attention.key_length", hidden // heads)),
        "max_position_embeddings": int(field(reader, "llama.context_length")),
        "rms_norm_eps": _shortest(field(reader, "llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(field(reader, "llama.rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in names,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id", None),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id", None),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id", None),
    }


_REQUIRED = object()


def field(reader: GGUFReader, key: str, default: Any = _REQUIRED) -> Any:
    """Return a metadata value of a GGUF file, or the default.

    Raises:
        ModelError: the key is missing and there is no default.
    """
    entry = reader.fields.get(key)
    if entry is not None:
        return entry.contents()
    if default is _REQUIRED:
        raise ModelError(f"the GGUF file has no {key!r}")
    return default


def hugging_face_name(name: str) -> str:
    """Return the Hugging Face name of a llama tensor, e.g. `blk.0.attn_q.weight`."""
    stem, _, kind = name.rpartition(".")
    if kind == "weight" and stem in _TOP_LEVEL_NAMES:
        return f"{_TOP_LEVEL_NAMES[stem]}.weight"
    parts = stem.split(".")
    if kind == "weight" and len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    raise ModelError(f"the GGUF file has a tensor {name!r} that a llama model has no place for")


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of a query or key projection.

    llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head, so inside each head
    the rows go from [half, 2] order back to [2, half].

    Args:
        weight: [heads * head_dim, hidden].
        heads: query heads for `attn_q`, key/value heads for `attn_k`.
    """
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def _open(source: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"{source} can't be read as GGUF: {error}") from error


def _convert_tensors(
    reader: GGUFReader,
    config: dict[str, Any],
    on_tensor: Callable[[int, int], None] | None,
) -> dict[str, np.ndarray]:
    weights: dict[str, np.ndarray] = {}
    for done, tensor in enumerate(reader.tensors, start=1):
        if tensor.name != "rope_freqs.weight":  # a table that Hugging Face computes
            weights[hugging_face_name(tensor.name)] = _convert_tensor(tensor, config)
        if on_tensor is not None:
            on_tensor(done, len(reader.tensors))
    return weights


def _convert_tensor(tensor: ReaderTensor, config: dict[str, Any]) -> np.ndarray:
    from gguf.quants import dequantize

    value = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
    if tensor.name.endswith("attn_q.weight"):
        value = unpermute(value, config["num_attention_heads"])
    elif tensor.name.endswith("attn_k.weight"):
        value = unpermute(value, config["num_key_value_heads"])
    if float(np.abs(value).max(initial=0.0)) > FLOAT16_MAX:
        return np.ascontiguousarray(value)
    return np.ascontiguousarray(value, dtype=np.float16)


def _save_weights(weights: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(weights, path, metadata={"format": "pt"})  # transformers refuses files without it
    path.chmod(0o644)  # safetensors makes it readable by its owner only


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shortest(value: float) -> float:
    """Return the shortest decimal that rounds to this float32 (1e-05, not 9.9999997e-06)."""
    return float(str(np.float32(value)))
