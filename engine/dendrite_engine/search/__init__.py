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
    from dendrite_engine.search.best_of_n import BestOfN
    from dendrite_engine.search.budget import Budget, Usage
    from dendrite_engine.search.contract import check_contract
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
    from dendrite_engine.search.judges import prompted_value, prompted_vote
    from dendrite_engine.search.lats import LATS
    from dendrite_engine.search.lookahead import Lookahead
    from dendrite_engine.search.mcts import MCTS
    from dendrite_engine.search.posterior import BetaPosterior, GaussianPosterior, Posterior
    from dendrite_engine.search.prm_beam import PRMBeam
    from dendrite_engine.search.rebase import REBASE
    from dendrite_engine.search.result import FoundText, SearchResult
    from dendrite_engine.search.resume import resume_search
    from dendrite_engine.search.selection import (
        PUCT,
        UCT,
        EpsilonGreedy,
        SelectionRule,
        UCB1Tuned,
    )
    from dendrite_engine.search.self_consistency import SelfConsistency
    from dendrite_engine.search.session import SearchEvent
    from dendrite_engine.search.start import start_search
    from dendrite_engine.search.stats import SearchStats
    from dendrite_engine.search.stochastic_beam import StochasticBeam
    from dendrite_engine.search.tree import Node, Tree
    from dendrite_engine.search.tree_of_thought import TreeOfThought
    from dendrite_engine.search.weighted_vote import WeightedVote

SEARCHES: Registry[type[Search[Any]]] = Registry(
    "search algorithm",
    {
        "abmcts": "dendrite_engine.search.abmcts:ABMCTS",
        "beam": "dendrite_engine.search.beam:BeamSearch",
        "best-of-n": "dendrite_engine.search.best_of_n:BestOfN",
        "diverse-beam": "dendrite_engine.search.diverse_beam:DiverseBeam",
        "dvts": "dendrite_engine.search.dvts:DVTS",
        "lats": "dendrite_engine.search.lats:LATS",
        "lookahead": "dendrite_engine.search.lookahead:Lookahead",
        "mcts": "dendrite_engine.search.mcts:MCTS",
        "prm-beam": "dendrite_engine.search.prm_beam:PRMBeam",
        "rebase": "dendrite_engine.search.rebase:REBASE",
        "self-consistency": "dendrite_engine.search.self_consistency:SelfConsistency",
        "stochastic-beam": "dendrite_engine.search.stochastic_beam:StochasticBeam",
        "tot": "dendrite_engine.search.tree_of_thought:TreeOfThought",
        "weighted-vote": "dendrite_engine.search.weighted_vote:WeightedVote",
    },
)

_PUBLIC = {
    "ABMCTS": "abmcts",
    "BeamSearch": "beam",
    "BestOfN": "best_of_n",
    "BetaPosterior": "posterior",
    "Budget": "budget",
    "DVTS": "dvts",
    "DiverseBeam": "diverse_beam",
    "EpsilonGreedy": "selection",
    "Evaluator": "evaluators",
    "FoundText": "result",
    "GaussianPosterior": "posterior",
    "LATS": "lats",
    "Lookahead": "lookahead",
    "MCTS": "mcts",
    "Node": "tree",
    "Outcome": "base",
    "PRMBeam": "prm_beam",
    "PUCT": "selection",
    "Posterior": "posterior",
    "REBASE": "rebase",
    "Runner": "driver",
    "Search": "base",
    "SearchEvent": "session",
    "SearchHandle": "handle",
    "SearchResult": "result",
    "SearchStats": "stats",
    "SelectionRule": "selection",
    "SelfConsistency": "self_consistency",
    "State": "base",
    "StochasticBeam": "stochastic_beam",
    "Tree": "tree",
    "TreeOfThought": "tree_of_thought",
    "Trial": "base",
    "UCB1Tuned": "selection",
    "UCT": "selection",
    "Usage": "budget",
    "WeightedVote": "weighted_vote",
    "cached": "evaluators",
    "check_contract": "contract",
    "combine": "evaluators",
    "first_of": "evaluators",
    "keyword_coverage": "evaluators",
    "mean_logprob": "evaluators",
    "prompted_value": "judges",
    "prompted_vote": "judges",
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
    "ABMCTS",
    "DVTS",
    "LATS",
    "MCTS",
    "PUCT",
    "REBASE",
    "SEARCHES",
    "UCT",
    "BeamSearch",
    "BestOfN",
    "BetaPosterior",
    "Budget",
    "DiverseBeam",
    "EpsilonGreedy",
    "Evaluator",
    "FoundText",
    "GaussianPosterior",
    "Lookahead",
    "Node",
    "Outcome",
    "PRMBeam",
    "Posterior",
    "Runner",
    "Search",
    "SearchEvent",
    "SearchHandle",
    "SearchResult",
    "SearchStats",
    "SelectionRule",
    "SelfConsistency",
    "State",
    "StochasticBeam",
    "Tree",
    "TreeOfThought",
    "Trial",
    "UCB1Tuned",
    "Usage",
    "WeightedVote",
    "cached",
    "check_contract",
    "combine",
    "first_of",
    "keyword_coverage",
    "mean_logprob",
    "prompted_value",
    "prompted_vote",
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
