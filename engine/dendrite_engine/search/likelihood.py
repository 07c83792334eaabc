"""How likely the model finds given runs of tokens after a branch: the priors of actions.

Runs are scored as a trie, a token deeper in each forward: a prefix that several runs have in common
is computed once, for all branches of the batch together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dendrite_engine.search.keeper import BRANCH_ERRORS, BranchKeeper
from dendrite_engine.search.tree import Candidate, Node

if TYPE_CHECKING:
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.types import Completion

Complete = Callable[[Sequence["Branch"], Sequence["SamplingParams"]], Sequence["Completion"]]
Run = tuple[int, ...]

_CERTAIN = 1e9  # a logit bias that leaves one token only


@dataclass(slots=True)
class _Prefix:
    """A prefix of some runs: the branch that ends with it, and what was found so far."""

    owner: Node
    branch: Branch
    token_ids: Run
    logprobs: tuple[float, ...]


class RunScorer:
    """Ranks the runs of nodes by their log-probability.

    Args:
        keeper: makes and prunes the branches that are needed meanwhile.
        complete: decodes branches together, one completion each, errors inside.

    Attributes:
        tokens_used: tokens decoded for each node, by its id.
    """

    def __init__(self, keeper: BranchKeeper, complete: Complete) -> None:
        self._keeper, self._complete = keeper, complete
        self.tokens_used: dict[int, int] = {}

    def rank(
        self, wanted: Sequence[tuple[Node, Sequence[Run]]]
    ) -> dict[int, tuple[Candidate, ...] | Exception | str]:
        """Candidates by node id, likeliest first (ties: as given).

        A node whose branch fails gets the error, or the finish reason that stands for it. As many
        forwards as the longest run has tokens, each of one row per different prefix.
        """
        runs = {node.id: tuple(own) for node, own in wanted}
        found: dict[int, dict[Run, Candidate]] = {node.id: {} for node, _ in wanted}
        failed: dict[int, Exception | str] = {}
        level = self._fork([(node, None, ()) for node, _ in wanted], failed)
        while level:
            level = self._deepen(level, runs, found, failed)
        ranked: dict[int, tuple[Candidate, ...] | Exception | str] = dict(failed)
        for node_id, own in found.items():
            if node_id not in failed:
                in_order = [own[run] for run in runs[node_id]]
                ranked[node_id] = tuple(sorted(in_order, key=lambda c: -c.logprob))
        return ranked

    def _deepen(
        self,
        level: list[_Prefix],
        runs: dict[int, tuple[Run, ...]],
        found: dict[int, dict[Run, Candidate]],
        failed: dict[int, Exception | str],
    ) -> list[_Prefix]:
        """One token further down the trie; returns the prefixes that runs go on from."""
        wanted: list[tuple[Node, _Prefix | None, Run]] = []
        for prefix in level:
            depth = len(prefix.token_ids)
            nexts = dict.fromkeys(
                run[depth]
                for run in runs[prefix.owner.id]
                if len(run) > depth and run[:depth] == prefix.token_ids
            )
            wanted += [(prefix.owner, prefix, (token,)) for token in nexts]
        grown = self._fork(wanted, failed)
        for prefix in level:
            self._keeper.prune(prefix.branch)
        self._decode(grown, failed)
        going: list[_Prefix] = []
        for prefix in grown:
            own = runs[prefix.owner.id]
            if prefix.token_ids in own:
                found[prefix.owner.id][prefix.token_ids] = Candidate(
                    prefix.token_ids, prefix.logprobs
                )
            depth = len(prefix.token_ids)
            goes_on = any(len(r) > depth and r[:depth] == prefix.token_ids for r in own)
            if goes_on and prefix.owner.id not in failed:
                going.append(prefix)
            else:
                self._keeper.prune(prefix.branch)
        return going

    def _fork(
        self,
        wanted: Sequence[tuple[Node, _Prefix | None, Run]],
        failed: dict[int, Exception | str],
    ) -> list[_Prefix]:
        made: list[_Prefix] = []
        for node, above, tokens in wanted:
            if node.id in failed:
                continue
            try:
                if above is None:
                    made.append(_Prefix(node, self._keeper.fork_end(node), (), ()))
                else:
                    fork = self._keeper.keep(above.branch.fork(1)[0])
                    made.append(_Prefix(node, fork, above.token_ids + tokens, above.logprobs))
            except BRANCH_ERRORS as error:
                failed[node.id] = error
        return made

    def _decode(self, grown: list[_Prefix], failed: dict[int, Exception | str]) -> None:
        """Write the last token of each prefix onto its branch, and keep what the model thinks."""
        from dendrite_engine.sampling_params import SamplingParams

        params = [
            SamplingParams(
                max_tokens=1, ignore_eos=True, logit_bias={prefix.token_ids[-1]: _CERTAIN}
            )
            for prefix in grown
        ]
        done = self._complete([prefix.branch for prefix in grown], params)
        for prefix, completion in zip(grown, done, strict=True):
            if completion.logprobs:
                prefix.logprobs += (completion.logprobs[0],)
                owner = prefix.owner.id
                self.tokens_used[owner] = self.tokens_used.get(owner, 0) + 1
            else:
                reason = completion.finish_reason or "error"
                failed.setdefault(prefix.owner.id, completion.error or reason)
