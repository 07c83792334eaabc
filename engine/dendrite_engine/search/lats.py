"""LATS-style search: MCTS in episodes, each of which has read what was learnt from the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.base import Outcome, Trial
from dendrite_engine.search.budget import BatchPlan
from dendrite_engine.search.checks import whole
from dendrite_engine.search.mcts import MCTS, MCTSState
from dendrite_engine.search.tree import Node

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class LATSState(MCTSState):
    """State of a search in episodes.

    Attributes:
        start: the branch's own node, below which the episodes begin.
        told: simulations told in this episode.
        episode: episodes begun, the present one included.
        reflecting: the reflection has been asked for and not told.
        reflections: what the model wrote about episodes that failed, oldest first.
        ids: tokens of the option texts, by name.
    """

    start: Node | None = None
    told: int = 0
    episode: int = 1
    reflecting: bool = False
    reflections: list[tuple[int, ...]] = field(default_factory=list)
    ids: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LATS(MCTS):
    """MCTS with reflection, after LATS (Zhou et al., "Language Agent Tree Search Unifies Reasoning,
    Acting and Planning in Language Models", ICML 2024; reflections are those of Shinn et al.,
    "Reflexion", NeurIPS 2023).

    An episode is an MCTS of `simulations` simulations. Where it ends without the `target`, the
    model reflects: the best path of the episode is forked, `reflect` is appended, and a reflection
    is sampled. The next episode begins below the search's root with

        heading + the last `memory` reflections + resume

    as forced tokens, so that later attempts have read them; the prompt's KV is shared by all
    episodes. Trees of earlier episodes are kept only as the path to the best node. All other
    options are those of `MCTS`.

    Args:
        simulations: of an episode.
        episodes: at most; the search is then exhausted.
        reflect: what asks for a reflection, after a failed attempt.
        reflection_tokens: length of a reflection, at most.
        heading: what comes before the reflections.
        resume: what comes after them, before the next attempt.
        memory: reflections that an attempt sees.

    Raises:
        InvalidArgument: an option is out of range, or `target` is missing; the message names it.
    """

    name: ClassVar[str] = "lats"

    target: float | None = 1.0
    simulations: int = 16
    episodes: int = 4
    reflect: str = "\nThis attempt failed. What went wrong, in one sentence?\n"
    reflection_tokens: int = 32
    heading: str = "\nNotes from earlier attempts:\n"
    resume: str = "\nNext attempt:\n"
    memory: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("simulations", "episodes", "reflection_tokens", "memory"):
            whole(name, getattr(self, name), 1)
        for name in ("reflect", "heading", "resume"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text:
                raise InvalidArgument(f"{name} must be a text that is not empty, got {text!r}")
        if self.target is None:
            raise InvalidArgument("target says when an attempt has not failed; give one")

    # -- the ask/tell contract ------------------------------------------------------------------

    def init(self, root: Branch) -> LATSState:
        """The first episode begins at the root itself."""
        plain = super().init(root)
        state = LATSState(plain.tree, start=plain.tree.root)
        encode = root.engine.tokenizer.encode
        for name in ("reflect", "heading", "resume"):
            state.ids[name] = tuple(encode(getattr(self, name)))
        return state

    def plan(self, state: MCTSState) -> BatchPlan:
        """Simulations of the episode that are left, or one reflection."""
        episode = self._own(state)
        left = self.simulations - episode.told
        if left <= 0:
            return BatchPlan(1, 1, len(episode.ids["reflect"]) + self.reflection_tokens, 1)
        plan = super().plan(state)
        return BatchPlan(min(plan.trials, left), 1, plan.tokens, plan.nodes)

    def ask(self, state: MCTSState, n: int) -> list[Trial]:
        """Simulations of this episode; after them one reflection."""
        episode = self._own(state)
        if episode.told < self.simulations:
            trials = super().ask(state, min(n, self.simulations - episode.told))
            if trials or state.pending or state.reason != "exhausted":
                return trials
            state.reason = None  # this episode's tree alone is exhausted
            episode.told = self.simulations
        if state.reason is not None or state.pending or n < 1:
            return []
        if episode.episode >= self.episodes:
            state.reason = "exhausted"
            return []
        return [self._ask_reflection(episode)]

    def tell(self, state: MCTSState, results: Sequence[Outcome]) -> None:
        """As MCTS; a reflection ends the episode."""
        episode = self._own(state)
        if not episode.reflecting:
            known = len({outcome.trial_id for outcome in results} & state.pending.keys())
            was_over = state.reason is not None
            super().tell(state, results)
            episode.told += known
            if state.reason == "exhausted" and not was_over:  # the next episode has its own root
                state.reason, episode.told = None, self.simulations
            return
        for trial, outcome in self.take_trials(state, results):
            episode.reflecting = False
            state.tree.orphan(outcome.branch)
            written = () if outcome.lost else outcome.token_ids[len(trial.forced) :]
            self._begin_episode(episode, written)

    def advance(self, state: MCTSState, node: Node) -> None:
        """As MCTS; later episodes begin at the new root, too."""
        super().advance(state, node)
        self._own(state).start = node

    # -- episodes -------------------------------------------------------------------------------

    @staticmethod
    def _own(state: MCTSState) -> LATSState:
        if not isinstance(state, LATSState):
            raise InvalidArgument(f"LATS wants a state that LATS.init made, got {state!r}")
        return state

    def _ask_reflection(self, state: LATSState) -> Trial:
        """Have the model say what was wrong with the best attempt of this episode."""
        root = state.tree.root
        tried = [n for n in root.subtree() if n.branch is not None and n.status != "pruned"]
        attempt = max(
            tried,
            key=lambda n: (n.score if n.score is not None else -math.inf, -n.id),
            default=root,
        )
        state.reflecting = True
        state.note("search", attempt, {"state": "reflect", "episode": state.episode})
        return self.open_trial(
            state,
            "expand",
            attempt,
            ordinal=-state.episode,
            params=self.sampling_for(self.reflection_tokens),
            forced=state.ids["reflect"],
            key=self.node_key(root, -state.episode),
            valued=False,
        )

    def _begin_episode(self, state: LATSState, written: tuple[int, ...]) -> None:
        """Release the failed episode but for the leader's path; grow the root of the next."""
        root, start = state.tree.root, state.start or state.tree.root
        if written:
            state.reflections.append(written)
        best = set(state.leader.path()) if state.leader is not None else set()
        for node in root.subtree():
            node.exhausted = True
            state.tree.dirty.add(node.id)
            if node not in best and not self.keep_tree:
                state.tree.release(node)
        shown = state.reflections[-self.memory :]
        tokens = state.ids["heading"] + tuple(t for ids in shown for t in ids) + state.ids["resume"]
        fresh = state.tree.add(
            start, tokens, (math.nan,) * len(tokens), ordinal=start.attempts + state.episode
        )
        state.tree.root = fresh
        state.episode, state.told = state.episode + 1, 0
