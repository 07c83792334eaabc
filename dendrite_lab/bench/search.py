"""search: greedy decoding, best-of-N and MCTS on the same scored task with the same token budget.

The task: a tongue twister for a letter. The score counts, among the first ten words, the different
ones that begin with the letter. The model is never told the score; each method only chooses among
texts that the model writes. Best-of-N keeps the best of as many whole texts as the budget pays for
(and may overrun it by one text, in its favour). MCTS spends at most the budget and is guided by the
score of unfinished texts, blended with a little mean log-probability, as is best-of-N's choice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dendrite_engine import Branch, Budget, Engine, SamplingParams
from dendrite_engine.search import MCTS, Evaluator, combine, mean_logprob, verifier
from dendrite_lab.bench import measure

LETTERS = "bcdfghlmnrtw"
WORDS = 10
SOLVED = 5  # at least half of the words
PROMPT = (
    "Tongue twisters for every letter\n\n"
    "S: She sells sea shells by the sandy sea shore.\n"
    "P: Peter Piper picked a peck of pickled peppers.\n"
    "{letter}:"
)
TOKENS_PER_NODE, DEPTH = 2, 10
LONGEST = TOKENS_PER_NODE * DEPTH  # tokens of one text; ten words fit
SAMPLING = SamplingParams(temperature=0.8, stop="\n", max_tokens=LONGEST)


@dataclass(frozen=True)
class Found:
    """What one method wrote for one letter.

    Attributes:
        text: its best text.
        hits: different words among the first `WORDS` that begin with the letter.
        tokens: tokens that the model generated for it.
        seconds: wall time.
    """

    text: str
    hits: int
    tokens: int
    seconds: float


def alliteration(letter: str, text: str) -> int:
    """Different words of two letters or more, of the first ten, that begin with `letter`."""
    words = ["".join(filter(str.isalpha, word)).lower() for word in text.split()]
    words = [word for word in words if word][:WORDS]
    return len({word for word in words if len(word) > 1 and word.startswith(letter)})


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines."""
    parser = argparse.ArgumentParser(prog="dendrite-lab bench search")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--letters", default=LETTERS, help="one instance a letter")
    parser.add_argument("--tokens", type=int, default=600, help="token budget of an instance")
    parser.add_argument("--seeds", type=int, default=1, help="runs of an instance")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--exploration", type=float, default=0.1)
    parser.add_argument("--parallel", type=int, default=8)
    args = parser.parse_args(list(argv))
    mcts = MCTS(
        width=args.width,
        exploration=args.exploration,
        parallel=args.parallel,
        tokens_per_node=TOKENS_PER_NODE,
        max_depth=DEPTH,
        sampling=SAMPLING,
    )
    engine = Engine.from_pretrained(args.model, num_pages=2048)
    engine.complete(engine.prompt("Warm up."), SamplingParams(max_tokens=4))
    found: dict[str, list[tuple[str, Found]]] = {"greedy": [], "best of N": [], "mcts": []}
    for letter in args.letters:
        for seed in range(args.seeds):
            for method, result in _instance(engine, letter, args.tokens, seed, mcts):
                found[method].append((letter, result))
    engine.close()
    return measure.report(
        "search",
        argv,
        [_row(method, results) for method, results in found.items()],
        budget=args.tokens,
        words=WORDS,
        solved_at=SOLVED,
        texts=[
            {"letter": letter, "method": method, "hits": one.hits, "text": one.text.strip()}
            for method, results in found.items()
            for letter, one in results
        ],
    )


def _instance(
    engine: Engine, letter: str, budget: int, seed: int, mcts: MCTS
) -> Iterable[tuple[str, Found]]:
    """All methods on one letter, from the same prompt."""
    root = engine.prompt(PROMPT.format(letter=letter.upper()))
    score = evaluator(letter)
    yield "greedy", _timed(letter, lambda: _greedy(engine, root))
    yield "best of N", _timed(letter, lambda: _best_of_n(engine, root, score, budget, seed))
    yield "mcts", _timed(letter, lambda: _mcts(engine, root, score, budget, seed, mcts))
    root.prune(subtree=True)


def evaluator(letter: str) -> Evaluator:
    """Value of a branch in [0, 1]: nine parts score so far, one part how likely the text is."""
    share = verifier(lambda text: alliteration(letter, text) / WORDS)
    return combine(share, mean_logprob(), weights=[0.9, 0.1])


def _greedy(engine: Engine, root: Branch) -> tuple[str, int]:
    made = root.fork(1)
    (done,) = engine.complete(made, SAMPLING.replace(temperature=0.0))
    made[0].prune()
    return done.text, len(done.token_ids)


def _best_of_n(
    engine: Engine, root: Branch, score: Any, budget: int, seed: int, batch: int = 16
) -> tuple[str, int]:
    """Whole texts, a batch at a time, until the budget is spent; the best by the search's value."""
    value = score.bind(root)
    best, used, count = (-1.0, ""), 0, 0
    while used < budget:
        left = (budget - used) // LONGEST
        made = root.fork(max(1, min(batch, left)))
        params = [SAMPLING.replace(seed=(seed << 32) + count + i) for i in range(len(made))]
        done = engine.complete(made, params)
        texts = [completion.text for completion in done]
        best = max(best, *zip(value(made), texts, strict=True))
        used += sum(len(completion.token_ids) for completion in done)
        count += len(made)
        for branch in made:
            branch.prune()
    return best[1], used


def _mcts(
    engine: Engine, root: Branch, score: Evaluator, budget: int, seed: int, mcts: MCTS
) -> tuple[str, int]:
    handle = engine.search(root, mcts, Budget(tokens=budget), evaluator=score, seed=seed)
    result = handle.wait()
    result.prune()
    return result.text, result.tokens


def _timed(letter: str, method: Callable[[], tuple[str, int]]) -> Found:
    start = time.perf_counter()
    text, tokens = method()
    return Found(text, alliteration(letter, text), tokens, time.perf_counter() - start)


def _row(method: str, results: Sequence[tuple[str, Found]]) -> dict[str, Any]:
    found = [result for _, result in results]
    return {
        "method": method,
        "instances": len(found),
        "score": _span([one.hits / WORDS for one in found]),
        "solved": round(sum(one.hits >= SOLVED for one in found) / len(found), 3),
        "tokens": _span([one.tokens for one in found], 0),
        "seconds": _span([one.seconds for one in found], 2),
    }


def _span(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    return {
        "mean": round(statistics.mean(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }
