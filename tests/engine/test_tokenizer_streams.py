"""Streaming text is whole characters only, and adds up to the decoded whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dendrite_engine.errors import InvalidArgument, ModelError
from dendrite_engine.models.tokenizer import Tokenizer

SAMPLES = [
    "plain",
    "naïve café",
    "日本語のテキスト",
    "🙂👩‍👩‍👧‍👦 family",
    "mixed\tspaces\n\n end",
    "0123456789",
    "\u0627 \u0628 \u062a",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:
    return Tokenizer(tiny_model("llama"))


@pytest.mark.parametrize("text", SAMPLES)
def test_streamed_pieces_join_to_the_text_and_are_never_broken(tokenizer, text):
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)] + [stream.finish()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(tokenizer.pieces(tokenizer.encode(text))) == text


@pytest.mark.model
@pytest.mark.parametrize("text", SAMPLES)
def test_the_real_tokenizer_streams_the_same_way(smollm2, text):
    ids = smollm2.tokenizer.encode(text)
    stream = smollm2.tokenizer.stream()
    assert (
        "".join(stream.push(i) for i in ids) + stream.finish()
        == text
        == smollm2.tokenizer.decode(ids)
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_stream_to_what_python_decodes(tokenizer, ids):
    stream = tokenizer.stream()
    text = "".join(stream.push(i) for i in ids) + stream.finish()
    raw = b"".join(tokenizer._bytes.get(i) for i in ids)
    assert text == raw.decode("utf-8", errors="replace")


def test_an_incomplete_character_is_held_back_and_flushed_as_a_replacement(tokenizer):
    first, *_ = tokenizer.encode("é")
    stream = tokenizer.stream()
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"


def test_special_tokens_have_no_streamed_text_but_show_as_pieces(tokenizer):
    end = max(tokenizer.special_ids)
    assert tokenizer.stream().push(end) == ""
    assert tokenizer.piece(end) == "<|end|>"
    assert tokenizer.decode([*tokenizer.encode("a"), end], skip_special=True) == "a"


def test_sentencepiece_style_vocabularies_decode_spaces_and_byte_fallback(tmp_path):
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "▁hi": 1, "▁there": 2, "<0xC3>": 3, "<0xA9>": 4}
    fast = Fast(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    stream = Tokenizer(tmp_path).stream()
    assert [stream.push(i) for i in (1, 3, 4, 2)] == [" hi", "", "é", " there"]


def test_a_directory_without_a_tokenizer_or_with_a_broken_one_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(ModelError, match="can't be read"):
        Tokenizer(tmp_path)


def test_chat_templates_run_in_a_sandbox(tiny_model, tmp_path):
    for file in tiny_model("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    attacks = [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ]
    for template in attacks:
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(InvalidArgument, match="chat template"):
            Tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match="malformed"):
        Tokenizer(tmp_path)


def test_messages_need_role_and_content(tokenizer):
    with pytest.raises(InvalidArgument, match=r"messages\[1\]"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "user"}])
