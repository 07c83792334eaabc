"""Draft model: a smaller model guesses what the larger one will say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dendrite_engine.errors import DendriteError, InvalidArgument
from dendrite_engine.sampling_params import MAX_LOGPROBS, SamplingParams
from dendrite_engine.speculation.base import (
    Chances,
    DraftRequest,
    Proposer,
    SampledPath,
    Speculation,
)

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.models.config import ModelConfig
    from dendrite_engine.tree.branch import Branch


@dataclass(frozen=True)
class DraftModel(Speculation):
    """Guesses by a second, smaller model with the same tokenizer (Leviathan et al. 2023, Chen et
    al. 2023).

    Its tokens are drawn with the very random numbers that the verified model will use at the same
    positions, so where the two models agree about the distribution they mostly agree about the
    token too (common random numbers; Daliri et al. 2024 study such drafts, arXiv 2408.07978).

    The draft engine keeps one branch for each branch that is drafted for, brings it up to date by
    rollback and extend, and is free for other work meanwhile.

    Attributes:
        engine: the draft model's engine.
        tokens: length of a guess at most.
        width: continuations of a branch at most: that many of the draft model's likeliest next
            tokens, each continued; more than 1 makes a tree.
        adaptive: shorten guesses, down to none, where they are seldom right.
        rejection: verify sampled guesses by rejection (see `speculation.rejection`): more of them
            are kept, and the tokens have the distribution of plain decoding, but are others. At
            temperature 0 it makes no difference. Needs width 1, and an engine on the CPU path.
        cost: a draft step as a share of a step of the verified model; None: the models' sizes.

    Raises:
        InvalidArgument: a value is out of range.
    """

    engine: Engine
    tokens: int = 5
    width: int = 1
    adaptive: bool = True
    rejection: bool = False
    cost: float | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        if self.cost is not None and not 0 <= self.cost <= 1:
            raise InvalidArgument(f"DraftModel.cost must be in 0..1, got {self.cost!r}")

        if self.rejection and self.width > 1:
            raise InvalidArgument(
                f"DraftModel.rejection verifies chains: width must be 1, got {self.width}. Trees "
                "are verified by plain decoding's draws (rejection=False)"
            )

    def check(self, engine: Engine) -> None:
        """See Speculation.check."""
        if self.rejection and not engine.report()["device"].startswith("cpu:"):
            raise InvalidArgument(
                "DraftModel.rejection reads whole distributions on the host, which the device path "
                "does not offer; leave it False there"
            )
        if engine is self.engine:
            raise InvalidArgument(
                "DraftModel.engine is the engine that it is to draft for; make a second one"
            )
        if self.engine.is_closed:
            raise InvalidArgument("DraftModel.engine is closed")
        if engine.tokenizer.fingerprint != self.engine.tokenizer.fingerprint:
            raise InvalidArgument(
                f"the draft model {self.engine.model_path.name} has another tokenizer than "
                f"{engine.model_path.name}: their token ids do not mean the same text"
            )

    def cost_for(self, engine: Engine) -> float:
        """See `cost`; with None the ratio of the weights that a step reads."""
        if self.cost is not None:
            return self.cost
        return min(_step_weights(self.engine.model_config) / _step_weights(engine.model_config), 1)

    def start(self) -> Proposer:
        """See Speculation.start."""
        return _Drafter(self.engine, self.width, self.rejection)


def _step_weights(config: ModelConfig) -> int:
    """Weights that a decode step reads, roughly."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = config.hidden_size * (heads + config.num_heads * config.head_dim)
    layer += 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + config.hidden_size * config.vocab_size


@dataclass(slots=True)
class _Mirror:
    """A branch of the draft engine that follows a branch of the other engine."""

    branch: Branch
    tokens: list[int]  # what it holds


class _Drafter:
    """Keeps a mirror of every branch and generates on all of them at once."""

    def __init__(self, engine: Engine, width: int, rejection: bool) -> None:
        self._engine, self._width, self._rejection = engine, width, rejection
        self._mirrors: dict[int, _Mirror] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[list[int]]]:
        """See Proposer.propose; the draft model's forward passes run here."""
        found: list[list[list[int]]] = [[] for _ in requests]
        ready: list[int] = []
        for place, request in enumerate(requests):
            if self._follow(request):
                ready.append(place)
        if ready:
            some = [requests[place] for place in ready]
            for place, paths in zip(ready, self._generate(some), strict=True):
                found[place] = paths
        return found

    def forget(self, key: int) -> None:
        """See Proposer.forget."""
        mirror = self._mirrors.pop(key, None)
        if mirror is not None:
            mirror.branch.prune()

    def _follow(self, request: DraftRequest) -> bool:
        """Bring the mirror up to date; False where the draft engine can't hold it."""
        tokens, mirror = request.tokens, self._mirrors.get(request.key)
        if len(tokens) + request.limit > self._engine.max_context:
            return False
        try:
            if mirror is None:
                branch = self._engine.prompt(tokens)
                mirror = self._mirrors[request.key] = _Mirror(branch, list(tokens))
                branch._key = request.path_key  # the same draws, see DraftModel
                return True
            same = _common_prefix(mirror.tokens, tokens)
            if same < len(mirror.tokens):
                mirror.branch.rollback(len(mirror.tokens) - same)
                del mirror.tokens[same:]
            if same < len(tokens):
                mirror.branch.extend(tokens[same:])
                mirror.tokens += tokens[same:]
        except DendriteError:  # no room, most likely: there will be some later
            self.forget(request.key)
            return False
        return True

    def _generate(self, requests: Sequence[DraftRequest]) -> list[list[list[int]]]:
        """Continuations of each request from its mirror: the drawn one, then the others."""
        mirrors = [self._mirrors[request.key] for request in requests]
        paths: Sequence[list[list[int]]]
        if self._rejection and any(r.params.temperature > 0 for r in requests):
            paths = self._sample([m.branch for m in mirrors], requests)
        elif self._width == 1:
            trunks = self._run([m.branch for m in mirrors], [_params(r, r.limit) for r in requests])
            paths = [[trunk] for trunk in trunks]
        else:
            paths = self._generate_trees(mirrors, requests)
        for mirror, found in zip(mirrors, paths, strict=True):
            mirror.tokens += found[0]
        return paths

    def _sample(
        self, branches: Sequence[Branch], requests: Sequence[DraftRequest]
    ) -> list[list[list[int]]]:
        """Chains, with the distributions that their tokens are drawn from: the draft model's
        likeliest tokens at the request's temperature. Greedy requests need none.
        """
        params = [_known_distribution(request) for request in requests]
        temperatures = {b.id: p.temperature for b, p in zip(branches, params, strict=True)}
        tokens: dict[int, list[int]] = {branch.id: [] for branch in branches}
        chances: dict[int, list[Chances]] = {branch.id: [] for branch in branches}
        for event in self._engine.generate(branches, params):
            if event.token_id is not None:
                tokens[event.branch.id].append(event.token_id)
                if temperature := temperatures[event.branch.id]:
                    ids = np.array([other.token_id for other in event.top], np.int64)
                    logits = np.array([other.logprob for other in event.top]) / temperature
                    weights = np.exp(logits - logits.max())
                    chances[event.branch.id].append(Chances(ids, weights / weights.sum()))
        return [
            [SampledPath(tokens[b.id], chances[b.id]) if temperatures[b.id] else tokens[b.id]]
            for b in branches
        ]

    def _generate_trees(
        self, mirrors: Sequence[_Mirror], requests: Sequence[DraftRequest]
    ) -> list[list[list[int]]]:
        """`width` first tokens for each, all continued in one batch."""
        branches = [mirror.branch for mirror in mirrors]
        drawn: dict[int, list[int]] = {branch.id: [] for branch in branches}
        likely: dict[int, list[int]] = {branch.id: [] for branch in branches}
        params = [_params(r, 1).replace(logprobs=self._width) for r in requests]
        for event in self._engine.generate(branches, params):
            if event.token_id is not None:
                drawn[event.branch.id].append(event.token_id)
                likely[event.branch.id] = [other.token_id for other in event.top]
        paths: list[list[list[int]]] = [[drawn[branch.id]] for branch in branches]
        longer: list[tuple[list[int], Branch, SamplingParams]] = []
        forks: list[Branch] = []
        try:
            for branch, request, found in zip(branches, requests, paths, strict=True):
                base = len(request.tokens)
                others = [t for t in likely[branch.id] if t not in found[0]][: self._width - 1]
                for token in others:
                    (fork,) = branch.fork(at=base)
                    forks.append(fork)
                    fork._key = request.path_key
                    fork.extend([token])
                    found.append([token])
                if request.limit > 1 and found[0]:
                    rest = _params(request, request.limit - 1)
                    ends = (branch, *forks[len(forks) - len(others) :])
                    longer += [(path, end, rest) for path, end in zip(found, ends, strict=True)]
            runs = self._run([end for _, end, _ in longer], [rest for _, _, rest in longer])
            for (path, _, _), more in zip(longer, runs, strict=True):
                path += more
        finally:
            for fork in forks:
                fork.prune()
        return paths

    def _run(self, branches: Sequence[Branch], params: Sequence[SamplingParams]) -> list[list[int]]:
        """Tokens that each branch generates; fewer where it has to end early."""
        if not branches:
            return []
        return [done.token_ids for done in self._engine.complete(branches, list(params))]


def _params(request: DraftRequest, count: int) -> SamplingParams:
    """How the draft model draws: as the other one, but never stopping."""
    return request.params.replace(
        max_tokens=count, ignore_eos=True, stop=(), stop_token_ids=(), logprobs=0, seed=request.seed
    )


def _known_distribution(request: DraftRequest) -> SamplingParams:
    """Parameters under which the reported alternatives are all that can be drawn."""
    params = request.params
    most = min(params.top_k or MAX_LOGPROBS, MAX_LOGPROBS)
    return SamplingParams(
        temperature=params.temperature, top_k=most, logprobs=most, seed=request.seed,
        max_tokens=request.limit, ignore_eos=True,
    )  # fmt: skip


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with. They differ near their ends, so the search starts there."""
    count = min(len(a), len(b))
    low = max(0, count - 128)
    if list(a[:low]) != list(b[:low]):
        low = 0
    for place in range(low, count):
        if a[place] != b[place]:
            return place
    return count
