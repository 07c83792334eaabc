"""What a chat template writes for one more message: the text between two renderings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine.models.tokenizer import Tokenizer

Message = Mapping[str, str]
_PROBE = "x"


def added_text(tokenizer: Tokenizer, messages: Sequence[Message], message: Message) -> str:
    """What the template adds for `message` after `messages`.

    Raises:
        InvalidArgument: the template refuses the message, or writes earlier ones anew because of
            it, so that it can't be appended.
    """
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    after = tokenizer.apply_chat_template([*messages, message], add_generation_prompt=False)
    return _rest(before, after, "a message is appended")


def opening_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """What the template writes before the assistant's reply to `messages`."""
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    after = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return _rest(before, after, "a reply is asked for")


def closing_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """What the template writes after the assistant's reply to `messages`."""
    opened = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    probe = {"role": "assistant", "content": _PROBE}
    whole = tokenizer.apply_chat_template([*messages, probe], add_generation_prompt=False)
    return _rest(opened + _PROBE, whole, "a reply is closed")


def _rest(before: str, after: str, when: str) -> str:
    if not after.startswith(before):
        shared = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        raise InvalidArgument(
            f"the chat template writes earlier messages differently when {when} (from character "
            f"{shared} on), so K/V can't be kept; prompt the whole conversation instead"
        )
    return after[len(before) :]
