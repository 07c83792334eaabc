"""A byte-level tokenizer with some merged tokens, as constraint engines want it."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MERGES = (
    "a b", "ab c", "1 2", "y e", "ye s", "n o", "o n", "x x", "xx xx", "0 0", "e s", "c d", "Ġ y",
    "Ġ n", "Ġn o", '{ "', '" :', "t r", "u e", "tr ue",
)  # fmt: skip
END = "<|end|>"


class ToyVocabulary:
    """256 bytes, the merged tokens, one end-of-turn token, and room for three ids without text."""

    def __init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        pairs = [tuple(merge.split(" ")) for merge in MERGES]
        tokens = {char: i for i, char in enumerate(alphabet)}
        for left, right in pairs:
            tokens[left + right] = len(tokens)
        self._fast = Tokenizer(models.BPE(vocab=tokens, merges=pairs))
        self._fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._fast.decoder = decoders.ByteLevel()
        self._fast.add_special_tokens([AddedToken(END, special=True)])
        self.eos_ids = (self._fast.token_to_id(END),)
        self.special_ids = frozenset(self.eos_ids)
        self.size = self._fast.get_vocab_size() + 3
        self._bytes = {id_: self._text(token) for token, id_ in tokens.items()}

    @staticmethod
    def _text(token: str) -> bytes:
        from dendrite_engine.models.tokenizer import _BYTE_OF

        return bytes(_BYTE_OF[char] for char in token)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def to_json(self) -> str:
        return self._fast.to_str()

    def encode(self, text: str) -> list[int]:
        return self._fast.encode(text, add_special_tokens=False).ids

    def text(self, ids) -> bytes:
        return b"".join(map(self.token_bytes, ids))
