"""What children a node can have: nucleus, thoughts, actions, widening, forced tokens."""

from __future__ import annotations

import math

import pytest
from search_fakes import EOS, FakeEngine

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import MCTS, Budget, Runner, start_search, verifier

ENDLESS = -1e9


def half(branches):
    return [0.5] * len(branches)


def drive(engine, root, search, batches, evaluator=half):
    runner, state = Runner(engine, root, evaluator), search.init(root)
    for _ in range(batches):
        if search.done(state):
            break
        search.tell(state, runner.run(search.ask(state, search.plan(state).trials)))
        runner.settle(state)
        engine.check_integrity()
    return runner, state


# -- by tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.9, 0.999, 1.0])
def test_top_p_expansion_begins_children_with_the_tokens_of_the_nucleus(top_p):
    engine = FakeEngine(7, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = MCTS(
        expansion="top_p", top_p=top_p, width=6, tokens_per_node=2, max_depth=1, parallel=1
    )
    _, state = drive(engine, root, search, 50)
    likely = engine.top_tokens([root], 6)[0]
    mass, expected = 0.0, []
    for option in likely:
        if mass < top_p:
            expected.append(option.token_id)
        mass += math.exp(option.logprob)
    assert [child.token_ids[0] for child in state.tree.root.children] == expected
    assert state.reason == "exhausted"
    assert state.failed == 0


# -- by thoughts --------------------------------------------------------------------------------


def test_a_thought_ends_a_node_and_a_stop_string_ends_the_text():
    engine = FakeEngine(6, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = MCTS(thought_stop=("w3",), stop=("w4",), tokens_per_node=30, width=4, parallel=4)
    _, state = drive(engine, root, search, 12)
    ends = {node.token_ids[-1] for node in state.tree.nodes[1:]}
    assert ends == {3, 4}
    for node in state.tree.nodes[1:]:
        assert (node.status == "terminal") == (node.token_ids[-1] == 4)
        assert len([t for t in node.token_ids if t in (3, 4)]) == 1
    assert any(node.children for node in state.tree.nodes[1:])


def test_a_rollout_goes_on_past_the_ends_of_thoughts():
    engine = FakeEngine(6, eos=ENDLESS)
    seen = []

    def watch(branches):
        seen.extend(b.token_ids[2:] for b in branches)
        return [0.5] * len(branches)

    search = MCTS(thought_stop=("w3",), tokens_per_node=8, rollout_tokens=12, parallel=4)
    drive(engine, engine.prompt([1, 2]), search, 3, watch)
    rollouts = [tokens for tokens in seen if 3 in tokens]
    assert any(tokens.index(3) + 1 < len(tokens) for tokens in rollouts)


# -- by actions ---------------------------------------------------------------------------------


def test_fixed_actions_become_children_in_the_order_of_their_likelihood():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    actions = ["w3 w4", "w3 w5 w6", "w7", "w3"]
    search = MCTS(expansion="actions", actions=actions, width=4, max_depth=1, parallel=2)
    _, state = drive(engine, root, search, 10)

    def likelihood(run):
        held, total = [1, 2], 0.0
        for token in run:
            total += engine.logprobs_after(held)[token]
            held.append(token)
        return total

    runs = [tuple(engine.tokenizer.encode(action)) for action in actions]
    expected = sorted(runs, key=lambda run: -likelihood(run))
    children = state.tree.root.children
    assert [child.token_ids for child in children] == expected
    for child in children:
        assert math.fsum(child.logprobs) == pytest.approx(likelihood(child.token_ids))
        assert child.prior == pytest.approx(math.exp(likelihood(child.token_ids)))
    assert state.reason == "exhausted"


def test_likelihoods_of_actions_compute_common_prefixes_once_and_leave_no_branch():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    actions = ["w3 w4 w5", "w3 w4 w6", "w3 w7 w5", "w8"]
    search = MCTS(expansion="actions", actions=actions, width=4, max_depth=1, parallel=1)
    runner, state = Runner(engine, root, half), search.init(root)
    outcomes = runner.run(search.ask(state, 1))
    # prefixes by length: 3, 8 | 34, 37 | 345, 346, 375
    assert [rows for name, rows in engine.log if name == "forward"] == [2, 2, 3]
    assert outcomes[0].tokens_used == 7 + len(outcomes[0].token_ids)
    assert len(engine.branches) == 2
    search.tell(state, outcomes)
    engine.log.clear()
    runner.run(search.ask(state, 1))
    assert not [entry for entry in engine.log if entry[0] == "forward"], "the node knows them now"


def test_uniform_priors_need_no_forward_pass_and_keep_the_given_order():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = MCTS(
        expansion="actions", actions=["w7", "w3 w4"], priors="uniform", width=5, max_depth=3
    )
    runner, state = drive(engine, root, search, 50)
    assert not [entry for entry in engine.log if entry[0] in ("forward", "top_tokens")]
    assert [c.token_ids for c in state.tree.root.children] == [(7,), (3, 4)]
    assert state.reason == "exhausted"
    assert len(state.tree) == 1 + 2 + 4 + 8
    assert runner.keeper.regrow(state.tree, state.leader)
    assert state.leader.branch.logprobs[2:] == [None] * len(state.tree.tokens(state.leader))


def test_a_callable_says_what_is_allowed_on_each_branch():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    asked = []

    def moves(branch):
        asked.append(branch.id)
        last = branch.token_ids[-1]
        return [] if last == 5 else [f"w{last + 1}", (last + 1, 5)]

    search = MCTS(expansion="actions", actions=moves, width=4, parallel=3)
    _, state = drive(engine, root, search, 60)
    assert state.reason == "exhausted"
    assert len(asked) == len(set(asked)), "once for a node"
    texts = {tuple(state.tree.tokens(n)) for n in state.tree.nodes if n.finish_reason}
    assert texts == {(3, 4, 5), (3, 4, 5, 5), (3, 4, 5), (3, 5), (3, 4, 5)}
    assert {n.finish_reason for n in state.tree.nodes if n.finish_reason} == {"no_actions"}


def test_a_callable_that_raises_costs_its_node_its_children_and_the_root_the_search():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])

    def moves(branch):
        if branch.token_ids[-1] == 3:
            raise ValueError("can't move from w3")
        return ["w3", "w4"]

    search = MCTS(expansion="actions", actions=moves, max_depth=3, width=2)
    handle = start_search(engine, root, search, Budget(iterations=100), evaluator=half)
    result = handle.wait(60)
    assert result.reason == "exhausted"
    assert all(not n.children for n in handle.tree.nodes if n.token_ids[-1:] == (3,))
    errors = [e.data["error"] for e in engine.trace if e.kind == "error"]
    assert errors
    assert all("can't move from w3" in error for error in errors)
    result.prune()
    broken = engine.prompt([3])
    with pytest.raises(ValueError, match="can't move"):
        start_search(engine, broken, search, Budget(iterations=100), evaluator=half).wait(60)
    assert engine.branches == [root, broken]


def test_grammar_actions_ask_the_branch_for_its_allowed_tokens(monkeypatch):
    import search_fakes

    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = MCTS(expansion="actions", actions="grammar", width=9, max_depth=2)
    with pytest.raises(InvalidArgument, match="allowed_tokens"):
        drive(engine, root, search, 1)
    allowed = {2: [4, 6], 4: [1], 6: []}
    monkeypatch.setattr(
        search_fakes.FakeBranch,
        "allowed_tokens",
        lambda branch: allowed[branch.token_ids[-1]],
        raising=False,
    )
    _, state = drive(engine, root, search, 20)
    assert {tuple(state.tree.tokens(n)) for n in state.tree.nodes[1:]} == {(4,), (6,), (4, 1)}


@pytest.mark.parametrize(
    ("actions", "message"),
    [("w3", "actions"), ([], "actions"), (["w3", ""], "actions"), (7, "actions")],
)
def test_actions_of_another_kind_are_refused(actions, message):
    with pytest.raises(InvalidArgument, match=message):
        MCTS(expansion="actions", actions=actions)


@pytest.mark.parametrize("answer", ["w3", [()], [[99]], [3.5], [None]])
def test_a_callable_with_a_bad_answer_at_the_root_is_the_callers_error(answer):
    search = MCTS(expansion="actions", actions=lambda branch: answer)
    engine = FakeEngine(9)
    with pytest.raises(InvalidArgument, match="action"):
        drive(engine, engine.prompt([1]), search, 1)


def test_actions_and_their_expansion_go_together():
    with pytest.raises(InvalidArgument, match="go together"):
        MCTS(actions=["w3"])
    with pytest.raises(InvalidArgument, match="go together"):
        MCTS(expansion="actions")


def test_a_pool_without_pages_for_scoring_loses_only_those_children():
    engine = FakeEngine(9, eos=ENDLESS, num_pages=8)
    root = engine.prompt([1, 2, 3, 4])
    search = MCTS(expansion="actions", actions=["w3 w4 w5", "w5 w4 w3"], width=2, parallel=2)
    result = start_search(engine, root, search, Budget(iterations=60), evaluator=half).wait(60)
    assert result.reason in ("pages", "exhausted", "iterations")
    result.prune()
    assert engine.branches == [root]
    engine.check_integrity()


# -- widening and discount ----------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "power"), [(1.0, 0.5), (2.0, 0.5), (1.0, 0.8)])
def test_progressive_widening_never_has_more_children_than_its_formula(factor, power):
    engine = FakeEngine(50, eos=ENDLESS)
    search = MCTS(
        width=40, widening=factor, widening_power=power, parallel=1, tokens_per_node=3,
        exploration=0.5,
    )  # fmt: skip
    runner = Runner(engine, root := engine.prompt([1]), half)
    state = search.init(root)
    for _ in range(120):
        (trial,) = search.ask(state, 1)
        visits = max(1, trial.node.visits)
        assert trial.ordinal < math.ceil(factor * visits**power)
        search.tell(state, runner.run([trial]))
    assert state.tree.root.attempts == min(40, math.ceil(factor * 119**power))


def test_widening_does_not_starve_a_node_whose_children_have_all_ended():
    engine = FakeEngine(9, eos=ENDLESS)
    search = MCTS(width=4, widening=1.0, max_depth=1, parallel=1, tokens_per_node=4)
    _, state = drive(engine, engine.prompt([1]), search, 50)
    assert state.reason == "exhausted"
    assert state.tree.root.attempts == 4


def test_a_discount_shrinks_values_by_the_distance_from_the_child():
    engine = FakeEngine(9, eos=ENDLESS)
    search = MCTS(width=1, parallel=1, discount=0.5, tokens_per_node=1)
    _, state = drive(engine, engine.prompt([1]), search, 4, lambda bs: [0.8] * len(bs))
    chain = state.tree.nodes
    expected = [sum(0.8 * 0.5**distance for distance in range(d, 5)) for d in range(1, 5)]
    # node k of the chain got one visit from itself and from each node below it
    for depth, node in enumerate(chain[1:], start=1):
        below = 4 - depth
        assert node.value_sum == pytest.approx(sum(0.8 * 0.5**i for i in range(below + 1)))
    assert chain[0].value_sum == pytest.approx(expected[0])


# -- forced tokens ------------------------------------------------------------------------------


def test_forced_tokens_have_no_logprob_and_those_after_them_do():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = MCTS(width=2)
    runner, state = Runner(engine, root, half), search.init(root)
    trial = search.open_trial(
        state, "expand", state.tree.root, forced=(5, 6), params=SamplingParams(max_tokens=3)
    )
    (outcome,) = runner.run([trial])
    assert outcome.token_ids[:2] == (5, 6)
    assert len(outcome.token_ids) == 5
    assert outcome.tokens_used == 5
    assert [math.isnan(x) for x in outcome.logprobs] == [True, True, False, False, False]
    assert outcome.text == engine.tokenizer.decode(outcome.token_ids[2:])
    node = state.tree.add(
        state.tree.root, outcome.token_ids, outcome.logprobs, branch=outcome.branch
    )
    runner.keeper.prune(outcome.branch)
    node.branch = None
    assert runner.keeper.regrow(state.tree, node)
    assert node.branch.logprobs[2:4] == [None, None]
    assert node.branch.logprobs[4:] == list(outcome.logprobs[2:])


def test_a_child_of_forced_tokens_alone_ends_with_them():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = MCTS(width=2)
    runner, state = Runner(engine, root, verifier(lambda text: 1.0)), search.init(root)
    ends = []
    for forced in ((5,), (5, EOS)):
        trial = search.open_trial(state, "expand", state.tree.root, forced=forced, valued=False)
        (outcome,) = runner.run([trial])
        ends.append((outcome.token_ids, outcome.finish_reason, outcome.value))
    assert ends == [((5,), "length", None), ((5, EOS), "eos", None)]
