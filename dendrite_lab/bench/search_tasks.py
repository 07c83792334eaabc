"""What the `search` benchmark asks for: texts with a score that the model is never told.

Both tasks score unfinished texts, too. They differ in how the score comes about:

* `twister`: the different words, among the first ten, that begin with a letter. Many small gains:
  one text holds few of them by luck.
* `words`: one sentence with four words, which the prompt names. One text often has all four.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dendrite_engine import SamplingParams

Prompt = str | Sequence[dict[str, str]]

LETTERS = "bcdfghlmnrtw"
WORDS_COUNTED = 10
_TWISTER_PROMPT = (
    "Tongue twisters for every letter\n\n"
    "S: She sells sea shells by the sandy sea shore.\n"
    "P: Peter Piper picked a peck of pickled peppers.\n"
    "{}:"
)
WORD_SETS = (
    "lighthouse apple storm violin",
    "dog kitchen mirror snow",
    "river teacher bicycle moon",
    "doctor garden letter rain",
    "king bread ship candle",
    "cat train window piano",
    "farmer clock horse lemon",
    "robot forest blanket soup",
    "sailor tiger bridge sugar",
    "painter island coffee wolf",
    "baker castle rope owl",
    "nurse desert guitar key",
)


@dataclass(frozen=True)
class Task:
    """One kind of text to search for.

    Attributes:
        name: of the task.
        instances: what differs from one prompt to the next.
        prompt: the prompt of an instance.
        score: value in [0, 1] of a text for an instance, finished or not.
        solved_at: a text with this score solves the instance.
        sampling: how texts are sampled; `max_tokens` is the longest text.
        tokens_per_node: tokens of a search node.
    """

    name: str
    instances: tuple[str, ...]
    prompt: Callable[[str], Prompt]
    score: Callable[[str, str], float]
    solved_at: float
    sampling: SamplingParams
    tokens_per_node: int

    @property
    def max_depth(self) -> int:
        """Search nodes in the longest text."""
        return self.sampling.max_tokens // self.tokens_per_node


def alliteration(letter: str, text: str) -> float:
    """Share of the first ten words: different ones, of two letters or more, with this initial."""
    words = ["".join(filter(str.isalpha, word)).lower() for word in text.split()]
    words = [word for word in words if word][:WORDS_COUNTED]
    hits = {word for word in words if len(word) > 1 and word.startswith(letter)}
    return len(hits) / WORDS_COUNTED


def sentence_with(wanted: str, text: str) -> float:
    """Nine tenths the share of the wanted words that occur, one tenth ending with all of them."""
    words = wanted.split()
    found = sum(
        re.search(rf"\b{re.escape(word)}", text, re.IGNORECASE) is not None for word in words
    )
    ended = text.rstrip().endswith((".", "!", "?"))
    return 0.9 * found / len(words) + (0.1 if ended and found == len(words) else 0.0)


def _sentence_prompt(wanted: str) -> Prompt:
    *words, last = wanted.split()
    request = f"Write one sentence that contains the words {', '.join(words)} and {last}."
    return [{"role": "user", "content": request}]


TASKS = {
    "twister": Task(
        name="twister",
        instances=tuple(LETTERS),
        prompt=lambda letter: _TWISTER_PROMPT.format(letter.upper()),
        score=alliteration,
        solved_at=0.5,
        sampling=SamplingParams(temperature=0.8, stop="\n", max_tokens=20),
        tokens_per_node=2,
    ),
    "words": Task(
        name="words",
        instances=WORD_SETS,
        prompt=_sentence_prompt,
        score=sentence_with,
        solved_at=1.0,
        sampling=SamplingParams(temperature=0.8, stop=(".", "!", "?", "\n"), max_tokens=64),
        tokens_per_node=8,
    ),
}
