"""The runner: does what trials ask for with the engine, one batch at a time.

All children of all trials of a batch are forked first and decoded in one job, so that every live
leaf shares each forward; the evaluator is then called once for the whole batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import NumericError, OutOfPages, StaleBranch
from dendrite_engine.search.base import ENDED, Outcome, Trial
from dendrite_engine.search.evaluators import Evaluator, EvaluatorGuard, bind
from dendrite_engine.search.keeper import BRANCH_ERRORS, BranchKeeper, held_by
from dendrite_engine.search.likelihood import RunScorer
from dendrite_engine.search.pressure import run_in_parts
from dendrite_engine.search.shortage import Shortage
from dendrite_engine.search.tree import Candidate, Node
from dendrite_engine.search.work import Work

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.jobs import Job
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.types import Completion, FinishReason, TokenAlternative


class Runner:
    """Carries out trials.

    Args:
        engine: where the branches live.
        root: the branch that the search starts from; never pruned here.
        evaluator: values children; `None` leaves `Outcome.value` empty.

    Attributes:
        keeper: makes and prunes the branches.
    """

    def __init__(self, engine: Engine, root: Branch, evaluator: Evaluator | None = None) -> None:
        self.keeper = BranchKeeper(engine)
        self.settle = self.keeper.settle
        self._pages = Shortage(engine, self.keeper)
        self._part: Sequence[Work] = ()  # what runs now
        self._engine = engine
        self._eos = frozenset(engine.model_config.eos_token_ids)
        self._guard = None if evaluator is None else EvaluatorGuard(bind(evaluator, root))
        # guards _job and _cancelled: cancel() comes from other threads
        self._lock = threading.Lock()
        self._job: Job | None = None
        self._cancelled = False

    @property
    def evaluator_tokens(self) -> int:
        """Tokens that a model computed for the evaluator so far."""
        return 0 if self._guard is None else self._guard.tokens

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Carry out a batch of trials; outcomes come in the order of the trials.

        A trial that fails alone (no pages, its branch pruned meanwhile, NaN logits, its evaluation
        raised) says so in its outcome. Two jobs at most: the children, then their rollouts. Where
        pages run short, other branches are released and what fell short runs again, see `pressure`.

        Raises:
            DendriteError: the engine can't go on.
            Exception: the evaluator is broken (see `EvaluatorGuard`). Branches of this batch are
                pruned.
        """
        before = set(self.keeper.live)
        works = [Work(trial, Outcome(trial.id)) for trial in trials]
        try:
            run_in_parts(
                works,
                admit=self._pages.admit,
                run=self._run_part,
                reset=self._pages.reset,
                give_up=self._pages.give_up,
                relieve=self._pages.relieve,
            )
        except BaseException:
            self.keeper.prune_all(keep=before)
            raise
        return [work.outcome for work in works]

    def _run_part(self, works: Sequence[Work]) -> None:
        self._part = works
        self._look(works)
        self._score(works)
        expanding = [w for w in works if w.trial.action == "expand" and w.unfinished]
        self._fork(expanding)
        self._begin(expanding)
        self._decode([w for w in expanding if w.unfinished])
        self._roll_out(expanding)
        self._evaluate([w for w in works if w.trial.action != "look" and w.trial.valued])
        for work in works:
            if work.rollout is not None:
                self.keeper.prune(work.rollout)
                work.rollout = None

    def cancel(self) -> None:
        """End the running job after its present forward, and all later ones at once. Any thread."""
        with self._lock:
            self._cancelled = True
            if self._job is not None:
                self._job.cancel()

    # -- evaluator ------------------------------------------------------------------------------

    def memory(self) -> dict[str, Any]:
        """What a checkpoint has to know of the evaluator."""
        return {} if self._guard is None else self._guard.memory()

    def recall(self, memory: Mapping[str, Any]) -> None:
        """Take what `memory` gave before a checkpoint."""
        if self._guard is not None:
            self._guard.recall(memory)

    # -- steps of a batch -----------------------------------------------------------------------

    def _look(self, works: Sequence[Work]) -> None:
        """Look up next tokens in one forward: for `look` trials, and for children begun by rank."""
        wanting = [w for w in works if w.trial.action == "look" or _lacks_alternatives(w.trial)]
        nodes = {w.trial.node.id: w.trial.node for w in wanting}
        if not nodes:
            return
        k = min(max(w.trial.k for w in wanting), self._engine.model_config.vocab_size)
        found = self._top_tokens(list(nodes.values()), k)
        for work in wanting:
            answer = found[work.trial.node.id]
            if isinstance(answer, Exception):
                work.fail(answer)
            elif work.trial.action == "look":
                work.outcome.alternatives = answer
                work.outcome.tokens_used = 1
            else:
                work.trial.node.alternatives = answer

    def _score(self, works: Sequence[Work]) -> None:
        """Rank the runs that children are to begin with, of all nodes that don't know it yet."""
        wanting = [w for w in works if w.trial.runs and w.trial.node.candidates is None]
        if not wanting:
            return
        nodes = {w.trial.node.id: (w.trial.node, w.trial.runs) for w in wanting}
        scorer = RunScorer(self.keeper, self._complete)
        ranked = scorer.rank(list(nodes.values()))
        for work in wanting:
            # a node's scoring is the work of the first trial that wanted it
            work.outcome.tokens_used = scorer.tokens_used.pop(work.trial.node.id, 0)
            answer = ranked[work.trial.node.id]
            if isinstance(answer, Exception):
                work.fail(answer)
            elif isinstance(answer, str):
                work.outcome.finish_reason = answer
            else:
                work.trial.node.candidates = answer

    def _top_tokens(
        self, nodes: Sequence[Node], k: int
    ) -> dict[int, tuple[TokenAlternative, ...] | Exception]:
        """Alternatives by node id; one branch's failure stays its own."""
        try:
            rows = self._engine.top_tokens([_at_end(node) for node in nodes], k)
        except (*BRANCH_ERRORS, NumericError) as error:
            if len(nodes) == 1:
                return {nodes[0].id: error}
            found: dict[int, tuple[TokenAlternative, ...] | Exception] = {}
            for node in nodes:
                found.update(self._top_tokens([node], k))
            return found
        return {node.id: tuple(row) for node, row in zip(nodes, rows, strict=True)}

    def _fork(self, works: Sequence[Work]) -> None:
        for work in works:
            try:
                again = work.key is not None
                key = work.key if again else work.trial.key
                fork = self.keeper.fork_end(work.trial.node, key, counted=not again)
                work.outcome.branch = fork
            except BRANCH_ERRORS as error:  # noqa: PERF203 one failure is one trial's
                work.fail(error)

    def _begin(self, works: Sequence[Work]) -> None:
        """Give children the tokens that they begin with: forced ones, or those of their rank."""
        begun = [
            (work, first)
            for work in works
            if work.unfinished and (first := self._beginning(work)) is not None
        ]
        errors = self.keeper.extend([(w.branch, *run) for w, run in begun])
        for (work, run), error in zip(begun, errors, strict=True):
            if error is None:
                work.begin(run, self._eos)
            else:
                work.fail(error)

    @staticmethod
    def _beginning(work: Work) -> Candidate | None:
        """What a child begins with; `None` where all of it is sampled, or its rank is too high."""
        trial, rank = work.trial, work.trial.alternative
        run = Candidate(trial.forced, (math.nan,) * len(trial.forced))
        if rank is None:
            return run if trial.forced else None
        known = trial.node.candidates if trial.runs else trial.node.alternatives
        if rank >= len(known or ()):  # a small vocabulary has no more
            work.outcome.finish_reason = "no_alternative"
            return None
        chosen = (known or ())[rank]
        if isinstance(chosen, Candidate):
            return Candidate(run.token_ids + chosen.token_ids, run.logprobs + chosen.logprobs)
        return Candidate((*run.token_ids, chosen.token_id), (*run.logprobs, chosen.logprob))

    def _decode(self, works: Sequence[Work]) -> None:
        """Decode all children in one job."""
        completions = self._complete([w.branch for w in works], [w.params for w in works])
        for work, completion in zip(works, completions, strict=True):
            outcome = work.outcome
            outcome.token_ids += tuple(completion.token_ids)
            outcome.logprobs += tuple(completion.logprobs)
            outcome.tokens_used += len(completion.token_ids)
            outcome.finish_reason = completion.finish_reason
            outcome.text = completion.text
            if completion.error is not None:
                outcome.error = f"{type(completion.error).__name__}: {completion.error}"

    def _roll_out(self, works: Sequence[Work]) -> None:
        """Decode a continuation of every child whose text goes on, in one job."""
        going: list[tuple[Work, Branch, SamplingParams]] = []
        for work in works:
            params, outcome = work.trial.rollout, work.outcome
            if params is None or outcome.lost or outcome.finish_reason in ENDED:
                continue
            try:
                work.rollout = self.keeper.keep(work.branch.fork(1)[0])
            except BRANCH_ERRORS as error:
                work.fail(error)
                continue
            going.append((work, work.rollout, params))
        completions = self._complete([b for _, b, _ in going], [p for _, _, p in going])
        for (work, _, _), completion in zip(going, completions, strict=True):
            work.outcome.tokens_used += len(completion.token_ids)
            if completion.finish_reason == "cancelled":
                work.outcome.finish_reason = "cancelled"
            elif completion.error is not None:  # what was decoded before it is valued all the same
                work.short_rollout = completion.finish_reason == "out_of_pages"
                work.outcome.error = f"rollout: {completion.error}"

    def _evaluate(self, works: Sequence[Work]) -> None:
        """Call the evaluator once for all children that are left, and for `evaluate` trials."""
        if self._cancelled:
            for work in works:
                work.outcome.finish_reason = "cancelled"
        if self._guard is None or self._cancelled:
            return
        subjects: list[tuple[Work, Branch]] = []
        for work in works:
            subject = work.rollout or work.outcome.branch
            if work.trial.action == "evaluate":
                subject = work.trial.node.branch
            if work.outcome.lost:
                continue
            if subject is None or not subject.is_alive:
                work.outcome.finish_reason = "stale"
            else:
                subjects.append((work, subject))
        values = self._guard([subject for _, subject in subjects])
        for (work, _), valued in zip(subjects, values, strict=True):
            work.outcome.value = valued.value
            work.outcome.error = valued.error or work.outcome.error

    # -- decoding -------------------------------------------------------------------------------

    def _complete(
        self, branches: Sequence[Branch], params: Sequence[SamplingParams]
    ) -> list[Completion]:
        """Decode branches together; one that was pruned meanwhile or is full ends by itself."""
        done: dict[int, Completion] = {}
        left = list(zip(branches, params, strict=True))
        while left:
            left = [(b, p) for b, p in left if not self._unfit(b, done)]
            try:
                job = self._submit(left)
            except (StaleBranch, OutOfPages) as error:
                if isinstance(error, StaleBranch) and all(b.is_alive for b, _ in left):
                    raise  # nobody pruned it: a branch of another engine
                if isinstance(error, OutOfPages):
                    done.update((b.id, _ended(b, "out_of_pages", error)) for b, _ in left)
                    break
                continue
            if job is None:
                done.update((b.id, _ended(b, "cancelled")) for b, _ in left)
                break
            try:
                done.update((c.branch.id, c) for c in job.result())
            finally:
                with self._lock:
                    self._job = None
            break
        return [done[branch.id] for branch in branches]

    def _unfit(self, branch: Branch, done: dict[int, Completion]) -> bool:
        try:
            if branch.num_tokens < self._engine.max_context:
                return False
            done[branch.id] = _ended(branch, "context_full")
        except StaleBranch as error:
            done[branch.id] = _ended(branch, "stale", error)
        return True

    def _worths(self, branches: Sequence[Branch]) -> list[float]:
        """What the nodes above these branches are worth: who runs first where not all can."""
        worth = self.keeper.worth
        above = {w.branch.id: w.trial.node for w in self._part if w.outcome.branch is not None}
        above |= {w.rollout.id: w.trial.node for w in self._part if w.rollout is not None}
        return [worth(above[branch.id]) if branch.id in above else 0.0 for branch in branches]

    def _submit(self, rows: Sequence[tuple[Branch, SamplingParams]]) -> Job | None:
        """Start the job, unless the search was cancelled before."""
        with self._lock:
            if self._cancelled or not rows:
                return None
            branches, params = [b for b, _ in rows], [p for _, p in rows]
            self._job = self._engine.submit(branches, params, values=self._worths(branches))
            return self._job


def _lacks_alternatives(trial: Trial) -> bool:
    """Whether a child is to begin with a rank that its node has not looked up."""
    known = len(trial.node.alternatives)
    return trial.alternative is not None and not trial.runs and trial.alternative >= known


def _at_end(node: Node) -> Branch:
    """The node's branch, still ending where the node ends."""
    branch = held_by(node)
    if branch.num_tokens != node.span[1]:
        raise StaleBranch(
            f"branch {branch.id} was extended to {branch.num_tokens} tokens while its node, which "
            f"ends at {node.span[1]}, was searched"
        )
    return branch


def _ended(branch: Branch, reason: FinishReason, error: Exception | None = None) -> Completion:
    from dendrite_engine.types import Completion  # at run time only here: keeps the import cheap

    details: dict[str, Any] = {"finish_reason": reason, "error": error}
    return Completion(branch, **details)
