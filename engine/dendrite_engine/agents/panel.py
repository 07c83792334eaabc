"""A panel: personas that talk with each other over one context, whose K/V they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendrite_engine.agents.chat import Chat, Reply, append, reply
from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Sharing:
    """What sharing saves.

    Attributes:
        pages: pages that the panel's chats hold, each counted once.
        separate: pages that they would hold as separate conversations.
        context_tokens: tokens of the context that all of them share.
    """

    pages: int
    separate: int
    context_tokens: int

    @property
    def saved(self) -> float:
        """Share of the separate pages that is not needed, in [0, 1)."""
        return 1.0 - self.pages / self.separate if self.separate else 0.0


class Panel:
    """Personas as branches below one shared context.

    The context is the system message and is computed once; each persona is a fork of it with its
    own first message. What is shared comes first because K/V depend on all tokens before them: a
    persona's system prompt in front of the context would make the context different for everyone.

    Args:
        engine: an engine with a chat model.
        context: what all of them know: a document, a task, rules.
        personas: instructions by name, such as `{"Ada": "You are a cautious engineer."}`.
        namespace: of the context's prompt.

    Raises:
        InvalidArgument: there is no persona, one is empty, or the model's template can't do it.
        OutOfPages: the pool can't hold them; nothing is left.

    Attributes:
        context: the chat that all forks share; it stays as it is.
        chats: chats by name.
        log: `(name, text)` of everything said, in order.

    Example:
        >>> panel = Panel(engine, report, {"Ada": "You are cautious.", "Bo": "You are bold."})
        ... # doctest: +SKIP
        >>> panel.tell("Should we launch?")                            # doctest: +SKIP
        >>> panel.round(SamplingParams(temperature=0.7))["Ada"].text   # doctest: +SKIP
    """

    def __init__(
        self, engine: Engine, context: str, personas: Mapping[str, str], *, namespace: str = ""
    ) -> None:
        if not personas or not all(name and text for name, text in personas.items()):
            raise InvalidArgument("personas: give at least one name with its instruction")
        self.log: list[tuple[str, str]] = []
        self._waiting: dict[str, list[str]] = {name: [text] for name, text in personas.items()}
        self.context = Chat.start(
            engine, [{"role": "system", "content": context}], namespace=namespace
        )
        try:
            self.chats = dict(zip(personas, self.context.fork(len(personas)), strict=True))
        except BaseException:
            self.context.prune()
            raise

    def tell(self, text: str, *, to: Sequence[str] | None = None) -> None:
        """Say something to all personas, or to some; they hear it before they next speak.

        What a persona hears between two replies becomes one message, since many templates want
        user and assistant to alternate.

        Raises:
            InvalidArgument: a name is unknown.
        """
        for name in self._names(to):
            self._waiting[name].append(text)
        self.log.append(("", text))

    def round(
        self, params: SamplingParams | None = None, speakers: Sequence[str] | None = None
    ) -> dict[str, Reply]:
        """Let personas speak at once, in one batch; then all others hear what each said.

        Args:
            params: how to sample, see `reply`.
            speakers: names; by default everyone.

        Returns:
            Replies by name. One that failed has its `error` set and said nothing.
        """
        names = self._names(speakers)
        hearing = [name for name in names if self._waiting[name]]
        append(
            [self.chats[name] for name in hearing],
            ["\n".join(self._waiting[name]) for name in hearing],
        )
        for name in hearing:
            self._waiting[name] = []
        replies = dict(zip(names, reply([self.chats[n] for n in names], params), strict=True))
        for speaker, said in replies.items():
            if said.error is None:
                self.log.append((speaker, said.text))
                for other in self.chats:
                    if other != speaker:
                        self._waiting[other].append(f"{speaker}: {said.text}")
        return replies

    def sharing(self) -> Sharing:
        """Pages that the personas hold together, and that they would hold apart. O(pages)."""
        branches = [chat.branch for chat in self.chats.values()]
        core = branches[0].engine.core
        _, pages, _ = core.page_tables([branch.handle for branch in branches])
        return Sharing(len(set(pages.tolist())), len(pages), self.context.branch.num_tokens)

    def prune(self) -> int:
        """Prune all chats and the context; returns pages freed."""
        return sum(chat.prune() for chat in [*self.chats.values(), self.context])

    def _names(self, names: Sequence[str] | None) -> list[str]:
        chosen = list(self.chats) if names is None else list(dict.fromkeys(names))
        unknown = [name for name in chosen if name not in self.chats]
        if unknown:
            raise InvalidArgument(
                f"no persona is called {', '.join(unknown)}; they are {', '.join(self.chats)}"
            )
        return chosen
