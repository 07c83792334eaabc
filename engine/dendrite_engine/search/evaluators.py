"""Evaluators: batched callables that give each branch a value; see `evaluation.base`.

One kind a file in `evaluation/`: the model's own log-probabilities (`logprob`), functions of the
text (`text`), a model's answer to a question (`asking`), sampled continuations (`rollout`), several
made one (`combine`) and one that remembers (`cached`).
"""

from __future__ import annotations

from dendrite_engine.search.evaluation.asking import reward_model, self_evaluation
from dendrite_engine.search.evaluation.base import (
    Answer,
    Evaluator,
    Tally,
    bind,
    checked,
    tokens_computed,
    written,
)
from dendrite_engine.search.evaluation.cached import CachedEvaluator, cached
from dendrite_engine.search.evaluation.combine import CombinedEvaluator, combine, first_of
from dendrite_engine.search.evaluation.guard import EvaluatorGuard, Valued
from dendrite_engine.search.evaluation.logprob import LogprobEvaluator, mean_logprob, sum_logprob
from dendrite_engine.search.evaluation.rollout import rollout
from dendrite_engine.search.evaluation.text import (
    TextEvaluator,
    keyword_coverage,
    reward,
    verifier,
)

__all__ = [
    "Answer",
    "CachedEvaluator",
    "CombinedEvaluator",
    "Evaluator",
    "EvaluatorGuard",
    "LogprobEvaluator",
    "Tally",
    "TextEvaluator",
    "Valued",
    "bind",
    "cached",
    "checked",
    "combine",
    "first_of",
    "keyword_coverage",
    "mean_logprob",
    "reward",
    "reward_model",
    "rollout",
    "self_evaluation",
    "sum_logprob",
    "tokens_computed",
    "verifier",
    "written",
]
