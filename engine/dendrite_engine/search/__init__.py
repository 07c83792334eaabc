"""Tree search over an LLM on branch handles: ask/tell algorithms, budgets, evaluators, the handle.

Public names are imported when first used. A new algorithm is one file and one line in `SEARCHES`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dendrite_engine.registry import Registry

if TYPE_CHECKING:
    from dendrite_engine.search.abmcts import ABMCTS
    from dendrite_engine.search.base import Outcome, Search, State, Trial
    from dendrite_engine.search.beam import BeamSearch
    from dendrite_engine.search.budget import Budget, Usage
    from dendrite_engine.search.contract import check_contract
    from dendrite_engine.search.driver import Runner
    from dendrite_engine.search.evaluators import (
        Evaluator,
        combine,
        keyword_coverage,
        mean_logprob,
        sum_logprob,
        verifier,
    )
    from dendrite_engine.search.handle import SearchHandle
    from dendrite_engine.search.judges import prompted_value, prompted_vote
    from dendrite_engine.search.lats import LATS
    from dendrite_engine.search.lookahead import Lookahead
    from dendrite_engine.search.mcts import MCTS
    from dendrite_engine.search.posterior import BetaPosterior, GaussianPosterior, Posterior
    from dendrite_engine.search.result import SearchResult
    from dendrite_engine.search.selection import (
        PUCT,
        UCT,
        EpsilonGreedy,
        SelectionRule,
        UCB1Tuned,
    )
    from dendrite_engine.search.session import SearchEvent
    from dendrite_engine.search.start import start_search
    from dendrite_engine.search.stats import SearchStats
    from dendrite_engine.search.tree import Node, Tree
    from dendrite_engine.search.tree_of_thought import TreeOfThought

SEARCHES: Registry[type[Search[Any]]] = Registry(
    "search algorithm",
    {
        "abmcts": "dendrite_engine.search.abmcts:ABMCTS",
        "beam": "dendrite_engine.search.beam:BeamSearch",
        "lats": "dendrite_engine.search.lats:LATS",
        "lookahead": "dendrite_engine.search.lookahead:Lookahead",
        "mcts": "dendrite_engine.search.mcts:MCTS",
        "tot": "dendrite_engine.search.tree_of_thought:TreeOfThought",
    },
)

_PUBLIC = {
    "ABMCTS": "abmcts",
    "LATS": "lats",
    "MCTS": "mcts",
    "PUCT": "selection",
    "UCT": "selection",
    "EpsilonGreedy": "selection",
    "SelectionRule": "selection",
    "UCB1Tuned": "selection",
    "BeamSearch": "beam",
    "BetaPosterior": "posterior",
    "Budget": "budget",
    "Evaluator": "evaluators",
    "GaussianPosterior": "posterior",
    "Lookahead": "lookahead",
    "Node": "tree",
    "Outcome": "base",
    "Posterior": "posterior",
    "Runner": "driver",
    "Search": "base",
    "SearchEvent": "session",
    "SearchHandle": "handle",
    "SearchResult": "result",
    "SearchStats": "stats",
    "State": "base",
    "Tree": "tree",
    "TreeOfThought": "tree_of_thought",
    "Trial": "base",
    "Usage": "budget",
    "check_contract": "contract",
    "combine": "evaluators",
    "keyword_coverage": "evaluators",
    "mean_logprob": "evaluators",
    "prompted_value": "judges",
    "prompted_vote": "judges",
    "start_search": "start",
    "sum_logprob": "evaluators",
    "verifier": "evaluators",
}

__all__ = [
    "ABMCTS",
    "LATS",
    "MCTS",
    "PUCT",
    "SEARCHES",
    "UCT",
    "BeamSearch",
    "BetaPosterior",
    "Budget",
    "EpsilonGreedy",
    "Evaluator",
    "GaussianPosterior",
    "Lookahead",
    "Node",
    "Outcome",
    "Posterior",
    "Runner",
    "Search",
    "SearchEvent",
    "SearchHandle",
    "SearchResult",
    "SearchStats",
    "SelectionRule",
    "State",
    "Tree",
    "TreeOfThought",
    "Trial",
    "UCB1Tuned",
    "Usage",
    "check_contract",
    "combine",
    "keyword_coverage",
    "mean_logprob",
    "prompted_value",
    "prompted_vote",
    "start_search",
    "sum_logprob",
    "verifier",
]


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__
