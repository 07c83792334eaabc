"""What `dendrite-lab generate` does: continue a prompt on the terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine import Branch, Engine, SamplingParams

BRANCH_TEMPERATURE = 0.8


def generate(
    model: str,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    branches: int = 1,
    raw: bool = False,
    out: TextIO | None = None,
) -> int:
    """Continue a prompt and print the text; one branch streams, several are printed as they end.

    Args:
        model: built-in name, directory or hub id.
        prompt: the user's message; with `raw`, or for a model without a chat template, the text to
            continue.
        max_tokens: new tokens of each branch at most.
        temperature: None is greedy for one branch and 0.8 for several.
        top_p: nucleus size, in (0, 1].
        seed: of the sampling generator.
        branches: how many continuations to make, all in one batch.
        raw: leave the chat template out.
        out: stdout by default.

    Returns:
        The exit code: 0.

    Raises:
        DendriteError: a bad argument, model or prompt.
    """
    if branches < 1:
        raise InvalidArgument(f"branches must be at least 1, got {branches}")
    from dendrite_engine import Engine, SamplingParams

    if temperature is None:
        temperature = 0.0 if branches == 1 else BRANCH_TEMPERATURE
    params = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    sink = sys.stdout if out is None else out
    engine = Engine.from_pretrained(model, seed=seed)
    try:
        root = _prompt(engine, prompt, raw)
        if branches == 1:
            _stream(engine, root, params, sink)
        else:
            _print_branches(engine, root.fork(branches), params, sink)
    finally:
        engine.close()
    return 0


def _prompt(engine: Engine, prompt: str, raw: bool) -> Branch:
    if raw or not prompt:
        return engine.prompt(prompt)
    messages = [{"role": "user", "content": prompt}]
    try:
        engine.tokenizer.apply_chat_template(messages)
    except InvalidArgument:  # no template: a base model, which continues text
        return engine.prompt(prompt)
    return engine.prompt(messages)


def _stream(engine: Engine, branch: Branch, params: SamplingParams, sink: TextIO) -> None:
    for event in engine.generate([branch], params):
        sink.write(event.text)
        sink.flush()
        if event.error is not None:
            raise event.error
    sink.write("\n")


def _print_branches(
    engine: Engine, branches: list[Branch], params: SamplingParams, sink: TextIO
) -> None:
    texts = dict.fromkeys((branch.id for branch in branches), "")
    for event in engine.generate(branches, params):
        texts[event.branch.id] += event.text
        if event.finish_reason is None:
            continue
        logprob = event.branch.cum_logprob
        sink.write(f"--- branch {event.branch.id} ({event.finish_reason}, logprob {logprob:.2f})\n")
        sink.write(f"{texts[event.branch.id].strip()}\n")
        sink.flush()
    stats = engine.stats()
    sink.write(
        f"--- {len(branches)} branches on {stats.pages_live} pages, {stats.pages_shared} of them "
        f"shared\n"
    )
