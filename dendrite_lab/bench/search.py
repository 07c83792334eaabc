"""search: greedy decoding, best-of-N and MCTS on scored texts, with the same token budget.

The model is never told the score; each method only chooses among texts that the model writes.
Best-of-N keeps the best of as many whole texts as the budget pays for (and may overrun it a little,
in its favour). MCTS spends at most the budget and is guided by the score of unfinished texts.
Both go by the same value: the score, blended with a little mean log-probability.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dendrite_engine import Branch, Budget, Engine, SamplingParams
from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import MCTS, combine, mean_logprob, verifier
from dendrite_lab.bench import measure
from dendrite_lab.bench.search_tasks import TASKS, Task

BATCH = 16  # texts that best-of-N writes at once


@dataclass(frozen=True)
class Run:
    """How one instance is to be run.

    Attributes:
        engine: the engine.
        task: what is asked for.
        instance: for which letter or words.
        budget: tokens to generate.
        seed: of all sampling.
        mcts: options of the search.
    """

    engine: Engine
    task: Task
    instance: str
    budget: int
    seed: int
    mcts: MCTS

    @property
    def evaluator(self) -> Any:
        """Value of a branch in [0, 1]: nine parts score so far, one part how likely the text is."""
        score = verifier(lambda text: self.task.score(self.instance, text))
        return combine(score, mean_logprob(), weights=[0.9, 0.1])


@dataclass(frozen=True)
class Found:
    """What one method wrote for one instance: best text, its score, tokens spent, wall seconds."""

    instance: str
    text: str
    score: float
    tokens: int
    seconds: float


def run(argv: Sequence[str] = ()) -> dict[str, Any]:
    """Run the benchmark; see the module's first lines.

    Raises:
        InvalidArgument: an option is not positive, or too small a budget for one text.
    """
    parser = argparse.ArgumentParser(prog="dendrite-lab bench search")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--instances", type=int, default=12, help="of each task, at most")
    parser.add_argument("--tokens", type=int, default=600, help="token budget of an instance")
    parser.add_argument("--seeds", type=int, default=1, help="runs of an instance")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--exploration", type=float, default=0.1)
    parser.add_argument("--parallel", type=int, default=8)
    args = parser.parse_args(list(argv))
    _check(args)
    engine = Engine.from_pretrained(args.model, num_pages=2048)
    engine.complete(engine.prompt("Warm up."), SamplingParams(max_tokens=4))
    rows: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    for task in (TASKS[name] for name in args.tasks):
        found = _run_task(engine, task, args)
        rows += [_row(task, method, results) for method, results in found.items()]
        texts += [_text(task, method, one) for method, results in found.items() for one in results]
    engine.close()
    return measure.report("search", argv, rows, budget=args.tokens, texts=texts)


def _check(args: argparse.Namespace) -> None:
    for name in ("instances", "seeds"):
        if getattr(args, name) < 1:
            raise InvalidArgument(f"--{name} must be at least 1, got {getattr(args, name)}")
    longest = max(TASKS[name].sampling.max_tokens for name in args.tasks)
    if args.tokens < longest:
        raise InvalidArgument(
            f"--tokens must pay for one text of {longest} tokens, got {args.tokens}"
        )


def _run_task(engine: Engine, task: Task, args: argparse.Namespace) -> dict[str, list[Found]]:
    """What each method found, instance by instance, so that a slow spell hits all methods."""
    mcts = MCTS(
        width=args.width,
        exploration=args.exploration,
        parallel=args.parallel,
        tokens_per_node=task.tokens_per_node,
        max_depth=task.max_depth,
        sampling=task.sampling,
    )
    found: dict[str, list[Found]] = {"greedy": [], "best of N": [], "MCTS": []}
    for instance in task.instances[: args.instances]:
        for seed in range(args.seeds):
            todo = Run(engine, task, instance, args.tokens, seed, mcts)
            for method, result in _methods(todo):
                found[method].append(result)
    return found


def _methods(todo: Run) -> Iterator[tuple[str, Found]]:
    root = todo.engine.prompt(todo.task.prompt(todo.instance))
    yield "greedy", _timed(todo, lambda: _greedy(todo, root))
    yield "best of N", _timed(todo, lambda: _best_of_n(todo, root))
    yield "MCTS", _timed(todo, lambda: _mcts(todo, root))
    root.prune(subtree=True)


def _greedy(todo: Run, root: Branch) -> tuple[str, int]:
    made = root.fork(1)
    (done,) = todo.engine.complete(made, todo.task.sampling.replace(temperature=0.0))
    made[0].prune()
    return done.text, len(done.token_ids)


def _best_of_n(todo: Run, root: Branch) -> tuple[str, int]:
    """Whole texts, a batch at a time, until the budget is spent; the best by the search's value."""
    value, sampling = todo.evaluator.bind(root), todo.task.sampling
    best, used, count = (-1.0, ""), 0, 0
    while used < todo.budget:
        length = used / count if count else sampling.max_tokens
        made = root.fork(min(BATCH, math.ceil((todo.budget - used) / length)))
        seeds = [(todo.seed << 32) + count + i for i in range(len(made))]
        done = todo.engine.complete(made, [sampling.replace(seed=seed) for seed in seeds])
        texts = [completion.text for completion in done]
        best = max(best, *zip(value(made), texts, strict=True))
        used += sum(len(completion.token_ids) for completion in done)
        count += len(made)
        for branch in made:
            branch.prune()
    return best[1], used


def _mcts(todo: Run, root: Branch) -> tuple[str, int]:
    handle = todo.engine.search(
        root, todo.mcts, Budget(tokens=todo.budget), evaluator=todo.evaluator, seed=todo.seed
    )
    result = handle.wait()
    result.prune()
    return result.text, result.tokens


def _timed(todo: Run, method: Callable[[], tuple[str, int]]) -> Found:
    start = time.perf_counter()
    text, tokens = method()
    seconds = time.perf_counter() - start
    return Found(todo.instance, text, todo.task.score(todo.instance, text), tokens, seconds)


def _row(task: Task, method: str, found: Sequence[Found]) -> dict[str, Any]:
    scores = [one.score for one in found]
    return {
        "task": task.name,
        "method": method,
        "instances": len(found),
        "mean_score": round(statistics.mean(scores), 3),
        "score": measure.spread(scores),
        "solved": round(sum(score >= task.solved_at - 1e-9 for score in scores) / len(scores), 3),
        "tokens": measure.spread([one.tokens for one in found], 0),
        "seconds": measure.spread([one.seconds for one in found], 2),
    }


def _text(task: Task, method: str, one: Found) -> dict[str, Any]:
    return {
        "task": task.name,
        "method": method,
        "instance": one.instance,
        "score": round(one.score, 3),
        "text": one.text.strip(),
    }
