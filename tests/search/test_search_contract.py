"""What every algorithm in `SEARCHES` promises, whatever it is."""

from __future__ import annotations

import math
import random

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import SearchError
from dendrite_engine.search import (
    MCTS,
    SEARCHES,
    Budget,
    Outcome,
    Runner,
    check_contract,
    start_search,
)
from dendrite_engine.search.base import Search

# options that make a search small; an algorithm that is not listed runs with its defaults
SMALL = {
    "abmcts": {"width": 6, "max_depth": 3, "tokens_per_node": 3, "parallel": 3},
    "beam": {"width": 3, "max_tokens": 10},
    "best-of-n": {"n": 40, "max_tokens": 3, "parallel": 3},
    "diverse-beam": {"width": 4, "groups": 2, "max_tokens": 10},
    "dvts": {"subtrees": 2, "branching": 2, "tokens_per_step": 3},
    "mcts": {"width": 3, "tokens_per_node": 3, "parallel": 3},
    "prm-beam": {"width": 2, "branching": 2, "tokens_per_step": 3},
    "rebase": {"width": 4, "tokens_per_step": 3},
    "self-consistency": {"n": 40, "max_tokens": 3, "parallel": 3, "extract": ".+"},
    "stochastic-beam": {"width": 3, "max_tokens": 10},
    "weighted-vote": {"n": 40, "max_tokens": 3, "parallel": 3, "extract": ".+"},
    "lats": {
        "width": 3,
        "tokens_per_node": 3,
        "parallel": 3,
        "simulations": 5,
        "episodes": 50,
        "reflect": "w8",
        "reflection_tokens": 3,
        "heading": "w7",
        "resume": "w6 w5",
    },
    "lookahead": {"width": 3, "tokens_per_node": 1, "max_depth": 5},
    "tot": {"width": 3, "tokens_per_node": 3, "max_depth": 4, "breadth": 2},
}
# searches whose nodes are tokens: a step makes more of them than it looks at
BY_TOKENS = {"beam", "diverse-beam", "stochastic-beam"}
ALL = pytest.mark.parametrize("name", SEARCHES.names())


def make(name: str, **options) -> Search:
    return SEARCHES.get(name)(**{**SMALL.get(name, {}), **options})


def evaluator_for(search: Search):
    return (lambda branches: [len(set(b.token_ids)) / 10 for b in branches]) if (
        search.needs_values
    ) else None  # fmt: skip


def run(engine, root, search, budget, **options):
    return start_search(
        engine, root, search, budget, evaluator=evaluator_for(search), **options
    ).wait(60)


def drive(engine, root, search, batches, mangle=lambda outcomes: [outcomes]):
    """Run by hand; `mangle` turns the outcomes of a batch into the calls of tell."""
    runner, state = Runner(engine, root, evaluator_for(search)), search.init(root)
    for _ in range(batches):
        if search.done(state):
            break
        outcomes = runner.run(search.ask(state, search.plan(state).trials))
        for part in mangle(outcomes):
            search.tell(state, part)
        runner.settle(state)
        engine.check_integrity()
    return runner, state


def picture(state):
    """Everything that must repeat."""
    return [
        (n.id, n.ordinals(), n.token_ids, n.visits, round(n.value, 12), n.status, n.depth)
        for n in state.tree.nodes
    ]


@ALL
@pytest.mark.parametrize("limit", ["tokens", "nodes", "iterations", "compute", "pages"])
def test_no_limit_is_exceeded_by_more_than_one_batch(name, limit):
    search = make(name)
    for amount in (12, 13, 17, 30):
        engine = FakeEngine(9, eos=-1e9)
        root = engine.prompt([1, 2, 3])
        result = run(engine, root, search, Budget(**{limit: amount}, seconds=1e6))
        spent = result.iterations if limit == "pages" else getattr(result, limit)
        assert spent > 0
        if limit == "pages":
            assert len(engine.refs) - 1 <= amount + 2 * search.plan(search.init(root)).trials + 6
            continue
        batch = 2 * search.width if name in BY_TOKENS else 0
        assert spent <= amount + (batch if limit == "nodes" else 0)
        assert result.reason in (limit, "finished")


@ALL
def test_seconds_are_read_before_every_batch_and_do_not_run_while_paused(name):
    engine = FakeEngine(9, eos=-1e9)
    root = engine.prompt([1, 2, 3])
    time = [0.0]

    def forward(rows):
        time[0] += 1.0

    engine.before_forward = forward
    search = make(name)
    handle = start_search(
        engine,
        root,
        search,
        Budget(seconds=6.5),
        evaluator=evaluator_for(search),
        clock=lambda: time[0],
        paused=True,
    )
    handle.step()
    assert handle.wait_paused(60)
    time[0] += 1000.0
    handle.resume()
    result = handle.wait(60)
    assert result.reason == "seconds"
    assert 6.5 <= result.seconds <= 6.5 + 3


@ALL
@pytest.mark.parametrize("seed", [None, 5])
def test_the_same_seed_gives_the_same_tree(name, seed):
    search = make(name, seed=seed)
    pictures = []
    for _ in range(2):
        engine = FakeEngine(9, eos=0.5)
        _, state = drive(engine, engine.prompt([1, 2, 3]), search, 8)
        pictures.append(picture(state))
    assert pictures[0] == pictures[1]


@ALL
def test_the_order_and_the_repetition_of_outcomes_do_not_matter(name):
    shuffle = random.Random(3)

    def chaos(outcomes):
        parts = [[o] for o in outcomes] + [[o] for o in outcomes]
        shuffle.shuffle(parts)
        both = [outcomes[0], outcomes[0]]
        return [both, *parts, outcomes]

    engine, other = FakeEngine(9, eos=0.5), FakeEngine(9, eos=0.5)
    search = make(name, seed=1)
    runner, state = drive(engine, engine.prompt([1, 2, 3]), search, 6, chaos)
    _, plain = drive(other, other.prompt([1, 2, 3]), search, 6)
    if name not in ("mcts", "lats"):  # MCTS numbers nodes in the order in which they are told
        assert picture(state) == picture(plain)
    assert sum(n.visits for n in state.tree.nodes) == sum(n.visits for n in plain.tree.nodes)
    owned = {n.branch_id for n in state.tree.nodes if n.branch is not None}
    assert {b.id for b in engine.branches} == owned
    assert state.pending == {}
    runner.keeper.prune_all()
    assert len(engine.branches) == 1


@ALL
def test_a_batch_told_twice_at_once_counts_once(name):
    engine, other = FakeEngine(9, eos=0.5), FakeEngine(9, eos=0.5)
    search = make(name)
    _, state = drive(engine, engine.prompt([1]), search, 6, lambda o: [[*o, *reversed(o)]])
    _, plain = drive(other, other.prompt([1]), search, 6)
    assert picture(state) == picture(plain)
    assert {b.id for b in engine.branches} == {b.id for b in other.branches}


@ALL
def test_an_outcome_of_an_unknown_trial_only_loses_its_branch(name):
    engine = FakeEngine(9)
    root = engine.prompt([1, 2])
    search = make(name)
    runner, state = drive(engine, root, search, 3)
    before, live = picture(state), {b.id for b in engine.branches}
    stray = root.fork()[0]
    search.tell(state, [Outcome(10_000, stray, (1,), (-1.0,), "length", 0.5)])
    runner.settle(state)
    assert picture(state) == before
    assert {b.id for b in engine.branches} == live


@ALL
def test_no_branch_or_page_leaks_after_result_and_prune(name):
    for batches in (0, 1, 2, 5, 1000):
        engine = FakeEngine(9, eos=0.5)
        root = engine.prompt([1, 2, 3])
        pages = len(engine.refs)
        handle = start_search(
            engine,
            root,
            make(name),
            Budget(iterations=60),
            evaluator=evaluator_for(make(name)),
            paused=True,
        )
        if batches:
            handle.step(batches)
            handle.wait_paused(60)
        handle.stop()
        result = handle.wait(60)
        kept = {node.branch_id for node in result.node.path()}
        assert {b.id for b in engine.branches} <= kept
        result.prune()
        assert result.prune() == 0
        assert engine.branches == [root]
        assert len(engine.refs) == pages
        engine.check_integrity()


@ALL
def test_a_pool_that_is_too_small_ends_the_search_not_the_engine(name):
    for pages in range(6, 24):
        engine = FakeEngine(9, eos=-1e9, num_pages=pages)
        root = engine.prompt([1, 2, 3])
        search = make(name, **({"max_tokens": 200} if name in BY_TOKENS else {}))
        result = run(engine, root, search, Budget(iterations=500))
        assert result.reason in ("pages", "iterations", "exhausted", "finished"), pages
        engine.check_integrity()
        result.prune()
        assert engine.branches == [root]
        assert root.token_ids == [1, 2, 3]


@ALL
def test_branches_pruned_by_somebody_else_leave_the_search_going(name):
    engine = FakeEngine(9, eos=-1e9)
    root = engine.prompt([1, 2, 3])
    search = make(name, **({"max_tokens": 60} if name in BY_TOKENS else {}))
    chance = random.Random(1)

    def vandal(event):
        live = [b for b in engine.branches if b is not root]
        if event.kind in ("select", "budget") and live and chance.random() < 0.1:
            chance.choice(live).prune()

    result = run(engine, root, search, Budget(iterations=120), on_event=vandal)
    assert result.reason in ("iterations", "exhausted", "finished")
    engine.check_integrity()
    result.prune()
    assert engine.branches == [root]


@ALL
def test_branches_extended_or_rolled_back_by_somebody_else_do_not_mislead_the_search(name):
    engine = FakeEngine(9, eos=-1e9)
    root = engine.prompt([1, 2, 3])
    chance = random.Random(2)

    def vandal(event):
        live = [b for b in engine.branches if b is not root]
        if event.kind == "budget" and live and chance.random() < 0.3:
            branch = chance.choice(live)
            if chance.random() < 0.5:
                branch.extend([7, 7])
            else:
                branch.rollback(1)

    search = make(name)
    handle = start_search(
        engine,
        root,
        search,
        Budget(iterations=90),
        evaluator=evaluator_for(search),
        on_event=vandal,
    )
    handle.wait(60)
    tree = handle.tree
    for node in tree.nodes[1:]:
        assert node.start == node.parent.span[1]
        for token, logprob in zip(node.token_ids, node.logprobs, strict=True):
            before = [1, 2, 3, *tree.tokens(node.parent), *node.token_ids]
            index = node.start + node.token_ids.index(token)
            if before.count(token) == 1 and not math.isnan(logprob):  # forced tokens have none
                assert logprob == pytest.approx(engine.logprobs_after(before[:index])[token])


@ALL
def test_one_object_drives_many_searches(name):
    search = make(name, seed=3)
    results = []
    for _ in range(2):
        engine = FakeEngine(9, eos=0.5)
        results.append(run(engine, engine.prompt([1, 2]), search, Budget(iterations=30)))
    assert results[0].token_ids == results[1].token_ids
    with pytest.raises(AttributeError):
        search.width = 7


@ALL
def test_a_state_is_done_when_it_has_a_reason_and_asks_nothing_more(name):
    engine = FakeEngine(3, eos=3.0)
    root = engine.prompt([1])
    search = make(name, **({"max_depth": 2} if name == "mcts" else {}))
    _, state = drive(engine, root, search, 1000)
    assert search.done(state)
    assert state.reason
    assert search.ask(state, 5) == []
    assert search.best(state).token_ids


@ALL
def test_options_that_may_change_live_are_options(name):
    search = make(name)
    for option in search.live_options:
        assert hasattr(search, option)
        same = search.with_options(**{option: getattr(search, option)})
        assert same == search


# -- the checks that users run ------------------------------------------------------------------


@ALL
def test_the_public_checks_pass(name):
    engine = FakeEngine(9, eos=-1e9)
    root = engine.prompt([1, 2, 3])
    search = make(name, seed=2)
    assert len(check_contract(search, root, evaluator_for(search))) == 4
    assert engine.branches == [root]


def hoarder():
    """An MCTS that forgets to hand back branches of merged children."""

    class Hoarder(MCTS):
        def tell(self, state, results):
            kept = [o.branch.fork()[0] for o in results if o.branch is not None]
            super().tell(state, results)
            state.notes += [("search", b.id, {}) for b in kept]

    return Hoarder(seed=1, tokens_per_node=2)


def gambler():
    """One whose draws come from the process, not from the seed."""

    class Gambler(MCTS):
        def node_key(self, node, ordinal):
            return random.SystemRandom().getrandbits(60)

    return Gambler(seed=1, tokens_per_node=2)


def spender():
    """One that asks for more than it is allowed."""

    class Spender(MCTS):
        def ask(self, state, n):
            return super().ask(state, 50 * n)

    return Spender(seed=1, tokens_per_node=2, width=200)


def parrot():
    """One that counts a repeated outcome again."""

    class Parrot(MCTS):
        def tell(self, state, results):
            for _ in results:
                state.tree.root.visits += 1
            super().tell(state, results)

    return Parrot(seed=1, tokens_per_node=2)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (hoarder, "left branches"),
        (gambler, "two different trees"),
        (spender, "more than one batch"),
        (parrot, "counts an outcome again"),
        (lambda: MCTS(), "has no seed"),
    ],
)
def test_the_public_checks_find_a_search_that_breaks_its_promises(broken, message):
    engine = FakeEngine(9, eos=-1e9)
    root = engine.prompt([1, 2, 3])
    with pytest.raises(SearchError, match=message):
        check_contract(broken(), root, lambda bs: [0.5] * len(bs))
