"""Compares the engine's greedy tokens with Hugging Face transformers, in float32."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    from dendrite_engine import Engine

BATCH = 8  # prompts that the engine decodes together

_TOPICS = (
    "the ocean", "a steam engine", "prime numbers", "the city of Paris", "how bread is baked",
    "why the sky is blue", "a lost cat", "the French Revolution", "sorting a list in Python",
    "photosynthesis",
)  # fmt: skip
_FORMS = (
    "Tell me about {}.",
    "Write a short poem about {}.",
    "{} -- explain it to a child in three sentences, please!",
    "Schreibe einen Satz über {}. 🙂",
    "List 5 facts about {}:\n1.",
)
PROMPTS = tuple(form.format(topic) for topic in _TOPICS for form in _FORMS)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt.

    Attributes:
        prompt: the user's message.
        num_prompt_tokens: with the chat template.
        expected: greedy tokens of Hugging Face, without the end token.
        actual: greedy tokens of the engine, without the end token.
        gap: at the first difference, how far Hugging Face's best logit lies above the one of the
            engine's token (0.0 where they agree).
    """

    prompt: str
    num_prompt_tokens: int
    expected: tuple[int, ...]
    actual: tuple[int, ...]
    gap: float = 0.0

    @property
    def first_difference(self) -> int | None:
        """Index of the first new token that differs, or None."""
        for index, (left, right) in enumerate(zip(self.expected, self.actual, strict=False)):
            if left != right:
                return index
        shorter, longer = sorted((len(self.expected), len(self.actual)))
        return None if shorter == longer else shorter


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of a comparison, and the model they are about."""

    model: str
    tokens: int
    rows: tuple[Row, ...]

    @property
    def mismatches(self) -> int:
        """How many prompts differ."""
        return sum(row.first_difference is not None for row in self.rows)


def compare(model: str, *, prompts: int = 50, tokens: int = 64, progress: bool = True) -> Report:
    """Decode prompts greedily with the engine and with Hugging Face and compare the tokens.

    Args:
        model: built-in name, directory or hub id.
        prompts: how many of the built-in prompts (1..50).
        tokens: new tokens of each prompt at most.
        progress: show bars on stderr.

    Raises:
        InvalidArgument: a count is out of range.
        DendriteError: the model can't be used.
    """
    if not 1 <= prompts <= len(PROMPTS):
        raise InvalidArgument(f"prompts must be 1..{len(PROMPTS)}, got {prompts}")
    if tokens < 1:
        raise InvalidArgument(f"tokens must be at least 1, got {tokens}")
    from dendrite_engine import Engine

    engine = Engine.from_pretrained(model)
    try:
        ids = [_encode(engine, prompt) for prompt in PROMPTS[:prompts]]
        actual = _engine_tokens(engine, ids, tokens, progress)
        path, ends = engine.model_path, set(engine.model_config.eos_token_ids)
    finally:
        engine.close()
    rows = _hugging_face_rows(path, ends, ids, actual, tokens, progress)
    return Report(str(model), tokens, tuple(rows))


def format_report(report: Report) -> str:
    """Return a table with one line a prompt, and a summary line."""
    lines = [f"{'prompt':<48} {'tokens':>6} {'new':>4}  result"]
    for row in report.rows:
        title = row.prompt.replace("\n", " ")[:46]
        where = row.first_difference
        result = "same" if where is None else f"DIFFERS at {where} (logit gap {row.gap:.2g})"
        lines.append(f"{title:<48} {row.num_prompt_tokens:>6} {len(row.expected):>4}  {result}")
    same = len(report.rows) - report.mismatches
    lines.append(
        f"{report.model}: {same} of {len(report.rows)} prompts identical to Hugging Face, "
        f"up to {report.tokens} greedy tokens each, float32"
    )
    return "\n".join(lines)


def _encode(engine: Engine, prompt: str) -> list[int]:
    try:
        text = engine.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    except InvalidArgument:  # no template: a base model
        text = prompt
    return engine.tokenizer.encode(text)


def _engine_tokens(
    engine: Engine, prompts: list[list[int]], tokens: int, progress: bool
) -> list[tuple[int, ...]]:
    from dendrite_engine import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    found: list[tuple[int, ...]] = []
    for start in _bar(range(0, len(prompts), BATCH), "dendrite", progress):
        branches = [engine.prompt(ids) for ids in prompts[start : start + BATCH]]
        for completion in engine.complete(branches, params):
            if completion.error is not None:
                raise completion.error
            found.append(_without_end(completion.token_ids, set(engine.model_config.eos_token_ids)))
        engine.prune_all()
    return found


def _hugging_face_rows(
    path: Path,
    ends: set[int],
    prompts: list[list[int]],
    actual: list[tuple[int, ...]],
    tokens: int,
    progress: bool,
) -> list[Row]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    rows = []
    pairs = list(zip(prompts, actual, PROMPTS, strict=False))
    for ids, ours, prompt in _bar(pairs, "transformers", progress):
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            output = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=min(ends, default=0),
            )
        expected = _without_end(output.sequences[0, len(ids) :].tolist(), ends)
        row = Row(prompt, len(ids), expected, ours)
        rows.append(_with_gap(row, output.logits))
    return rows


def _with_gap(row: Row, logits: Any) -> Row:
    where = row.first_difference
    if where is None or where >= min(len(row.actual), len(logits)):
        return row
    step = logits[where][0]
    gap = float(step.max() - step[row.actual[where]])
    return Row(row.prompt, row.num_prompt_tokens, row.expected, row.actual, gap)


def _without_end(ids: list[int], ends: set[int]) -> tuple[int, ...]:
    return tuple(ids[:-1] if ids and ids[-1] in ends else ids)


def _bar(values: Any, title: str, enabled: bool) -> Any:
    from tqdm import tqdm

    return tqdm(values, desc=title, unit="batch", disable=not enabled, file=sys.stderr)
