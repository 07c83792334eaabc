"""Needle retrieval and greedy divergence, both by teacher forcing along the reference's answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dendrite_engine.scoring import Scorer
from dendrite_lab.quality.text import windows

CHUNK = 256
_NEEDLE = " The secret code of the lighthouse is {code}. Remember it.\n"
_QUESTION = "\nWhat is the secret code of the lighthouse? The secret code of the lighthouse is"
_OPENINGS = (
    "The lighthouse keeper wrote every evening", "A list is a mutable sequence; it",
    "Once upon a time there was a fisherman who", "The three most important laws of physics are",
    "To bake bread one needs", "In 1912 a ship left the harbour of", "The function below sorts",
    "Trees are useful because",
)  # fmt: skip

Encode = Callable[[str], list[int]]


def feed_all(scorer: Scorer, ids: Sequence[int], scored: int) -> torch.Tensor:
    """Logits after the last `scored` tokens of a fresh sequence, fp32 [scored, vocab]."""
    scorer.reset()
    parts, done = [], 0
    while done < len(ids):
        chunk = ids[done : done + CHUNK]
        done += len(chunk)
        wanted = min(len(chunk), max(0, scored - (len(ids) - done)))
        parts.append(scorer.feed(chunk, wanted))
    return torch.cat(parts)


def needle_prompts(
    ids: Sequence[int], encode: Encode, lengths: Sequence[int], depths: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """A code hidden in text, for each length and depth: prompt and answer tokens."""
    random = np.random.default_rng(seed)
    cases = []
    for length in lengths:
        haystack = windows(ids, length, 1)[0][:length]
        for depth in depths:
            code = " ".join(str(digit) for digit in random.integers(0, 10, 5))
            needle, question = encode(_NEEDLE.format(code=code)), encode(_QUESTION)
            room = length - len(needle) - len(question)
            at = int(depth * room)
            prompt = haystack[:at] + needle + haystack[at:room] + question
            cases.append(
                {"length": length, "depth": depth, "prompt": prompt, "answer": encode(f" {code}")}
            )
    return cases


def retrieve(
    scorers: Mapping[str, Scorer], cases: Sequence[dict[str, Any]], step: Callable[[int], None]
) -> list[dict[str, Any]]:
    """For each case and format: is every token of the answer the most likely one, and how likely
    is the answer.
    """
    rows = []
    for case in cases:
        ids = [*case["prompt"], *case["answer"]]
        targets = torch.tensor(case["answer"])
        for name, scorer in scorers.items():
            logits = feed_all(scorer, ids[:-1], len(targets))
            logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])
            rows.append(
                {
                    "format": name,
                    "length": case["length"],
                    "depth": case["depth"],
                    "hit": bool((logits.argmax(-1) == targets).all()),
                    "logprob": float(logprobs.sum()),
                }
            )
            step(len(ids))
    return rows


def greedy(scorer: Scorer, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens, each the most likely one."""
    logits = feed_all(scorer, prompt, 1)
    made = []
    for _ in range(count):
        made.append(int(logits[-1].argmax()))
        logits = scorer.feed(made[-1:])
    return made


def diverge(
    scorers: Mapping[str, Scorer], reference: str, encode: Encode, count: int,
    step: Callable[[int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Where greedy decoding with each format first leaves the reference's: until there both hold
    the same tokens, so the position can be read off along the reference's own text.
    """
    rows = []
    for opening in _OPENINGS:
        prompt = encode(opening)
        made = greedy(scorers[reference], prompt, count)
        step(len(prompt) + count)
        for name, scorer in scorers.items():
            if name == reference:
                continue
            logits = feed_all(scorer, [*prompt, *made[:-1]], count)
            differs = (logits.argmax(-1) != torch.tensor(made)).nonzero()
            at = int(differs[0]) if len(differs) else count
            rows.append({"format": name, "prompt": opening, "position": at, "of": count})
            step(len(prompt) + count)
    return rows
