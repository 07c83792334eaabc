"""Checks that a search algorithm keeps the contract of `base.py`, on an engine of your own.

The project's tests run the same checks, and more of them, on every algorithm in `SEARCHES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import SearchError
from dendrite_engine.search.base import Outcome, Search, State
from dendrite_engine.search.budget import Budget
from dendrite_engine.search.driver import Runner
from dendrite_engine.search.evaluators import Evaluator, mean_logprob
from dendrite_engine.search.start import start_search

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch

Check = Callable[[Search[Any], "Branch", Evaluator | None], None]


def keeps_to_its_budget(search: Search[Any], root: Branch, evaluator: Evaluator | None) -> None:
    """No limit is overrun by more than one batch."""
    batch = search.plan(search.init(root))
    for name, cost in (("tokens", batch.tokens), ("nodes", batch.nodes), ("iterations", 1)):
        limit = 2 * batch.trials * cost + 1
        budget = Budget(**{name: limit})
        result = start_search(root.engine, root, search, budget, evaluator=evaluator).wait()
        spent, slack = getattr(result, name), batch.trials * cost
        result.prune()
        if spent > limit + slack:
            raise SearchError(
                f"{search.name} spent {spent} {name} of a budget of {limit}: more than one batch "
                f"of {slack} over it"
            )


def repeats_itself(search: Search[Any], root: Branch, evaluator: Evaluator | None) -> None:
    """With a seed, two runs from the same root make the same tree."""
    if search.seed is None:
        raise SearchError(f"{search.name} has no seed; give it one to check that it repeats itself")
    first, second = (_tree_of(search, root, evaluator, lambda batch: [batch]) for _ in range(2))
    if first != second:
        raise SearchError(f"{search.name} made two different trees with seed {search.seed}")


def ignores_what_it_was_told(
    search: Search[Any], root: Branch, evaluator: Evaluator | None
) -> None:
    """An outcome that is told twice counts once."""
    once = _tree_of(search, root, evaluator, lambda batch: [batch])
    twice = _tree_of(search, root, evaluator, lambda batch: [[*batch, *batch], batch])
    if once != twice:
        raise SearchError(f"{search.name} counts an outcome again when it is told again")


def leaves_nothing_behind(search: Search[Any], root: Branch, evaluator: Evaluator | None) -> None:
    """After the result only the path to the best is alive; after its `prune` nothing is."""
    engine = root.engine
    before, pages = {b.id for b in engine.branches}, engine.stats().pages_live
    for batches in (1, 2, 5):
        handle = start_search(engine, root, search, evaluator=evaluator, paused=True)
        handle.step(batches)
        handle.wait_paused()
        handle.stop()
        result = handle.wait()
        path = {node.branch_id for node in result.node.path()}
        stray = {b.id for b in engine.branches} - before - path
        result.prune()
        left = {b.id for b in engine.branches} - before
        if (stray and not search.keep_tree) or left or engine.stats().pages_live > pages:
            raise SearchError(
                f"{search.name} left branches {sorted(stray | left)} behind after {batches} "
                f"batches, and {engine.stats().pages_live - pages} pages"
            )


CHECKS: tuple[Check, ...] = (
    keeps_to_its_budget,
    repeats_itself,
    ignores_what_it_was_told,
    leaves_nothing_behind,
)


def check_contract(
    search: Search[Any], root: Branch, evaluator: Evaluator | None = None
) -> list[str]:
    """Run all checks; returns what was checked, a sentence each.

    Args:
        search: with options that make a batch small, and a seed.
        root: a branch to search from; it stays as it is.
        evaluator: values branches, where the algorithm wants values; `None` takes
            `mean_logprob()`.

    Raises:
        SearchError: the first promise that is broken.
    """
    if evaluator is None and search.needs_values:
        evaluator = mean_logprob()
    for check in CHECKS:
        check(search, root, evaluator)
    return [(check.__doc__ or "").strip() for check in CHECKS]


def _tree_of(
    search: Search[Any],
    root: Branch,
    evaluator: Evaluator | None,
    parts: Callable[[list[Outcome]], list[list[Outcome]]],
    batches: int = 5,
) -> list[tuple[Any, ...]]:
    """What a few batches make, driven by hand; `parts` turns a batch into calls of `tell`."""
    runner = Runner(root.engine, root, evaluator)
    state: State = search.init(root)
    try:
        for _ in range(batches):
            if search.done(state):
                break
            outcomes = runner.run(search.ask(state, search.plan(state).trials))
            for part in parts(outcomes):
                search.tell(state, part)
            runner.settle(state)
    finally:
        runner.keeper.prune_all()
    nodes = state.tree.nodes
    return [(n.ordinals(), n.token_ids, n.visits, round(n.value, 9)) for n in nodes]
