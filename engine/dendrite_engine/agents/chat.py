"""A chat on a branch: messages are appended to its K/V, never prefilled again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dendrite_engine.agents.template import Message, added_text, closing_text, opening_text
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.tree.branch import Branch


class Chat:
    """A branch and the messages that it holds, in the model's own chat template.

    Attributes:
        branch: holds the rendered messages, nothing more.
        messages: dicts with "role" and "content", oldest first.

    Example:
        >>> shared = Chat.start(engine, [{"role": "system", "content": text}])  # doctest: +SKIP
        >>> a, b = shared.fork(2)                                               # doctest: +SKIP
        >>> append([a, b], "What is it about?")                                 # doctest: +SKIP
        >>> [r.text for r in reply([a, b], SamplingParams(temperature=0.8))]    # doctest: +SKIP
    """

    def __init__(self, branch: Branch, messages: Sequence[Message]) -> None:
        self.branch = branch
        self.messages: list[dict[str, str]] = [dict(message) for message in messages]

    @classmethod
    def start(cls, engine: Engine, messages: Sequence[Message], *, namespace: str = "") -> Chat:
        """A chat on a new root branch, prefilled.

        Raises:
            InvalidArgument: the model has no chat template, or it refuses the messages.
            OutOfPages: the pool can't hold them.
        """
        text = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        branch = engine.prompt(engine.tokenizer.encode(text), namespace=namespace)
        return cls(branch, messages)

    def fork(self, n: int = 1) -> list[Chat]:
        """Make `n` chats that share everything said so far; O(1) each, whatever the length."""
        return [Chat(branch, self.messages) for branch in self.branch.fork(n)]

    def prune(self) -> int:
        """Prune the branch; returns pages freed."""
        return self.branch.prune()

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, {self.branch!r})"


@dataclass(frozen=True)
class Reply:
    """What one chat answered.

    Attributes:
        text: the reply, special tokens left out.
        finish_reason: why it ended, see `Completion`.
        error: what went wrong; the chat is as before the reply then.
    """

    text: str
    finish_reason: str | None
    error: Exception | None = None


def append(chats: Sequence[Chat], content: str | Sequence[str], role: str = "user") -> None:
    """Append the same message, or one each, to several chats: to all of them or to none.

    Args:
        chats: chats of one engine, each at most once.
        content: one text for all, or a text for each.
        role: who speaks: user, system, assistant, ..., as the model's template knows them.

    Raises:
        InvalidArgument: the template refuses the message in one of the chats.
        ContextTooLong, OutOfPages, StaleBranch: one of them can't take it.
    """
    contents = [content] * len(chats) if isinstance(content, str) else list(content)
    if len(contents) != len(chats):
        raise InvalidArgument(f"{len(chats)} chats but {len(contents)} messages")
    if len({id(chat) for chat in chats}) < len(chats):
        raise InvalidArgument("chats: one is listed twice")
    messages = [{"role": role, "content": text} for text in contents]
    ids = [
        _encode(chat, added_text(_tokenizer(chat), chat.messages, message))
        for chat, message in zip(chats, messages, strict=True)
    ]
    _extend(chats, ids)
    for chat, message in zip(chats, messages, strict=True):
        chat.messages.append(message)


def reply(chats: Sequence[Chat], params: SamplingParams | None = None) -> list[Reply]:
    """Let several chats answer at once, all in one batch a step, and append the answers to them.

    Args:
        chats: chats of one engine, each at most once.
        params: how to sample; by default greedily, up to 128 tokens.

    Returns:
        One reply each. A chat that fails alone (no pages, its branch pruned) has `error` set and
        holds what it held before; the others go on.

    Raises:
        InvalidArgument: the template can't be continued, or a chat is listed twice.
        ContextTooLong, OutOfPages, StaleBranch: a chat can't take even the opening of a reply.
    """
    if not chats:
        return []
    params = SamplingParams(max_tokens=128) if params is None else params
    held = [chat.branch.num_tokens for chat in chats]
    closings = [closing_text(_tokenizer(chat), chat.messages) for chat in chats]
    _extend(chats, [_encode(c, opening_text(_tokenizer(c), c.messages)) for c in chats])
    try:
        completions = chats[0].branch.engine.complete([chat.branch for chat in chats], params)
    except BaseException:
        _roll_back(chats, held)
        raise
    replies: list[Reply] = []
    for chat, completion, closing, before in zip(chats, completions, closings, held, strict=True):
        error = completion.error
        if error is None:
            error = _close(chat, completion, closing)
        if error is not None:
            _roll_back([chat], [before])
            replies.append(Reply("", completion.finish_reason, error))
            continue
        chat.messages.append({"role": "assistant", "content": completion.text})
        replies.append(Reply(completion.text, completion.finish_reason))
    return replies


def _close(chat: Chat, completion: Any, closing: str) -> Exception | None:
    """Write what the template writes after a reply, but for the end token that was sampled."""
    tokenizer = _tokenizer(chat)
    if completion.finish_reason == "eos" and completion.token_ids:
        closing = closing.removeprefix(tokenizer.piece(completion.token_ids[-1]))
    try:
        _extend([chat], [_encode(chat, closing)])
    except Exception as error:  # the pool or the context is full: this chat alone failed
        return error
    return None


def _extend(chats: Sequence[Chat], ids: Sequence[list[int]]) -> None:
    """Append tokens to all branches or to none."""
    held = [chat.branch.num_tokens for chat in chats]
    try:
        for chat, tokens in zip(chats, ids, strict=True):
            if tokens:
                chat.branch.extend(tokens)
    except BaseException:
        _roll_back(chats, held)
        raise


def _roll_back(chats: Sequence[Chat], held: Sequence[int]) -> None:
    for chat, before in zip(chats, held, strict=True):
        if chat.branch.is_alive and chat.branch.num_tokens > before:
            chat.branch.rollback(chat.branch.num_tokens - before)


def _tokenizer(chat: Chat) -> Any:
    return chat.branch.engine.tokenizer


def _encode(chat: Chat, text: str) -> list[int]:
    ids: list[int] = _tokenizer(chat).encode(text)
    return ids
