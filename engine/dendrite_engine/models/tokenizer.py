"""Text to token ids and back, with token-by-token decoding that never shows broken UTF-8."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from dendrite_engine.errors import InvalidArgument, ModelError
from dendrite_engine.models.config import read_json

_MAX_TEMPLATE_OUTPUT = 4_000_000


class Tokenizer:
    """A model's tokenizer.json, plus its chat template run in a sandbox.

    Attributes:
        vocab_size: ids known to the tokenizer.
        special_ids: ids of special tokens such as the end of a turn.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        path = directory / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{directory} has no tokenizer.json; a fast tokenizer is needed")
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"{path} can't be read: {error}") from error
        added = self._fast.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size: int = self._fast.get_vocab_size(with_added_tokens=True)
        self._bytes = _TokenBytes(self._fast, {i: token.content for i, token in added.items()})
        self._template = _chat_template(directory)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every id and its token: equal where ids mean the same text. O(vocab), once."""
        vocab = self._fast.get_vocab(with_added_tokens=True)
        pairs = sorted((token_id, token) for token, token_id in vocab.items())
        return sha256(json.dumps(pairs).encode()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; `add_special_tokens` adds what the model wants around a prompt."""
        if not isinstance(text, str):
            raise InvalidArgument(f"text must be a string, got {type(text).__name__}")
        ids: list[int] = self._fast.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of token ids; bytes that are no valid UTF-8 become U+FFFD."""
        if skip_special:
            ids = [i for i in ids if i not in self.special_ids]
        text: str = self._fast.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def piece(self, token_id: int) -> str:
        """One token as text on its own."""
        return self._bytes.get(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for; b"" for an id outside the vocabulary."""
        return self._bytes.get(token_id)

    def to_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json."""
        text: str = self._fast.to_str()
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per token that join to the whole: a character that spans several tokens is shown
        at the token that completes it, the tokens before it are empty.
        """
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        out = [decoder.decode(self._bytes.get(int(i))) for i in ids]
        if out:
            out[-1] += decoder.decode(b"", final=True)
        return out

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of chat messages: dicts with "role" and "content".

        Raises:
            InvalidArgument: a malformed message, or a model without a chat template.
        """
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise InvalidArgument(f'messages[{index}] must be a dict with "role" and "content"')
        if self._template is None:
            raise InvalidArgument("this model has no chat template; pass text instead of messages")
        return self._template.render(messages, add_generation_prompt)

    def stream(self) -> StreamDecoder:
        """A decoder for one branch's tokens as they come."""
        return StreamDecoder(self._bytes, self.special_ids)


class StreamDecoder:
    """Turns tokens into text one at a time; an incomplete character is held back until complete."""

    __slots__ = ("_bytes", "_decoder", "_special")

    def __init__(self, token_bytes: _TokenBytes, special: frozenset[int]) -> None:
        self._bytes, self._special = token_bytes, special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def copy(self) -> StreamDecoder:
        """A decoder in the same state."""
        other = StreamDecoder(self._bytes, self._special)
        other._decoder.setstate(self._decoder.getstate())
        return other

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; special tokens give none."""
        if token_id in self._special:
            return ""
        return self._decoder.decode(self._bytes.get(token_id))

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for an incomplete character, else ''."""
        return self._decoder.decode(b"", final=True)


class _TokenBytes:
    """The bytes each token stands for, for byte-level BPE and for sentencepiece with byte
    fallback.
    """

    def __init__(self, fast: Any, added: Mapping[int, str]) -> None:
        self._fast, self._added = fast, added
        self._byte_level = _is_byte_level(fast)
        self._cache: dict[int, bytes] = {}

    def get(self, token_id: int) -> bytes:
        """Bytes of a token; b'' for an id outside the vocabulary."""
        cached = self._cache.get(token_id)
        if cached is None:
            cached = self._cache[token_id] = self._compute(token_id)
        return cached

    def _compute(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._fast.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(_BYTE_OF.get(char, ord("?")) for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode()


def _is_byte_level(fast: Any) -> bool:
    decoder = json.loads(fast.to_str()).get("decoder") or {}
    kinds = [decoder.get("type"), *(d.get("type") for d in decoder.get("decoders", []))]
    return "ByteLevel" in kinds


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019), inverted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {chr(byte): byte for byte in printable}
    chars.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return chars


_BYTE_OF = _byte_alphabet()


class _ChatTemplate:
    """A Jinja template from the model directory, in jinja2's immutable sandbox."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_template_error
        self._variables = variables
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the model's chat template is malformed: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            ):
                parts.append(part)
                size += len(part)
                if size > _MAX_TEMPLATE_OUTPUT:
                    raise InvalidArgument(
                        f"the chat template made more than {_MAX_TEMPLATE_OUTPUT} characters"
                    )
        except InvalidArgument:
            raise
        except Exception as error:  # the template is someone else's code
            raise InvalidArgument(f"the chat template refused these messages: {error}") from error
        return "".join(parts)


def _raise_template_error(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _chat_template(directory: Path) -> _ChatTemplate | None:
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    file = directory / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):  # several named templates: take the default one
        named = {item.get("name"): item.get("template") for item in source}
        source = named.get("default")
    if not source:
        return None
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        tokens[name] = value.get("content", "") if isinstance(value, dict) else (value or "")
    return _ChatTemplate(str(source), tokens)
