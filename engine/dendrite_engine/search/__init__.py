"""Tree search over an LLM on branch handles: ask/tell algorithms, budgets, evaluators, the handle.

Public names are imported when first used. A new algorithm is one file and one line in `SEARCHES`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dendrite_engine.registry import Registry

if TYPE_CHECKING:
    from dendrite_engine.search.base import Outcome, Search, State, Trial
    from dendrite_engine.search.beam import BeamSearch
    from dendrite_engine.search.best_of_n import BestOfN
    from dendrite_engine.search.budget import Budget, Usage
    from dendrite_engine.search.diverse_beam import DiverseBeam
    from dendrite_engine.search.driver import Runner
    from dendrite_engine.search.dvts import DVTS
    from dendrite_engine.search.evaluators import (
        Evaluator,
        cached,
        combine,
        first_of,
        keyword_coverage,
        mean_logprob,
        reward,
        reward_model,
        rollout,
        self_evaluation,
        sum_logprob,
        verifier,
    )
    from dendrite_engine.search.handle import SearchHandle
    from dendrite_engine.search.mcts import MCTS
    from dendrite_engine.search.prm_beam import PRMBeam
    from dendrite_engine.search.rebase import REBASE
    from dendrite_engine.search.result import FoundText, SearchResult
    from dendrite_engine.search.resume import resume_search
    from dendrite_engine.search.self_consistency import SelfConsistency
    from dendrite_engine.search.session import SearchEvent
    from dendrite_engine.search.start import start_search
    from dendrite_engine.search.stats import SearchStats
    from dendrite_engine.search.stochastic_beam import StochasticBeam
    from dendrite_engine.search.tree import Node, Tree
    from dendrite_engine.search.weighted_vote import WeightedVote

SEARCHES: Registry[type[Search[Any]]] = Registry(
    "search algorithm",
    {
        "beam": "dendrite_engine.search.beam:BeamSearch",
        "best-of-n": "dendrite_engine.search.best_of_n:BestOfN",
        "diverse-beam": "dendrite_engine.search.diverse_beam:DiverseBeam",
        "dvts": "dendrite_engine.search.dvts:DVTS",
        "mcts": "dendrite_engine.search.mcts:MCTS",
        "prm-beam": "dendrite_engine.search.prm_beam:PRMBeam",
        "rebase": "dendrite_engine.search.rebase:REBASE",
        "self-consistency": "dendrite_engine.search.self_consistency:SelfConsistency",
        "stochastic-beam": "dendrite_engine.search.stochastic_beam:StochasticBeam",
        "weighted-vote": "dendrite_engine.search.weighted_vote:WeightedVote",
    },
)

_PUBLIC = {
    "BeamSearch": "beam",
    "BestOfN": "best_of_n",
    "Budget": "budget",
    "DVTS": "dvts",
    "DiverseBeam": "diverse_beam",
    "Evaluator": "evaluators",
    "FoundText": "result",
    "MCTS": "mcts",
    "Node": "tree",
    "Outcome": "base",
    "PRMBeam": "prm_beam",
    "REBASE": "rebase",
    "Runner": "driver",
    "Search": "base",
    "SearchEvent": "session",
    "SearchHandle": "handle",
    "SearchResult": "result",
    "SearchStats": "stats",
    "SelfConsistency": "self_consistency",
    "State": "base",
    "StochasticBeam": "stochastic_beam",
    "Tree": "tree",
    "Trial": "base",
    "Usage": "budget",
    "WeightedVote": "weighted_vote",
    "cached": "evaluators",
    "combine": "evaluators",
    "first_of": "evaluators",
    "keyword_coverage": "evaluators",
    "mean_logprob": "evaluators",
    "resume_search": "resume",
    "reward": "evaluators",
    "reward_model": "evaluators",
    "rollout": "evaluators",
    "self_evaluation": "evaluators",
    "start_search": "start",
    "sum_logprob": "evaluators",
    "verifier": "evaluators",
}

__all__ = [
    "DVTS",
    "MCTS",
    "REBASE",
    "SEARCHES",
    "BeamSearch",
    "BestOfN",
    "Budget",
    "DiverseBeam",
    "Evaluator",
    "FoundText",
    "Node",
    "Outcome",
    "PRMBeam",
    "Runner",
    "Search",
    "SearchEvent",
    "SearchHandle",
    "SearchResult",
    "SearchStats",
    "SelfConsistency",
    "State",
    "StochasticBeam",
    "Tree",
    "Trial",
    "Usage",
    "WeightedVote",
    "cached",
    "combine",
    "first_of",
    "keyword_coverage",
    "mean_logprob",
    "resume_search",
    "reward",
    "reward_model",
    "rollout",
    "self_evaluation",
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
