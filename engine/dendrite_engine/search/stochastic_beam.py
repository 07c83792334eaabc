"""Stochastic beam search: texts sampled without replacement by the Gumbel-top-k trick."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search.checks import number, whole
from dendrite_engine.search.token_beam import Candidate, TokenSearch, TokenState
from dendrite_engine.search.tree import Node, Tree

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


@dataclass(slots=True)
class StochasticState(TokenState):
    """State of a stochastic beam search; `total` is under the distribution sampled from.

    Attributes:
        perturbed: Gumbel-perturbed log-probability by node id: what beams compete by.
        threshold: the greatest perturbed log-probability that fell out: that of the (width + 1)-th
            text. `-inf` while nothing fell out.
        seed: of the draws.
        vocab: size of the vocabulary.
    """

    perturbed: dict[int, float] = field(default_factory=dict)
    threshold: float = -math.inf
    seed: int = 0
    vocab: int = 0


@dataclass(frozen=True, kw_only=True)
class StochasticBeam(TokenSearch[StochasticState]):
    """Stochastic beam search: `width` different texts, sampled from the model without replacement.

    Each text has its log-probability phi and a perturbed one, G = phi + Gumbel noise; the `width`
    greatest G of all texts are a sample without replacement. They are found top down: the children
    of a beam draw G' ~ Gumbel(phi'), and are shifted so that their maximum is the beam's G:

        G~ = -log(exp(-G) - exp(-max G') + exp(-G'))

    The greatest G~ go on; complete texts keep theirs and compete with the beams. (Kool, van Hoof &
    Welling, "Stochastic Beams and Where to Find Them", ICML 2019, whose appendix has the
    numerically stable form.) `best` is the likeliest text found;
    `SearchResult.found` has all of them by G, so that the first is one plain sample of the model,
    and `inclusion` weighs them for unbiased estimates.

    Args:
        width: texts.
        max_tokens: longest text.
        temperature: divides the logits of what is sampled from.
        candidates: next tokens of a beam that can be chosen, the likeliest first, their
            probabilities renormalised; `None` for the whole vocabulary, which costs about 0.1 s a
            beam and step with 49K tokens.

    Raises:
        InvalidArgument: an option is out of range; the message names it.
    """

    name: ClassVar[str] = "stochastic-beam"

    temperature: float = 1.0
    candidates: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number("temperature", self.temperature, 0, above=True)
        if self.candidates is not None:
            whole("candidates", self.candidates, 1)
            if self.candidates < self.width:
                raise InvalidArgument(
                    f"candidates={self.candidates} must be at least width={self.width}"
                )

    def init(self, root: Branch) -> StochasticState:
        """One live beam, the root, with G drawn from Gumbel(0).

        Raises:
            ContextTooLong: the root fills the model's context.
        """
        state = StochasticState(Tree(root))
        self._begin(state, root)
        state.seed = root.engine.config.seed if self.seed is None else self.seed
        state.vocab = root.engine.model_config.vocab_size
        state.perturbed[0] = float(self._generator(state, state.tree.root, "root").gumbel())
        return state

    def best(self, state: StochasticState) -> Node:
        """The likeliest complete text, else the likeliest live beam."""
        nodes = state.finished or state.live
        if not nodes:
            return state.fallen or state.tree.root
        return max(nodes, key=lambda node: (node.score or 0.0, -node.id))

    def rank(self, state: StochasticState, node: Node) -> float:
        """The perturbed log-probability by which beams compete."""
        return state.perturbed[node.id] + node.bonus

    def found(self, state: StochasticState) -> list[Node]:
        """Texts in the order of the sample, greatest G first."""
        return sorted([*state.finished, *state.live], key=lambda n: (-self.rank(state, n), n.id))

    def inclusion(self, state: StochasticState, node: Node) -> float:
        """Probability that a text is in the sample, given the threshold k: `P(G > k)`.

        With p the probability of a text, the sum over the sample of `p / inclusion * f(text)` is an
        unbiased estimate of the mean of f (Kool et al.).
        """
        # 1 - exp(-exp(phi - k)) without cancellation
        return -math.expm1(-math.exp(min(state.total[node.id] - state.threshold, 700.0)))

    # -- one step -------------------------------------------------------------------------------

    def _alternatives(self, state: StochasticState) -> int:
        return state.vocab if self.candidates is None else min(self.candidates, state.vocab)

    def _advance(self, state: StochasticState) -> None:
        beams, length = state.live, state.step + 1
        candidates = self._candidates(state, beams)
        entrants = [(c.key, 1, c) for c in candidates]
        holders = [(-self.rank(state, node), 0, node) for node in state.finished]
        ordered = sorted([*holders, *entrants], key=lambda entry: (entry[0], entry[1]))
        chosen, lost = ordered[: self.width], ordered[self.width :]
        if lost:
            state.threshold = max(state.threshold, -lost[0][0])
        for _, _, loser in lost:
            if isinstance(loser, Node):
                state.tree.release(loser)
        state.finished = [node for _, _, node in chosen if isinstance(node, Node)]
        made = [
            self._grow(state, beams[c.beam], c, length)
            for _, _, c in chosen
            if isinstance(c, Candidate)
        ]
        state.live = [node for node in made if node.status != "terminal"]
        state.finished += [node for node in made if node.status == "terminal"]
        self._end_step(state, beams)
        if not state.live:
            state.reason = "finished" if state.finished else "exhausted"

    def _candidates(self, state: StochasticState, beams: list[Node]) -> list[Candidate]:
        """The best `width + 1` continuations of each beam: no more can be chosen, or be lost to."""
        found: list[Candidate] = []
        for index, beam in enumerate(beams):
            alternatives = state.looked[beam.id].alternatives
            raw = np.fromiter((a.logprob for a in alternatives), np.float64, len(alternatives))
            tempered = _log_softmax(raw / self.temperature)
            totals = state.total[beam.id] + tempered
            noise = self._generator(state, beam, "next").gumbel(size=len(totals))
            shifted = condition_on_max(totals + noise, state.perturbed[beam.id])
            best = np.argsort(-shifted, kind="stable")[: self.width + 1]
            found += [
                Candidate(
                    -(float(shifted[i]) + beam.bonus),
                    index,
                    alternatives[i].token_id,
                    float(raw[i]),
                    float(totals[i]),
                )
                for i in best
            ]
        return sorted(found)

    def _grow(self, state: StochasticState, beam: Node, candidate: Candidate, length: int) -> Node:
        node = self._continue(state, beam, candidate, ordinal=candidate.token_id)
        state.perturbed[node.id] = -candidate.key - beam.bonus
        node.score = candidate.total
        node.visits, node.value_sum = 1, node.score
        if length >= state.limit or candidate.token_id in state.stop_ids:
            self._end_text(state, node)
        return node

    def _generator(self, state: StochasticState, node: Node, use: str) -> np.random.Generator:
        """Noise that depends on the seed and on the tokens of the path alone."""
        path = ",".join(map(str, node.ordinals()))
        digest = hashlib.blake2b(f"{state.seed}:{use}:{path}".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def condition_on_max(perturbed: NDArray[np.float64], top: float) -> NDArray[np.float64]:
    """Shift Gumbel variables so that their maximum is `top`; order is kept. O(n).

    Args:
        perturbed: f64 [n], finite but for `-inf`.
        top: the maximum that they are conditioned on.
    """
    gap = perturbed - perturbed.max()  # <= 0; 0 gives log(0), as it should
    with np.errstate(divide="ignore"):
        log_rest = np.where(gap > -math.log(2), np.log(-np.expm1(gap)), np.log1p(-np.exp(gap)))
    v = top - perturbed + log_rest
    shifted: NDArray[np.float64] = top - np.maximum(0.0, v) - np.log1p(np.exp(-np.abs(v)))
    return shifted


def _log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = values - values.max()
    normalised: NDArray[np.float64] = shifted - math.log(float(np.exp(shifted).sum()))
    return normalised
