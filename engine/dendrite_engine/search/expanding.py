"""Base of the searches that add one child at a time to a tree, by tokens, thoughts or actions."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from dendrite_engine.errors import InvalidArgument, StaleBranch
from dendrite_engine.search.actions import Actions, Runs, allowed_runs, check_actions
from dendrite_engine.search.base import Outcome, State, Trial
from dendrite_engine.search.checks import flag, number, one_of, whole
from dendrite_engine.search.transpositions import PathTable
from dendrite_engine.search.tree import Candidate, Node
from dendrite_engine.search.writing import WritingSearch


@dataclass(slots=True)
class ExpandingState(State):
    """State of a search that adds children one by one.

    Attributes:
        merged: children that were token for token equal to an older node.
        failed: trials that left no child.
        runs: actions allowed at a node, by its id, once they were asked for.
        paths: finds equal token paths.
    """

    merged: int = 0
    failed: int = 0
    runs: dict[int, Runs] = field(default_factory=dict)
    paths: PathTable = field(default_factory=PathTable, metadata={"checkpoint": False})


E = TypeVar("E", bound=ExpandingState)


@dataclass(frozen=True, kw_only=True)
class ExpandingSearch(WritingSearch[E], Generic[E]):
    """Options that say which children a node can have.

    Args:
        width: attempts at children of a node; with `actions`, so many of them at most.
        max_depth: nodes on a path below the root; `None` for no limit.
        expansion: `sample` draws the child's tokens; `top_k` begins the n-th child of a node with
            the n-th most likely token, then samples; `top_p` does so while the tokens before it
            have less than `top_p` of the probability; `actions` makes a child of each action, the
            likeliest first.
        top_p: see `expansion`.
        actions: texts, a callable `actions(branch)` that returns the texts or token ids allowed
            next, or "grammar" for `branch.allowed_tokens()`. A node without actions is terminal.
            The callable is asked once for a node; where it raises, the node gets no children
            (at the root the search fails).
        priors: `model` ranks actions by the probability of their tokens; `uniform` keeps the given
            order and needs no forward pass.
        transpositions: a child whose path of tokens equals that of any older node is merged with
            it, however the paths were cut into nodes; otherwise only with an equal sibling.
    """

    expansions: ClassVar[tuple[str, ...]] = ("sample", "top_k", "top_p", "actions")

    width: int = 3
    max_depth: int | None = None
    expansion: Literal["sample", "top_k", "top_p", "actions", "propose"] = "sample"
    top_p: float = 0.9
    actions: Actions | None = None
    priors: Literal["model", "uniform"] = "model"
    transpositions: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("width", self.width, 1)
        if self.max_depth is not None:
            whole("max_depth", self.max_depth, 1)
        one_of("expansion", self.expansion, self.expansions)
        number("top_p", self.top_p, 0, above=True)
        if self.top_p > 1:
            raise InvalidArgument(f"top_p must be in (0, 1], got {self.top_p}")
        one_of("priors", self.priors, ("model", "uniform"))
        flag("transpositions", self.transpositions)
        if (self.actions is None) != (self.expansion != "actions"):
            raise InvalidArgument("actions and expansion='actions' go together: give both or none")
        if self.actions is not None:
            check_actions(self.actions)
        if self.is_greedy and self.width > 1 and self.expansion == "sample":
            raise InvalidArgument(
                f"sampling.temperature=0 would make all width={self.width} children of a node the "
                "same; use a temperature above 0, width=1, or expansion='top_k'"
            )

    # -- which children a node can have ---------------------------------------------------------

    @property
    def has_runs(self) -> bool:
        """Whether children are runs of tokens that were there before, not sampled ones."""
        return self.expansion in ("actions", "propose")

    def attempts_allowed(self, state: E, node: Node) -> int:
        """Attempts at children of a node whose branch is alive, all together."""
        if self.has_runs:
            return min(self.width, len(self._runs(state, node)))
        if self.expansion != "top_p":
            return self.width
        # one until its tokens are known: the likeliest is always among them
        before = itertools.accumulate((math.exp(a.logprob) for a in node.alternatives), initial=0.0)
        inside = sum(mass < self.top_p for mass in before)
        return min(self.width, inside)

    def sibling_priors(self, node: Node, count: int) -> list[float]:
        """Prior of each of the first `count` attempts at children; they add up to 1.

        The model's where it ranked them. Sampled children are equally likely a priori, because the
        model has chosen them already (Hubert et al., "Learning and Planning in Complex Action
        Spaces", ICML 2021).
        """
        known = node.candidates or node.alternatives
        logprobs = [option.logprob for option in known[:count]]
        if len(logprobs) < count or any(map(math.isnan, logprobs)):
            return [1.0 / count] * count
        top = max(logprobs, default=0.0)
        weights = [math.exp(logprob - top) for logprob in logprobs]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def longest_run(self, state: E) -> int:
        """Tokens of the longest run known so far; 1 before any is known."""
        return max((len(run) for runs in state.runs.values() for run in runs), default=1)

    def _runs(self, state: E, node: Node) -> Runs:
        """Actions allowed at a node; asked for once."""
        runs = state.runs.get(node.id)
        if runs is None:
            runs = state.runs[node.id] = self._ask_runs(state, node)
            if not runs and node.parent is not None:
                node.status, node.finish_reason = "terminal", "no_actions"
                state.tree.dirty.add(node.id)
        return runs

    def _ask_runs(self, state: E, node: Node) -> Runs:
        branch = node.branch
        try:
            if branch is None or branch.num_tokens != node.span[1]:
                raise StaleBranch(f"branch {node.branch_id} was pruned or changed by somebody else")
            return allowed_runs(self.actions or (), branch)
        except Exception as error:
            if node.parent is None:
                raise
            # whatever the callable raises stays with its node
            text = f"actions raised {type(error).__name__}: {error}"
            state.note("error", node, {"node": node.id, "error": text})
            return ()

    # -- asking for a child, and hanging it into the tree ---------------------------------------

    def attempt(self, state: E, node: Node, **details: Any) -> Trial:
        """A trial that makes the next child of `node`."""
        ordinal = node.attempts
        node.attempts += 1
        if self.expansion != "sample":
            details.update(alternative=ordinal, k=self.width)
        if self.has_runs:
            runs = self._runs(state, node)
            if self.priors == "uniform" and node.candidates is None:
                node.candidates = unranked(runs)
            details.update(runs=runs, params=None)
        key = self.node_key(node, ordinal)
        return self.open_trial(state, "expand", node, ordinal=ordinal, key=key, **details)

    def hang(self, state: E, trial: Trial, outcome: Outcome) -> tuple[Node, bool]:
        """The node that an outcome stands for, and whether it is new; else its branch is let go."""
        twin = self._twin(state, trial.node, outcome)
        if twin is not None:
            state.merged += 1
            state.tree.orphan(outcome.branch)
            return twin, False
        child = state.tree.add(
            trial.node,
            outcome.token_ids,
            outcome.logprobs,
            branch=outcome.branch,
            ordinal=trial.ordinal,
        )
        total = math.fsum(x for x in outcome.logprobs if not math.isnan(x))
        child.prior = math.exp(total)
        at_limit = self.max_depth is not None and child.depth >= self.max_depth
        ended = self.ends_text(outcome)
        if ended or at_limit:
            child.status, child.exhausted = "terminal", True
            child.finish_reason = outcome.finish_reason if ended else "depth"
        return child, True

    def _twin(self, state: E, node: Node, outcome: Outcome) -> Node | None:
        if self.transpositions:
            return state.paths.find(state.tree, node, outcome.token_ids)
        return next((c for c in node.children if c.token_ids == outcome.token_ids), None)

    def discard(self, state: E, trial: Trial, outcome: Outcome) -> None:
        """A trial left no child; a node whose own branch is gone can't expand again."""
        state.failed += 1
        state.tree.orphan(outcome.branch)
        node = trial.node
        gone = node.branch is not None and not node.branch.is_alive
        if outcome.finish_reason == "stale" and gone:
            node.branch = None
            node.status = "pruned"
            state.tree.dirty.add(node.id)


def unranked(runs: Runs) -> tuple[Candidate, ...]:
    """Candidates in the given order, of which the model was not asked."""
    return tuple(Candidate(run, (math.nan,) * len(run)) for run in runs)
