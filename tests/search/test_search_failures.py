"""What a search does when the engine fails a branch: no pages, no context, NaN, cut short."""

from __future__ import annotations

import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import BudgetExceeded, NumericError, OutOfPages, StaleBranch
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import MCTS, Budget, Runner, start_search, verifier
from dendrite_engine.search.base import State
from dendrite_engine.search.tree import Tree
from dendrite_engine.types import Completion

WAIT = 60
ENDLESS = -1e9


def half(branches):
    return [0.5] * len(branches)


@pytest.fixture
def engine():
    return FakeEngine(9, eos=ENDLESS)


def test_children_that_no_release_can_make_room_for_end_the_search():
    engine = FakeEngine(9, eos=ENDLESS, num_pages=5)
    root = engine.prompt([1, 2, 3, 4])
    reasons = []

    def note(event):
        if event.kind == "error":
            reasons.append(event.data["finish_reason"])

    result = start_search(
        engine,
        root,
        MCTS(width=4, tokens_per_node=17, parallel=4),
        Budget(iterations=400),
        evaluator=half,
        on_event=note,
    ).wait(WAIT)
    assert result.reason == "pages"
    assert result.nodes == 0
    assert set(reasons) == {"out_of_pages"}
    assert result.best is root
    engine.check_integrity()
    result.prune()
    assert len(engine.refs) == 1


def test_a_page_budget_ends_the_search_before_the_pool_does(engine):
    root = engine.prompt([1, 2, 3])
    result = start_search(
        engine, root, MCTS(tokens_per_node=8), Budget(pages=20), evaluator=half
    ).wait(WAIT)
    assert result.reason == "pages"
    assert len(engine.refs) <= 1 + 20 + 4 * 3
    assert not [e for e in engine.trace if e.kind == "error"]


def test_a_page_budget_counts_only_pages_taken_since_the_search_began(engine):
    root = engine.prompt([1, 2, 3] * 100)
    pages = []
    handle = start_search(
        engine, root, MCTS(tokens_per_node=8), Budget(pages=20), evaluator=half,
        on_event=lambda e: pages.append(e.data["pages"]) if e.kind == "budget" else None,
    )  # fmt: skip
    result = handle.wait(WAIT)
    assert result.nodes > 4
    assert max(pages) <= 20 + 4 * 3


def test_a_text_that_fills_the_context_is_terminal():
    engine = FakeEngine(9, eos=ENDLESS, max_context=9)
    root = engine.prompt([1, 2, 3])
    handle = start_search(
        engine, root, MCTS(width=2, tokens_per_node=4), Budget(iterations=500), evaluator=half
    )
    assert handle.wait(WAIT).reason == "exhausted"
    ends = [n for n in handle.tree.nodes[1:] if n.status == "terminal"]
    assert ends
    assert {n.finish_reason for n in ends} == {"context_full"}
    assert all(n.span[1] == 9 for n in ends)


def test_a_root_that_fills_the_context_has_nothing_below_it():
    engine = FakeEngine(9, max_context=3)
    root = engine.prompt([1, 2, 3])
    result = start_search(engine, root, MCTS(width=2), evaluator=half).wait(WAIT)
    assert result.reason == "exhausted"
    assert result.text == ""
    result.prune()
    assert engine.branches == [root]


def test_a_child_with_nan_logits_is_lost_and_its_siblings_live(engine, monkeypatch):
    import search_fakes

    advance = search_fakes.FakeJob._advance

    def sometimes_nan(self, completion: Completion, params: SamplingParams):
        if completion.branch.id % 3 == 0:
            completion.finish_reason = "numeric_error"
            completion.error = NumericError("logits are not finite")
        else:
            advance(self, completion, params)

    monkeypatch.setattr(search_fakes.FakeJob, "_advance", sometimes_nan)
    root = engine.prompt([1, 2, 3])
    handle = start_search(
        engine,
        root,
        MCTS(tokens_per_node=2, width=4),
        Budget(iterations=40),
        evaluator=half,
    )
    result = handle.wait(WAIT)
    assert result.iterations == 40
    assert all(node.branch_id % 3 for node in handle.tree.nodes[1:])
    assert handle._session.state.failed > 0
    result.prune()
    assert engine.branches == [root]


def test_at_the_branch_limit_of_the_engine_the_search_goes_on_with_fewer_branches(
    engine, monkeypatch
):
    import search_fakes

    fork = search_fakes.FakeBranch.fork

    def limited(self, n=1, at=None):
        if len(engine.live) >= 12:
            raise BudgetExceeded("max_branches: 12 branches are live already")
        return fork(self, n, at)

    monkeypatch.setattr(search_fakes.FakeBranch, "fork", limited)
    root = engine.prompt([1, 2, 3])
    result = start_search(engine, root, MCTS(tokens_per_node=2), evaluator=half).wait(WAIT)
    assert result.reason == "iterations"
    assert result.nodes > 100
    assert result.released > 0
    result.prune()
    assert engine.branches == [root]


def test_a_child_pruned_while_it_is_decoded_is_lost_alone(engine):
    root = engine.prompt([1, 2, 3])
    search = MCTS(tokens_per_node=3, width=4, parallel=4)
    runner, state = Runner(engine, root, half), search.init(root)
    forwards = []

    def prune_one(rows):
        forwards.append(rows)
        if len(forwards) == 2:
            engine.branches[2].prune()

    engine.before_forward = prune_one
    outcomes = runner.run(search.ask(state, 4))
    assert [o.finish_reason for o in outcomes] == ["length", "stale", "length", "length"]
    search.tell(state, outcomes)
    runner.settle(state)
    assert len(state.tree) == 4
    assert {b.id for b in engine.branches} == {n.branch_id for n in state.tree.nodes}


def test_a_child_pruned_between_fork_and_submit_is_lost_alone(engine, monkeypatch):
    root = engine.prompt([1, 2, 3])
    search = MCTS(tokens_per_node=3, width=4, parallel=4)
    runner, state = Runner(engine, root, half), search.init(root)
    submit = engine.submit

    def racing(branches, params, **options):
        monkeypatch.setattr(engine, "submit", submit)
        branches[0].prune()
        return submit(branches, params, **options)

    monkeypatch.setattr(engine, "submit", racing)
    outcomes = runner.run(search.ask(state, 4))
    assert [o.finish_reason for o in outcomes] == ["stale", "length", "length", "length"]


def test_a_branch_that_another_engine_owns_is_an_error_of_the_caller(engine, monkeypatch):
    root = engine.prompt([1, 2, 3])

    def refuse(branches, params, **options):
        raise StaleBranch("branch 2 belongs to another engine")

    monkeypatch.setattr(engine, "submit", refuse)
    with pytest.raises(StaleBranch, match="another engine"):
        start_search(engine, root, "mcts", evaluator=half).wait(WAIT)
    assert engine.branches == [root]


def test_a_submit_without_pages_ends_the_search_for_want_of_pages(engine, monkeypatch):
    root = engine.prompt([1, 2, 3])

    def refuse(branches, params, **options):
        raise OutOfPages(4, 0, 0, 10, 10)

    monkeypatch.setattr(engine, "submit", refuse)
    result = start_search(engine, root, "mcts", evaluator=half).wait(WAIT)
    assert result.reason == "pages"
    assert result.best is root


def test_a_batch_that_raises_prunes_its_own_branches_only(engine):
    root = engine.prompt([1, 2, 3])
    search = MCTS(tokens_per_node=2, width=3, parallel=3)
    answers = iter([0.5, None])
    runner = Runner(engine, root, lambda branches: [next(answers)] * len(branches))
    state = search.init(root)
    search.tell(state, runner.run(search.ask(state, 3)))
    live = engine.branches
    with pytest.raises(Exception, match="must return one number"):
        runner.run(search.ask(state, 3))
    assert engine.branches == live


def test_a_cancelled_runner_decodes_nothing_more(engine):
    root = engine.prompt([1, 2, 3])
    search = MCTS(tokens_per_node=2, rollout_tokens=2)
    runner, state = Runner(engine, root, half), search.init(root)
    runner.cancel()
    outcomes = runner.run(search.ask(state, 4))
    assert {o.finish_reason for o in outcomes} == {"cancelled"}
    assert not [entry for entry in engine.log if entry[0] in ("submit", "forward")]
    search.tell(state, outcomes)
    runner.settle(state)
    assert engine.branches == [root]


def test_a_pruned_root_ends_the_search_with_its_text_known(engine):
    root = engine.prompt([1, 2, 3])
    handle = start_search(
        engine,
        root,
        MCTS(tokens_per_node=2, width=2),
        Budget(iterations=50),
        evaluator=verifier(lambda text: 0.5),
        paused=True,
    )
    handle.step()
    assert handle.wait_paused(WAIT)
    root.prune()
    handle.resume()
    result = handle.wait(WAIT)
    assert result.iterations == 50, "children live on without their root"
    assert result.text
    result.prune()
    assert engine.branches == []
    engine.check_integrity()


def test_a_node_can_be_regrown_only_below_a_live_ancestor(engine):
    root = engine.prompt([1, 2, 3])
    runner, state = Runner(engine, root), State(Tree(root))
    child = state.tree.add(state.tree.root, (4, 5), (-1.0, -1.0), branch=root.fork()[0])
    grandchild = state.tree.add(child, (6,), (-1.0,), branch=root.fork()[0])
    for node in (grandchild, child):
        node.branch.prune()
    assert runner.keeper.regrow(state.tree, grandchild)
    assert grandchild.branch.token_ids == [1, 2, 3, 4, 5, 6]
    grandchild.branch.prune()
    root.prune()
    assert not runner.keeper.regrow(state.tree, grandchild)


def test_a_branch_rolled_back_and_extended_by_somebody_else_is_not_forked(engine):
    root = engine.prompt([1, 2, 3])
    search = MCTS(tokens_per_node=3, width=4, parallel=1)
    runner, state = Runner(engine, root, half), search.init(root)
    search.tell(state, runner.run(search.ask(state, 1)))
    node = state.tree.nodes[1]
    node.branch.rollback(1)
    other = next(t for t in range(1, 9) if t != node.token_ids[-1])
    node.branch.extend([other])
    trial = search.open_trial(state, "expand", node, params=SamplingParams(max_tokens=2))
    look = search.open_trial(state, "look", node, k=2)
    outcomes = runner.run([trial, look])
    assert [o.finish_reason for o in outcomes] == ["stale", "stale"]
    assert "no longer those of its node" in outcomes[0].error
