"""What users hand to the engine, checked and put into one form; and ways to wait for the answer."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import ContextTooLong, EmptyPrompt, InvalidArgument
from dendrite_engine.jobs import Job
from dendrite_engine.models.tokenizer import Tokenizer
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.speculation.base import Guessing, Speculation
from dendrite_engine.types import Completion, TokenEvent

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
Params = SamplingParams | Sequence[SamplingParams] | None


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Token ids of text, ids, or chat messages.

    Raises:
        EmptyPrompt: it has no tokens.
        InvalidArgument: malformed messages, or a model without a chat template.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt, add_special_tokens=True)
    elif len(prompt) and isinstance(prompt[0], Mapping):
        messages = [item for item in prompt if isinstance(item, Mapping)]
        if len(messages) != len(prompt):
            raise InvalidArgument("a prompt is text, token ids or messages, not a mixture")
        ids = tokenizer.encode(tokenizer.apply_chat_template(messages))
    else:
        ids = as_token_ids(prompt)
    if not ids:
        raise EmptyPrompt("the prompt has no tokens; give it at least one")
    return ids


def as_token_ids(tokens: Sequence[Any]) -> list[int]:
    """`tokens` as a list of integers; InvalidArgument when one is none."""
    try:
        return [int(token) for token in tokens]
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"token ids must be integers: {error}") from error


def check_tokens(
    token_ids: Sequence[int], held: int, vocab_size: int, max_context: int
) -> list[int]:
    """Ids as a list, all inside the vocabulary, and not more than the context can hold.

    Raises:
        EmptyPrompt, InvalidArgument, ContextTooLong: with the numbers.
    """
    ids = as_token_ids(token_ids)
    if not ids:
        raise EmptyPrompt("no tokens given: at least one is needed")
    bad = next((token for token in ids if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise InvalidArgument(f"token id {bad} is outside the vocabulary of {vocab_size}")
    total = held + len(ids)
    if total > max_context:
        raise ContextTooLong(
            f"{len(ids)} tokens on top of {held} make {total}, more than the context of "
            f"{max_context}",
            num_tokens=total,
            max_context=max_context,
        )
    return ids


def check_params(params: Params, count: int, vocab_size: int) -> list[SamplingParams]:
    """One SamplingParams per branch.

    Raises:
        InvalidArgument: their number does not match, or they name ids outside the vocabulary.
    """
    if params is None:
        params = SamplingParams()
    rows = [params] * count if isinstance(params, SamplingParams) else list(params)
    if len(rows) != count:
        raise InvalidArgument(f"{count} branches but {len(rows)} SamplingParams")
    for row in {id(row): row for row in rows}.values():
        if not isinstance(row, SamplingParams):
            raise InvalidArgument(f"params must be SamplingParams, got {type(row).__name__}")
        named = (*(row.logit_bias or ()), *row.stop_token_ids)
        bad = next((token for token in named if token >= vocab_size), None)
        if bad is not None:
            raise InvalidArgument(
                f"token id {bad} in logit_bias or stop_token_ids is outside the vocabulary of "
                f"{vocab_size}"
            )
    return rows


def open_guessing(speculate: Speculation | None, engine: Engine) -> Guessing | None:
    """What a job of `engine` needs to be guessed for; None for None.

    Raises:
        InvalidArgument: `speculate` is something else, or does not fit the engine.
    """
    if speculate is None:
        return None
    if not isinstance(speculate, Speculation):
        raise InvalidArgument(
            f"speculate must be a PromptLookup, DraftModel or another Speculation, got "
            f"{type(speculate).__name__}"
        )
    return speculate.open(engine)


def wait_for(job: Job) -> list[Completion]:
    """The job's result; an interrupt while waiting cancels the job."""
    try:
        return job.result()
    except BaseException:
        job.cancel()
        raise


def drain(job: Job, events: queue.SimpleQueue[TokenEvent | None]) -> Iterator[TokenEvent]:
    """Yield events up to None; leaving early cancels the job."""
    try:
        while (event := events.get()) is not None:
            yield event
        job.result()
    finally:
        job.cancel()
