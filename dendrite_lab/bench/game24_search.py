"""game24: solved rate and time of a tree search on the Game of 24 (see game24.py).

* `greedy`: the model's likeliest text. `greedy, legal moves`: its likeliest legal step, each time.
* `best of N`: N sampled texts, of which the verifier picks one that is right.
* `tree of thought`: depth-first over legal moves, likeliest first by the model. The verifier values
  a state by one step: with two numbers left that no step makes 24 of, a path is cut off.
* `the same, model not asked`: moves in the order of the rules. What is left of the search without
  the model.
* `the same, prefilled again`: the first search on a few of the puzzles, with the probabilities of
  moves from transformers the way a search over text gets them: text and move through the model, for
  every move of every state.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

from dendrite_engine import Branch, Budget, Engine, SamplingParams
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import Node, TreeOfThought, combine, mean_logprob, verifier
from dendrite_engine.search.tree import Candidate
from dendrite_lab.bench import game24, measure
from dendrite_lab.bench.workload import hugging_face

Puzzle = tuple[int, ...]
FREE = SamplingParams(temperature=0.8, stop="\n\n", max_tokens=40)
WIDTH = 64  # more than a state has legal moves


@dataclass(frozen=True)
class Found:
    """What one method wrote for one puzzle."""

    puzzle: Puzzle
    text: str
    tokens: int
    seconds: float

    @property
    def solved(self) -> bool:
        """Whether it is right."""
        return game24.solved(self.puzzle, self.text)


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines.

    Raises:
        InvalidArgument: an option is out of range.
    """
    parser = argparse.ArgumentParser(prog="dendrite-lab bench game24")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--puzzles", type=int, default=50)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the list of puzzles, and of sampling"
    )
    parser.add_argument("--samples", type=int, default=8, help="texts of best of N")
    parser.add_argument("--parallel", type=int, default=2, help="states expanded at once")
    parser.add_argument("--reprefill", type=int, default=1, help="puzzles searched over text, too")
    args = parser.parse_args(list(argv))
    for name, low in (("puzzles", 1), ("samples", 1), ("parallel", 1), ("reprefill", 0)):
        if getattr(args, name) < low:
            raise InvalidArgument(f"--{name} must be at least {low}, got {getattr(args, name)}")
    engine = Engine.from_pretrained(args.model, num_pages=4096)
    engine.complete(engine.prompt("Warm up."), SamplingParams(max_tokens=4))
    found = _found(engine, args)
    few = found["tree of thought"][: args.reprefill]
    rows = [_row(name, results) for name, results in found.items()]
    if few:
        again = _prefilled_again(engine, args, [one.puzzle for one in few])
        rows += [_row("tree of thought (those puzzles)", few)]
        rows += [_row("the same, prefilled again", again)]
    engine.close()
    texts = [
        {"puzzle": " ".join(map(str, one.puzzle)), "text": one.text, "solved": one.solved}
        for one in found["tree of thought"]
    ]
    return measure.report("game24", argv, rows, texts=texts)


def _found(engine: Engine, args: argparse.Namespace) -> dict[str, list[Found]]:
    """What each method found, puzzle by puzzle, so that a slow spell hits all methods."""
    methods: dict[str, Callable[[Puzzle, Branch], tuple[str, int]]] = {
        "greedy": partial(_greedy, engine),
        "greedy, legal moves": partial(_search, engine, _legal_greedy),
        "best of N": partial(_best_of_n, engine, args),
        "tree of thought": partial(_search, engine, partial(_tree_of_thought, args, "model")),
        "the same, model not asked": partial(
            _search, engine, partial(_tree_of_thought, args, "uniform")
        ),
    }
    found: dict[str, list[Found]] = {name: [] for name in methods}
    for puzzle in game24.puzzles(args.puzzles, args.seed):
        for name, method in methods.items():
            found[name].append(_timed(engine, puzzle, method))
    return found


def _timed(
    engine: Engine, puzzle: Puzzle, method: Callable[[Puzzle, Branch], tuple[str, int]]
) -> Found:
    root = engine.prompt(game24.prompt(puzzle))
    start = time.perf_counter()
    text, tokens = method(puzzle, root)
    seconds = time.perf_counter() - start
    root.prune(subtree=True)
    return Found(puzzle, text, tokens, seconds)


def _greedy(engine: Engine, _: Puzzle, root: Branch) -> tuple[str, int]:
    (done,) = engine.complete(root.fork(1), FREE.replace(temperature=0.0))
    return done.text, len(done.token_ids)


def _best_of_n(
    engine: Engine, args: argparse.Namespace, puzzle: Puzzle, root: Branch
) -> tuple[str, int]:
    seeds = [FREE.replace(seed=(args.seed << 32) + i) for i in range(args.samples)]
    done = engine.complete(root.fork(args.samples), seeds)
    right = [one.text for one in done if game24.solved(puzzle, one.text)]
    return (right or [done[0].text])[0], sum(len(one.token_ids) for one in done)


# -- searches over legal moves -------------------------------------------------------------------


def _search(
    engine: Engine,
    algorithm: Callable[[Callable[[Branch], list[str]]], TreeOfThought],
    puzzle: Puzzle,
    root: Branch,
) -> tuple[str, int]:
    start = root.num_tokens

    def moves(branch: Branch) -> list[str]:
        text = engine.tokenizer.decode(branch.token_ids[start:])
        return game24.legal_moves(puzzle, text)

    # mostly what the verifier says, and a little of how likely the model finds the moves
    value = combine(verifier(partial(_promise, puzzle)), mean_logprob(), weights=[0.9, 0.1])
    result = engine.search(
        root, algorithm(moves), Budget(iterations=100_000), evaluator=value
    ).wait()
    result.prune()
    return result.text, result.tokens


def _promise(puzzle: Puzzle, text: str) -> float:
    """1 for a solution, 0 for a state that no step can end well, 1/2 where that isn't known."""
    left = game24.left_after(puzzle, text)
    if left is None or (len(left) == 1 and left[0] != game24.GOAL):
        return 0.0
    if len(left) == 1:
        return 1.0
    if len(left) == 2:
        return 0.5 * any(after == (game24.GOAL,) for _, after in game24.steps(left))
    return 0.5


def _tree_of_thought(
    args: argparse.Namespace, priors: Any, moves: Callable[[Branch], list[str]]
) -> TreeOfThought:
    return TreeOfThought(
        order="dfs", expansion="actions", actions=moves, priors=priors, width=WIDTH, max_depth=3,
        threshold=0.3, target=0.9, parallel=args.parallel,
    )  # fmt: skip


def _legal_greedy(moves: Callable[[Branch], list[str]]) -> TreeOfThought:
    return TreeOfThought(expansion="actions", actions=moves, width=1, breadth=1, max_depth=3)


# -- the same search over text -------------------------------------------------------------------


class TextScorer:
    """Ranks moves as a search without KV handles does: every text and move goes through the model.

    Args:
        model: of transformers.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.tokens_used: dict[int, int] = {}

    def rank(
        self, wanted: Sequence[tuple[Node, Sequence[tuple[int, ...]]]]
    ) -> dict[int, tuple[Candidate, ...]]:
        """See `RunScorer.rank`; one batch a state."""
        ranked = {}
        for node, runs in wanted:
            held = node.branch.token_ids if node.branch is not None else []
            scored = self._score(held, runs)
            ranked[node.id] = tuple(sorted(scored, key=lambda one: -one.logprob))
            self.tokens_used[node.id] = sum(len(held) + len(run) for run in runs)
        return ranked

    def _score(self, held: Sequence[int], runs: Sequence[tuple[int, ...]]) -> list[Candidate]:
        import torch

        longest = max(map(len, runs))
        texts = torch.zeros(len(runs), len(held) + longest, dtype=torch.long)
        mask = torch.zeros_like(texts)
        for row, run in enumerate(runs):
            texts[row, : len(held) + len(run)] = torch.tensor([*held, *run])
            mask[row, : len(held) + len(run)] = 1
        with torch.inference_mode():
            out = self._model(texts, attention_mask=mask, logits_to_keep=longest + 1)
        logprobs = out.logits[:, :-1].float().log_softmax(-1)
        return [
            Candidate(run, tuple(logprobs[row, i, token].item() for i, token in enumerate(run)))
            for row, run in enumerate(runs)
        ]


def _prefilled_again(
    engine: Engine, args: argparse.Namespace, puzzles: Sequence[Puzzle]
) -> list[Found]:
    scorer = TextScorer(hugging_face(engine.model_path))
    method = partial(_search, engine, partial(_tree_of_thought, args, "model"))
    with mock.patch("dendrite_engine.search.driver.RunScorer", return_value=scorer):
        return [_timed(engine, puzzle, method) for puzzle in puzzles]


def _row(method: str, found: Sequence[Found]) -> dict[str, Any]:
    return {
        "method": method,
        "puzzles": len(found),
        "solved": sum(one.solved for one in found),
        "solved_percent": round(100.0 * sum(one.solved for one in found) / len(found), 1),
        "tokens": measure.spread([one.tokens for one in found], 0),
        "seconds": measure.spread([one.seconds for one in found], 2),
    }
