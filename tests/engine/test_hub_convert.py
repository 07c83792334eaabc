"""A GGUF file becomes a Hugging Face directory that says the same."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import gguf_files
from dendrite_engine.errors import ModelError
from dendrite_engine.models.gguf_convert import convert_gguf, hugging_face_name

INPUT = torch.tensor([[1, 17, 200, 260, 5, 90, 33, 2, 7]])
STRINGS = (
    "", " ", "the the", "  the  in", "naïve café", "日本語", "🙂👩‍👩‍👧", "12 34", "   7",
    "a\n\n\tb",
    "<|im_start|>the<|im_end|>", "x<|endoftext|>y", "\x00\x7f", "²³", "can't THE",
)  # fmt: skip


def _logits(model):
    with torch.no_grad():
        return model(INPUT).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_converted_weights_give_the_logits_of_the_model_they_came_from(tmp_path, tied, kv_heads):
    model = gguf_files.tiny_llama(tied=tied, kv_heads=kv_heads)
    source = gguf_files.write_gguf(model, tmp_path / "m.gguf")
    convert_gguf(source, tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(_logits(converted), _logits(model), rtol=0, atol=1e-5)
    assert converted.config.tie_word_embeddings is tied
    assert converted.config.rms_norm_eps == 1e-5
    assert converted.generation_config.eos_token_id == 2


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0])
def test_quantised_weights_are_dequantised_to_what_the_file_means(tmp_path, kind):
    model = gguf_files.tiny_llama(tied=True)
    source = gguf_files.write_gguf(model, tmp_path / "m.gguf", kind=kind)
    convert_gguf(source, tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(converted.state_dict()[name], value, rtol=2**-11, atol=1e-7)


def test_progress_counts_every_tensor(tmp_path):
    model = gguf_files.tiny_llama(tied=True)
    seen = []
    source = gguf_files.write_gguf(model, tmp_path / "m.gguf")
    convert_gguf(source, tmp_path, on_tensor=lambda done, total: seen.append((done, total)))
    assert seen == [(index, 20) for index in range(1, 21)]


def test_a_weight_beyond_float16_keeps_its_tensor_in_float32(tmp_path):
    from safetensors.numpy import load_file

    model = gguf_files.tiny_llama(tied=True)
    source = gguf_files.write_gguf(
        model, tmp_path / "m.gguf", scale={"blk.0.attn_norm.weight": 1e6}
    )
    convert_gguf(source, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights["model.layers.0.input_layernorm.weight"].dtype == np.float32
    assert weights["model.layers.1.input_layernorm.weight"].dtype == np.float16
    assert np.isfinite(weights["model.layers.0.input_layernorm.weight"]).all()


@pytest.mark.parametrize("text", STRINGS)
def test_tokenizer_round_trips_and_splits_digits_first(tmp_path, text):
    model = gguf_files.tiny_llama(tied=True)
    convert_gguf(gguf_files.write_gguf(model, tmp_path / "m.gguf"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(
        len(piece) == 1 for piece in pieces if any(c.isascii() and c.isdigit() for c in piece)
    )


def test_spaces_before_a_digit_stay_together_only_in_the_smollm_rule(tmp_path):
    model = gguf_files.tiny_llama(tied=True)
    pieces = {}
    for pre in ("smollm", "gpt-2"):
        convert_gguf(gguf_files.write_gguf(model, tmp_path / "m.gguf", pre=pre), tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        pieces[pre] = tokenizer.convert_ids_to_tokens(tokenizer("  7")["input_ids"])
    assert pieces == {"smollm": ["ĠĠ", "7"], "gpt-2": ["Ġ", "Ġ", "7"]}


def test_special_tokens_and_chat_template_are_kept(tmp_path):
    model = gguf_files.tiny_llama(tied=True)
    convert_gguf(gguf_files.write_gguf(model, tmp_path / "m.gguf"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 128
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert text == "<|im_start|>the<|im_end|>"
    assert tokenizer(text)["input_ids"] == [
        1,
        tokenizer.convert_tokens_to_ids("t"),
        *tokenizer("he")["input_ids"],
        2,
    ]


def test_another_architecture_is_refused_with_the_known_ones(tmp_path):
    model = gguf_files.tiny_llama(tied=True)
    source = gguf_files.write_gguf(model, tmp_path / "m.gguf", architecture="mamba")
    with pytest.raises(ModelError, match=r"'mamba'.*known: llama"):
        convert_gguf(source, tmp_path)


def test_another_pre_tokenizer_is_refused_with_the_known_ones(tmp_path):
    model = gguf_files.tiny_llama(tied=True)
    source = gguf_files.write_gguf(model, tmp_path / "m.gguf", pre="tekken")
    with pytest.raises(ModelError, match=r"'tekken'.*smollm"):
        convert_gguf(source, tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file" * 100, b"GGUF\x03\0\0\0" * 9])
def test_a_broken_file_is_refused(tmp_path, content):
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    with pytest.raises(ModelError, match="can't be read as GGUF"):
        convert_gguf(source, tmp_path)


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.ssm.weight", "rope.weight", "x"])
def test_a_tensor_without_a_place_is_refused(name):
    with pytest.raises(ModelError, match="no place"):
        hugging_face_name(name)
