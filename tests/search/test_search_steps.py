"""PRM beam, DVTS and REBASE equal plain re-implementations that know neither trees nor branches."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import pytest
from search_fakes import EOS, FakeBranch, FakeEngine

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import DVTS, REBASE, Budget, PRMBeam, start_search
from dendrite_engine.search.rebase import shares

PROMPT = [1, 2, 3]
STEP = 3  # tokens
AGGREGATES = {
    "last": lambda s: s[-1],
    "min": min,
    "product": math.prod,
    "mean": lambda s: sum(s) / len(s),
}


def prm(branches):
    """A process reward in [0, 1] that is a function of the tokens."""
    return [reward(b.token_ids) for b in branches]


def reward(tokens):
    digest = hashlib.blake2b(repr(tuple(tokens)).encode(), digest_size=2).digest()
    return int.from_bytes(digest, "little") / 65535


@dataclass
class Text:
    """A text of the plain re-implementations: its tokens, its steps' scores, and its path."""

    tokens: tuple = ()
    scores: tuple = ()
    path: tuple = ()
    done: bool = False
    order: int = 0


class Plain:
    """Samples steps as the search does: by the seed and the path of ordinals, nothing else."""

    def __init__(self, seed, eos, max_steps, aggregate="last"):
        self.engine = FakeEngine(9, seed=0, eos=eos)
        self.seed, self.max_steps = seed, max_steps
        self.aggregate = AGGREGATES[aggregate]
        self.sampled = 0

    def step(self, text, ordinal):
        path = (*text.path, ordinal)
        name = f"{self.seed}:" + ",".join(map(str, path))
        key = hashlib.blake2b(name.encode(), digest_size=8).digest()
        branch = FakeBranch(self.engine, None, [*PROMPT, *text.tokens])
        self.engine.live[branch.id] = branch
        branch._key = int.from_bytes(key, "little")
        tokens = []
        for _ in range(STEP):
            token, _ = self.engine.draw(branch, SamplingParams(temperature=1.0, seed=self.seed))
            branch._ids.append(token)
            tokens.append(token)
            if token == EOS:
                break
        self.sampled += 1
        full = (*text.tokens, *tokens)
        done = tokens[-1] == EOS or len(path) >= self.max_steps
        scores = (*text.scores, reward([*PROMPT, *full]))
        return Text(full, scores, path, done, self.sampled)

    def key(self, text):
        return (-self.aggregate(text.scores), text.order)

    def best(self, texts):
        return min(texts, key=self.key)


def plain_prm_beam(plain, width, branching):
    going, counts, finished = [Text()], [width * branching], []
    while going:
        made = [plain.step(t, i) for t, c in zip(going, counts, strict=True) for i in range(c)]
        chosen = []
        for text in sorted(made, key=plain.key):
            if text.tokens not in {t.tokens for t in chosen}:
                chosen.append(text)
        chosen = chosen[: width - len(finished)]
        finished += [t for t in chosen if t.done]
        going = [t for t in chosen if not t.done]
        counts = [branching] * len(going)
    return finished


def plain_dvts(plain, subtrees, branching):
    first = [plain.step(Text(), i) for i in range(subtrees * branching)]
    families = [first[i * branching : (i + 1) * branching] for i in range(subtrees)]
    finished = []
    while families:
        best = [plain.best(family) for family in families]
        finished += [t for t in best if t.done]
        families = [[plain.step(t, i) for i in range(branching)] for t in best if not t.done]
    return finished


def plain_rebase(plain, width, balance):
    going, counts, finished, budgets = [Text()], [width], [], []
    while going:
        budgets.append(sum(counts))
        made = [plain.step(t, i) for t, c in zip(going, counts, strict=True) for i in range(c)]
        finished += [t for t in made if t.done]
        going = [t for t in made if not t.done]
        weights = [math.exp(plain.aggregate(t.scores) / balance) for t in going]
        left = width - len(finished)
        exact = [left * w / sum(weights) for w in weights]
        counts = [int(x) for x in exact]
        while sum(counts) < left and going:
            gaps = [x - c for x, c in zip(exact, counts, strict=True)]
            counts[max(range(len(gaps)), key=gaps.__getitem__)] += 1
    return finished, budgets


def run(search, eos=0.3, **options):
    engine = FakeEngine(9, seed=0, eos=eos)
    root = engine.prompt(PROMPT)
    handle = start_search(engine, root, search, evaluator=prm, **options)
    result = handle.wait(60)
    engine.check_integrity()
    assert engine.branches == [root, result.best]
    assert result.best.token_ids == [*PROMPT, *result.token_ids]
    return result, handle.tree


def agree(result, plain, finished):
    """The search found the same texts with the same values for the same number of samples."""
    assert result.iterations == plain.sampled
    assert sorted(f.token_ids for f in result.found) == sorted(t.tokens for t in finished)
    best = plain.best(finished)
    assert result.token_ids == best.tokens
    assert result.found[0].value == pytest.approx(plain.aggregate(best.scores))
    assert result.reason == "finished"


CASES = pytest.mark.parametrize(
    ("seed", "eos", "aggregate"),
    [
        (seed, eos, aggregate)
        for seed in range(3)
        for eos in (-1e9, 0.3, 2.0)
        for aggregate in AGGREGATES
    ],
)


@CASES
@pytest.mark.parametrize(("width", "branching"), [(1, 4), (3, 2), (4, 4)])
def test_the_prm_beam_equals_a_plain_one(seed, eos, aggregate, width, branching):
    options = {"max_steps": 4, "tokens_per_step": STEP, "aggregate": aggregate}
    search = PRMBeam(width=width, branching=branching, seed=seed, **options)
    plain = Plain(seed, eos, 4, aggregate)
    agree(run(search, eos)[0], plain, plain_prm_beam(plain, width, branching))


@CASES
@pytest.mark.parametrize(("subtrees", "branching"), [(1, 4), (3, 2), (4, 4)])
def test_dvts_equals_a_plain_one(seed, eos, aggregate, subtrees, branching):
    options = {"max_steps": 4, "tokens_per_step": STEP, "aggregate": aggregate}
    search = DVTS(subtrees=subtrees, branching=branching, seed=seed, **options)
    plain = Plain(seed, eos, 4, aggregate)
    finished = plain_dvts(plain, subtrees, branching)
    result, _ = run(search, eos)
    agree(result, plain, finished)
    assert len(finished) == subtrees


@CASES
@pytest.mark.parametrize(("width", "balance"), [(1, 0.1), (6, 0.1), (16, 0.3), (9, 1e6)])
def test_rebase_equals_a_plain_one_and_its_budgets_add_up(seed, eos, aggregate, width, balance):
    options = {"max_steps": 4, "tokens_per_step": STEP, "aggregate": aggregate}
    search = REBASE(width=width, balance=balance, seed=seed, **options)
    plain = Plain(seed, eos, 4, aggregate)
    finished, budgets = plain_rebase(plain, width, balance)
    result, tree = run(search, eos)
    agree(result, plain, finished)
    by_depth = [sum(n.depth == d for n in tree.nodes) for d in range(1, len(budgets) + 1)]
    assert by_depth == budgets
    done = [sum(n.depth <= d and n.status == "terminal" for n in tree.nodes) for d in range(5)]
    assert all(count == width - done[d] for d, count in enumerate(by_depth))
    assert len(result.found) == width


def test_shares_add_up_exactly_and_never_favour_a_lower_reward():
    for budget in (0, 1, 7, 64, 1000):
        for size in (1, 2, 5, 33):
            rewards = [reward([budget, size, i]) for i in range(size)]
            for balance in (1e-3, 0.1, 1.0, 1e9):
                counts = shares(rewards, budget, balance)
                assert sum(counts) == budget
                assert min(counts) >= 0
                ranked = sorted(zip(rewards, counts, strict=True))
                assert [c for _, c in ranked] == sorted(counts)
    assert shares([], 5, 0.1) == []
    assert shares([0.9, 0.1, 0.1], 9, 1e-3) == [9, 0, 0]
    assert shares([0.9, 0.1, 0.1], 9, 1e9) == [3, 3, 3]
    assert shares([0.5, 0.5, 0.5], 7, 0.1) == [3, 2, 2], "ties go to the earlier"


@pytest.mark.parametrize("search", [
    PRMBeam(width=3, branching=2, tokens_per_step=STEP, max_steps=5),
    DVTS(subtrees=3, branching=2, tokens_per_step=STEP, max_steps=5),
    REBASE(width=6, tokens_per_step=STEP, max_steps=5),
])  # fmt: skip
class TestEveryStepSearch:
    def test_losers_and_parents_are_pruned_with_their_round(self, search):
        engine = FakeEngine(9, eos=-0.5)
        root = engine.prompt(PROMPT)
        handle = start_search(engine, root, search, evaluator=prm, paused=True)
        for _ in range(4):
            handle.step()
            assert handle.wait_paused(60) or handle.state == "done"
            if handle.state != "paused":
                break
            state = handle._session.state
            wanted = {node.branch_id for node in state.frontier} | {root.id}
            if state.leader is not None:
                wanted.add(state.leader.branch_id)
            assert {branch.id for branch in engine.branches} == wanted
        handle.stop()
        handle.wait(60).prune()
        assert engine.branches == [root]

    def test_a_round_is_one_job_and_one_evaluation(self, search):
        engine = FakeEngine(9, eos=-1e9)
        calls = []

        def evaluate(branches):
            calls.append(len(branches))
            return prm(branches)

        start_search(engine, engine.prompt(PROMPT), search, evaluator=evaluate).wait(60)
        jobs = [rows for name, rows in engine.log if name == "submit"]
        assert jobs == calls
        assert len(jobs) == 5

    def test_an_end_string_completes_a_text_and_a_stop_string_a_step(self, search):
        engine = FakeEngine(9, eos=-1e9)
        changed = {"stop": ("w4",), "end": ("w5", "w6"), "max_steps": 9, "tokens_per_step": 30}
        search = type(search)(**changed)
        handle = start_search(engine, engine.prompt(PROMPT), search, evaluator=prm)
        handle.wait(60)
        ends = {5, 6}
        for node in handle.tree.nodes[1:]:
            assert not ends & set(node.token_ids[:-1])
            last_step = node.token_ids[-1] in ends or node.depth == 9
            assert (node.status == "terminal") == last_step
            assert 4 not in node.token_ids[:-1]

    def test_a_budget_that_runs_out_in_a_round_gives_the_best_so_far(self, search):
        engine = FakeEngine(9, eos=-1e9)
        root = engine.prompt(PROMPT)
        result = start_search(engine, root, search, Budget(iterations=8), evaluator=prm).wait(60)
        assert result.reason == "iterations"
        assert len(result.token_ids) == 2 * STEP
        values = [f.value for f in result.found]
        assert result.found[0].node is result.node
        assert values == sorted(values, reverse=True)
        result.prune()
        assert engine.branches == [root]

    def test_texts_below_a_boosted_step_rank_higher(self, search):
        engine = FakeEngine(9, eos=-1e9)
        root = engine.prompt(PROMPT)
        handle = start_search(
            engine, root, type(search)(max_steps=2, tokens_per_step=STEP, keep_tree=True),
            evaluator=lambda branches: [0.5] * len(branches), paused=True,
        )  # fmt: skip
        handle.step()
        assert handle.wait_paused(60)
        favourite = handle._session.state.frontier[-1]
        handle.boost(favourite.branch, 5.0)
        handle.resume()
        result = handle.wait(60)
        assert result.reason == "finished"
        assert result.node.parent is favourite


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PRMBeam(width=0), "width"),
        (lambda: PRMBeam(branching=0), "branching"),
        (lambda: PRMBeam(aggregate="max"), "aggregate"),
        (lambda: PRMBeam(tokens_per_step=0), "tokens_per_step"),
        (lambda: PRMBeam(max_steps=0), "max_steps"),
        (lambda: PRMBeam(end=("",)), "end"),
        (lambda: PRMBeam(sampling=SamplingParams(temperature=0)), "temperature=0"),
        (lambda: DVTS(subtrees=0), "subtrees"),
        (lambda: DVTS(branching=0), "branching"),
        (lambda: REBASE(width=0), "width"),
        (lambda: REBASE(balance=0), "balance"),
        (lambda: REBASE(balance=math.inf), "balance"),
    ],
)
def test_a_bad_option_is_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=named):
        make()
