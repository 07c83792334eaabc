"""The ask/tell contract that every search algorithm fulfils.

An algorithm is a frozen dataclass of options; all that changes lives in a `State`. `ask` says what
to try next, `tell` takes what came of it, both in batches. Algorithms see nodes, trials and
outcomes: forking, decoding and evaluating is the runner's work (`driver.py`), so an algorithm can
be tested, replayed and checkpointed without a model.

    state = search.init(root)
    while not search.done(state):
        trials = search.ask(state, n)
        outcomes = runner.run(trials)
        search.tell(state, outcomes)
        runner.settle(state.tree)
    best = search.best(state)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from dendrite_engine.errors import InvalidArgument, SearchError
from dendrite_engine.search.budget import BatchPlan, Budget
from dendrite_engine.search.checks import flag, whole
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.trace import Kind
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.types import TokenAlternative

Action = Literal["expand", "look", "evaluate"]

# finish reasons after which there is nothing of the branch to keep
LOST = frozenset(
    {
        "out_of_pages", "stale", "numeric_error", "cancelled", "no_alternative", "error",
        "dead_end", "grammar_error",
    }
)  # fmt: skip
# finish reasons after which the text is complete
ENDED = frozenset({"stop", "eos", "context_full"})


@dataclass(frozen=True, slots=True)
class Trial:
    """One piece of work for the engine.

    Attributes:
        id: unique in the search, in the order of asking.
        action: `expand` makes one new child of `node`; `look` asks for its most likely next tokens;
            `evaluate` has the evaluator value the node's own branch.
        node: the node that the trial is about.
        ordinal: which attempt at a child of `node` this is (`expand`).
        params: how to sample the child; `max_tokens` is its length (`expand`).
        alternative: begin the child with the alternative of this rank, `None` to sample (`expand`).
        rollout: sampling of a continuation that is evaluated in the child's place and then pruned.
        k: alternatives wanted (`look`, and `expand` with an `alternative`).
        key: key of the child's draws; `None` leaves it to the engine, which counts forks
            (`expand`).
        forced: tokens that the child begins with, before those that are sampled; they don't count
            against `params.max_tokens`. Without `params` the child ends with them (`expand`).
        runs: what an `alternative` is a rank in, instead of the vocabulary: runs of tokens, which
            the model ranks by likelihood where the node has no `candidates` yet (`expand`).
        valued: the evaluator is asked about the child.
    """

    id: int
    action: Action
    node: Node
    ordinal: int = 0
    params: SamplingParams | None = None
    alternative: int | None = None
    rollout: SamplingParams | None = None
    k: int = 0
    key: int | None = None
    forced: tuple[int, ...] = ()
    runs: tuple[tuple[int, ...], ...] = ()
    valued: bool = True


@dataclass(slots=True)
class Outcome:
    """What came of a trial.

    Attributes:
        trial_id: the trial's id.
        branch: the child's branch (`expand`), else `None`.
        token_ids: tokens of the child.
        logprobs: their natural log-probabilities.
        finish_reason: why decoding ended; one of `LOST` when there is no child to keep.
        value: what the evaluator said; `None` when it was not asked.
        alternatives: most likely next tokens, best first (`look`).
        tokens_used: tokens that the model decoded or was made to write, rollout included.
        error: what went wrong with this trial alone, as text.
        text: what the model decoded for the child, forced tokens left out.
    """

    trial_id: int
    branch: Branch | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None
    value: float | None = None
    alternatives: tuple[TokenAlternative, ...] = ()
    tokens_used: int = 0
    error: str | None = None
    text: str = ""

    @property
    def lost(self) -> bool:
        """Nothing of this trial can be kept."""
        return self.finish_reason in LOST


@dataclass(slots=True)
class State:
    """Everything about a search that changes.

    A checkpoint stores every field of an algorithm's state by its value (see `codec`), but for the
    tree, which has a form of its own, and fields with `metadata={"checkpoint": False}`, which are
    as `init` makes them.

    Attributes:
        tree: its nodes.
        pending: trials asked and not told, by id.
        next_trial: id of the next trial.
        reason: why the search is done; `None` while it isn't.
        notes: `(kind, branch id, data)` of trace events not written yet.
    """

    tree: Tree
    pending: dict[int, Trial] = field(default_factory=dict)
    next_trial: int = 0
    reason: str | None = None
    notes: list[tuple[Kind, int, dict[str, Any]]] = field(default_factory=list)

    def note(self, kind: Kind, node: Node, data: dict[str, Any]) -> None:
        """Record a trace event about a node."""
        self.notes.append((kind, node.branch_id, data))


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class Search(ABC, Generic[S]):
    """Base of all algorithms: options only, so one object can drive many searches.

    A subclass is a frozen dataclass that checks its own options in `__post_init__` (calling this
    one's) and fulfils `init`, `ask`, `tell`, `best` and `plan`. A line in `search.SEARCHES` makes
    it known by name; `tests/search/test_contract.py` then runs the shared contract tests on it.

    Args:
        seed: makes the search repeatable from the same root whatever was forked off it before;
            `None` leaves the draws to the engine's own seed and its count of forks.
        keep_tree: leave all branches alive at the end, not only the path to the best.
    """

    name: ClassVar[str]
    live_options: ClassVar[frozenset[str]] = frozenset()  # may be changed while the search runs
    default_budget: ClassVar[Budget] = Budget()
    needs_values: ClassVar[bool] = True  # False: no evaluator is ever called
    saved_types: ClassVar[tuple[type, ...]] = ()  # further data classes that its state may hold

    seed: int | None = None
    keep_tree: bool = False

    def __post_init__(self) -> None:
        if self.seed is not None:
            whole("seed", self.seed, 0)
        flag("keep_tree", self.keep_tree)

    @abstractmethod
    def init(self, root: Branch) -> S:
        """A fresh state whose root node is `root`'s branch."""

    @abstractmethod
    def ask(self, state: S, n: int) -> list[Trial]:
        """Up to `n` trials to run next; none where nothing is left or all waits for `tell`."""

    @abstractmethod
    def tell(self, state: S, results: Sequence[Outcome]) -> None:
        """Take the outcomes of trials, in any order.

        A trial already told, or unknown, changes nothing: its branch is pruned unless a node owns
        it.
        """

    @abstractmethod
    def best(self, state: S) -> Node:
        """The node to return if the search ended now (the root before anything was found)."""

    def found(self, state: S) -> list[Node]:
        """All nodes worth showing at the end, in the algorithm's order; the best alone by default.

        `rank` is their value in `SearchResult.found`.
        """
        return [self.best(state)]

    @abstractmethod
    def plan(self, state: S) -> BatchPlan:
        """Size and worst-case cost of the next batch."""

    def done(self, state: S) -> bool:
        """Whether the search has nothing left to do; `state.reason` says why."""
        return state.reason is not None

    def rank(self, state: S, node: Node) -> float:  # noqa: ARG002
        """The number by which this search picks among siblings (UCT, beam score, ...)."""
        return node.value

    def drop(self, state: S, node: Node) -> None:
        """Take a node and all below it out of the search, as a person asked."""
        state.tree.drop(node)

    def lose(self, state: S, node: Node, reason: str) -> None:  # noqa: ARG002
        """Take a node out because the engine could not make its branch; `reason` is of `LOST`."""
        self.drop(state, node)

    def worth(self, state: S, node: Node) -> float:  # noqa: ARG002
        """How much the node's K/V is worth: what is worth least is released when pages run short.

        It is made again when the search returns to it, so this decides about time, never about the
        result. Worth more also runs first where a step can't hold a whole batch.
        """
        return node.value if node.visits else node.score or 0.0

    def restored(self, state: S) -> None:
        """Called once after a state was read from a checkpoint: rebuild what is not stored."""

    def check_advance(self, state: S, node: Node) -> None:  # noqa: ARG002
        """Whether `node` can become the root; a search that can says so by not raising.

        Raises:
            SearchError: this search can't advance its root, or not to this node.
        """
        raise SearchError(f"{self.name} can't advance its root; MCTS can")

    def advance(self, state: S, node: Node) -> None:
        """Make `node` the root: the search goes on below it and keeps what it knows there.

        Raises:
            SearchError: see `check_advance`.
        """
        self.check_advance(state, node)

    def with_options(self, **changes: Any) -> Search[S]:
        """A copy with some options changed, checked as at construction.

        Raises:
            InvalidArgument: an option is unknown, can't change while a search runs, or has a bad
                value.
        """
        known = {f.name for f in fields(self)}
        for name in changes:
            if name not in known:
                raise InvalidArgument(f"{self.name} has no option {name!r}; it has {sorted(known)}")
            if name not in self.live_options:
                raise InvalidArgument(
                    f"{name} can't change while {self.name} runs; these can: "
                    f"{', '.join(sorted(self.live_options)) or 'none'}"
                )
        return replace(self, **changes)

    def node_key(self, node: Node, ordinal: int) -> int | None:
        """Key of the attempt `ordinal` below `node`: a hash of the search's seed and the path.

        The same path gets the same key in every run, whatever the batch it falls into. O(depth).
        """
        if self.seed is None:
            return None
        path = ",".join(map(str, (*node.ordinals(), ordinal)))
        digest = hashlib.blake2b(f"{self.seed}:{path}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    @staticmethod
    def open_trial(state: State, action: Action, node: Node, **details: Any) -> Trial:
        """Number a trial and remember it until it is told."""
        trial = Trial(state.next_trial, action, node, **details)
        state.next_trial += 1
        state.pending[trial.id] = trial
        return trial

    @staticmethod
    def take_trials(state: State, results: Sequence[Outcome]) -> list[tuple[Trial, Outcome]]:
        """Pair outcomes with pending trials, in trial order; stale ones lose their branch."""
        pairs: list[tuple[Trial, Outcome]] = []
        for outcome in sorted(results, key=lambda r: r.trial_id):
            trial = state.pending.pop(outcome.trial_id, None)
            if trial is None:
                state.tree.orphan(outcome.branch)
            else:
                pairs.append((trial, outcome))
        return pairs
