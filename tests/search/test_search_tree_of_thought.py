"""Tree of thought against brute force on a small space, its phases, and the model as a judge."""

from __future__ import annotations

import itertools

import pytest
from search_fakes import FakeEngine, unit

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import (
    Budget,
    Lookahead,
    Runner,
    TreeOfThought,
    prompted_value,
    prompted_vote,
    start_search,
    verifier,
)

ENDLESS = -1e9
LETTERS = ("w1", "w2", "w3")


def value_of(tokens) -> float:
    """A fixed value for every path of the space."""
    return round(unit("value", tuple(tokens)), 6) if tokens else 0.0


def by_path(branches):
    return [value_of(b.token_ids[1:]) for b in branches]


def space(depth):
    return list(itertools.product((1, 2, 3), repeat=depth))


def search_space(**options):
    """A search in the space of words of three letters; the root holds w7."""
    defaults = {
        "expansion": "actions", "actions": LETTERS, "priors": "uniform", "width": 3,
        "max_depth": 4, "parallel": 1,
    }  # fmt: skip
    return TreeOfThought(**{**defaults, **options})


def run(search, evaluator=by_path, budget=None):
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([7])
    handle = start_search(
        engine, root, search, budget or Budget(iterations=10_000), evaluator=evaluator
    )
    result = handle.wait(60)
    engine.check_integrity()
    result.prune()
    assert engine.branches == [root]
    return result, handle.tree


# -- against brute force ------------------------------------------------------------------------


@pytest.mark.parametrize("breadth", [1, 2, 3, 5])
def test_breadth_first_keeps_the_best_of_every_level_as_brute_force_does(breadth):
    result, tree = run(search_space(breadth=breadth))
    level, made = [()], set()
    for _ in range(4):
        children = [(*path, letter) for path in level for letter in (1, 2, 3)]
        made |= set(children)
        level = sorted(children, key=value_of, reverse=True)[:breadth]
    assert result.token_ids == level[0]
    assert result.value == value_of(level[0])
    assert {tuple(tree.tokens(n)) for n in tree.nodes[1:]} == made
    assert result.reason == "finished"


@pytest.mark.parametrize("order", ["dfs", "best_first"])
@pytest.mark.parametrize("parallel", [1, 4])
def test_without_a_threshold_every_path_is_tried_and_the_best_one_found(order, parallel):
    result, tree = run(search_space(order=order, parallel=parallel))
    assert result.token_ids == max(space(4), key=value_of)
    leaves = {tuple(tree.tokens(n)) for n in tree.nodes if n.depth == 4}
    assert leaves == set(space(4))
    assert result.reason == "exhausted"


def plain_dfs(threshold):
    """Algorithm 2 of the paper, recursively: the order in which thoughts are expanded."""
    order, leaves = [], []

    def visit(path):
        if len(path) == 4:
            leaves.append(path)
            return
        order.append(path)
        children = sorted(((*path, i) for i in (1, 2, 3)), key=lambda p: (-value_of(p), p))
        for child in children:
            if value_of(child) >= threshold:
                visit(child)

    visit(())
    return order, leaves


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7])
def test_depth_first_expands_in_the_order_of_the_recursive_algorithm(threshold):
    engine = FakeEngine(9, eos=ENDLESS)
    search = search_space(order="dfs", threshold=threshold)
    runner, state = Runner(engine, engine.prompt([7]), by_path), search.init(engine.branches[0])
    expanded = []
    while not search.done(state):
        trials = search.ask(state, search.plan(state).trials)
        expanded.append(tuple(state.tree.tokens(trials[0].node)))
        search.tell(state, runner.run(trials))
        runner.settle(state)
    order, leaves = plain_dfs(threshold)
    assert expanded == order
    if leaves:
        assert tuple(state.tree.tokens(search.best(state))) == max(leaves, key=value_of)


def test_best_first_expands_the_best_thought_of_the_whole_frontier_each_time():
    engine = FakeEngine(9, eos=ENDLESS)
    search = search_space(order="best_first")
    runner, state = Runner(engine, engine.prompt([7]), by_path), search.init(engine.branches[0])
    frontier = [()]
    while frontier and not search.done(state):
        trials = search.ask(state, search.plan(state).trials)
        best = max(frontier, key=value_of)
        assert tuple(state.tree.tokens(trials[0].node)) == best
        frontier.remove(best)
        frontier += [(*best, i) for i in (1, 2, 3) if len(best) < 3]
        search.tell(state, runner.run(trials))
        runner.settle(state)


def test_depth_first_ends_with_the_first_complete_path_that_reaches_the_target():
    _, leaves = plain_dfs(0.0)
    target = sorted(map(value_of, leaves))[-5]
    result, _ = run(search_space(order="dfs", target=target))
    assert result.token_ids == next(leaf for leaf in leaves if value_of(leaf) >= target)
    assert result.reason == "target"


def test_branches_that_cannot_be_returned_to_are_pruned_after_every_round():
    engine = FakeEngine(9, eos=ENDLESS)
    for order in ("bfs", "dfs", "best_first"):
        root = engine.prompt([7])
        search = search_space(order=order, threshold=0.2)
        runner, state = Runner(engine, root, by_path), search.init(root)
        while not search.done(state):
            search.tell(state, runner.run(search.ask(state, search.plan(state).trials)))
            runner.settle(state)
            ends = [*state.frontier, *state.round, *filter(None, [state.leader])]
            needed = {step.branch_id for node in ends for step in node.path()} | {root.id}
            assert {b.id for b in engine.branches} <= needed
        runner.keeper.prune_all()
        root.prune()
    assert engine.branches == []


# -- thoughts ------------------------------------------------------------------------------------


def test_a_round_is_one_batch():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    search = TreeOfThought(width=3, breadth=2, max_depth=3, tokens_per_node=5)
    start_search(engine, root, search, evaluator=verifier(lambda text: 0.5)).wait(60)
    assert [rows for name, rows in engine.log if name == "submit"] == [3, 6, 6]


def test_equal_thoughts_are_merged_and_count_once():
    engine = FakeEngine(3, logits=lambda tokens: [ENDLESS, 4.0, 0.0])
    root = engine.prompt([1])
    handle = start_search(
        engine, root, TreeOfThought(width=6, breadth=4, tokens_per_node=1, max_depth=2)
    )
    handle.wait(60)
    paths = [tuple(handle.tree.tokens(n)) for n in handle.tree.nodes]
    assert len(paths) == len(set(paths))
    assert handle._session.state.merged > 0


def test_top_p_thoughts_are_those_of_the_nucleus_though_it_is_known_only_after_the_first():
    engine = FakeEngine(7, eos=ENDLESS)
    search = TreeOfThought(
        expansion="top_p", top_p=0.8, width=6, tokens_per_node=2, max_depth=1, order="dfs"
    )
    handle = start_search(engine, root := engine.prompt([1, 2]), search)
    handle.wait(60)
    mass, expected = 0.0, []
    for option in engine.top_tokens([root], 6)[0]:
        if mass < 0.8:
            expected.append(option.token_id)
        mass += 2.718281828459045**option.logprob
    assert [n.token_ids[0] for n in handle.tree.root.children] == expected


def test_proposals_are_written_once_and_taken_apart_into_thoughts():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    seen = []

    def parse(text):
        seen.append(text)
        return text.split()  # a thought a word

    search = TreeOfThought(
        expansion="propose", propose="w8 w8", propose_tokens=5, parse=parse, width=3, breadth=2,
        max_depth=2, seed=4,
    )  # fmt: skip
    handle = start_search(engine, root, search, evaluator=by_path)
    result = handle.wait(60)
    assert len(seen) == 1 + 2, "one list for the root, one for each thought kept"
    assert all(len(text.split()) == 5 for text in seen), "without the forced question"
    first = list(dict.fromkeys(seen[0].split()))[:3]
    assert [engine.tokenizer.decode(n.token_ids) for n in handle.tree.root.children] == first
    assert result.tokens == 3 * (2 + 5) + len(handle.tree.nodes) - 1 + handle._session.state.merged
    result.prune()
    assert engine.branches == [root]


def test_a_parser_that_raises_costs_its_thought_its_children():
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])
    calls = []

    def parse(text):
        calls.append(text)
        if len(calls) == 2:
            raise ValueError("unreadable")
        return text.split()

    search = TreeOfThought(expansion="propose", propose="w8", parse=parse, width=2, max_depth=2)
    result = start_search(engine, root, search, evaluator=by_path).wait(60)
    assert result.node.depth == 2
    assert any(e.kind == "error" and "unreadable" in e.data["error"] for e in engine.trace)
    result.prune()
    assert engine.branches == [root]


def test_a_vote_sees_the_whole_round_at_once():
    ballots = []

    def vote(branches):
        ballots.append([tuple(b.token_ids[1:]) for b in branches])
        return [value_of(b.token_ids[1:]) for b in branches]

    result, _ = run(search_space(judge="vote", breadth=2), vote)
    plain, _ = run(search_space(judge="value", breadth=2))
    assert [len(ballot) for ballot in ballots] == [3, 6, 6, 6]
    assert result.token_ids == plain.token_ids


def test_a_thought_that_ends_the_text_is_a_complete_path():
    engine = FakeEngine(6, eos=ENDLESS)
    search = TreeOfThought(
        thought_stop=("w3",), stop=("w4",), tokens_per_node=20, width=4, breadth=3, max_depth=5
    )
    handle = start_search(engine, engine.prompt([1]), search)
    handle.wait(60)
    ended = [n for n in handle.tree.nodes[1:] if n.token_ids[-1] == 4]
    assert ended
    assert all(n.status == "terminal" and not n.children for n in ended)


# -- lookahead -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_lookahead_takes_the_candidate_whose_greedy_continuation_is_valued_highest(steps):
    engine = FakeEngine(9, eos=ENDLESS)
    root = engine.prompt([1, 2])

    def end_value(tokens):
        return unit("end", tuple(tokens))

    def greedy(tokens, count):
        tokens = list(tokens)
        for _ in range(count):
            row = engine.logprobs_after(tokens)
            tokens.append(max(range(len(row)), key=lambda i: (row[i], -i)))
        return tokens

    search = Lookahead(
        width=4, expansion="top_k", tokens_per_node=1, max_depth=3, lookahead=steps, seed=0
    )
    handle = start_search(
        engine, root, search, evaluator=lambda bs: [end_value(b.token_ids) for b in bs]
    )
    result = handle.wait(60)
    held = [1, 2]
    for _ in range(3):
        options = [o.token_id for o in engine.top_tokens([root.fork()[0].extend(held[2:] or [1])
                   if held[2:] else root], 4)[0]]  # fmt: skip
        held.append(max(options, key=lambda t: end_value(greedy([*held, t], steps))))
    assert list(result.token_ids) == held[2:]
    assert result.tokens == 3 * 4 * (1 + steps)


# -- the model as a judge ------------------------------------------------------------------------


def test_a_prompted_value_is_the_expectation_over_its_answers():
    engine = FakeEngine(9, eos=ENDLESS)
    branches = [engine.prompt([1, 2]), engine.prompt([3, 4])]
    judge = prompted_value("w8", {"w5": 1.0, "w6": 0.25, "w7": 0.0})
    values = judge(branches)
    for branch, value in zip(branches, values, strict=True):
        row = engine.logprobs_after([*branch.token_ids, 8])
        weights = [2.718281828459045 ** row[i] for i in (5, 6, 7)]
        assert value == pytest.approx((weights[0] + 0.25 * weights[1]) / sum(weights))
    assert engine.branches == branches
    assert [rows for name, rows in engine.log if name == "forward"] == [6]


def test_a_prompted_vote_is_the_share_of_each_letter_after_the_ballot(monkeypatch):
    engine = FakeEngine(40, eos=ENDLESS)
    words = {" A": 11, " B": 12, " C": 13}
    ballots = []

    def encode(text):
        if text in words:
            return [words[text]]
        ballots.append(text)
        return [9]

    monkeypatch.setattr(engine.tokenizer, "encode", encode)
    root = engine.prompt([1, 2])
    branches = [root.fork()[0].extend([token]) for token in (3, 4, 5)]
    shares = prompted_vote().bind(root)(branches)
    assert ballots == ["\nChoices:\nA. w3\nB. w4\nC. w5\nThe best choice is"]
    row = engine.logprobs_after([1, 2, 9])
    weights = [2.718281828459045 ** row[i] for i in (11, 12, 13)]
    assert shares == pytest.approx([w / sum(weights) for w in weights])
    assert engine.branches == [root, *branches]
    assert prompted_vote().bind(root)(branches[:1]) == [1.0]


def test_a_judge_prunes_its_forks_when_the_pool_is_full():
    engine = FakeEngine(9, eos=ENDLESS, num_pages=2)
    branches = [engine.prompt([1, 2, 3, 4]), engine.prompt([3, 4])]
    with pytest.raises(Exception, match="page"):
        prompted_value("w8 w8 w8", {"w5": 1.0, "w6": 0.0})(branches)
    assert engine.branches == branches


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: TreeOfThought(order="random"), "order"),
        (lambda: TreeOfThought(breadth=0), "breadth"),
        (lambda: TreeOfThought(judge="jury"), "judge"),
        (lambda: TreeOfThought(threshold="0"), "threshold"),
        (lambda: TreeOfThought(expansion="propose"), "go together"),
        (lambda: TreeOfThought(propose="List:"), "go together"),
        (lambda: TreeOfThought(judge="vote", lookahead=1), "lookahead"),
        (lambda: TreeOfThought(lookahead=-1), "lookahead"),
        (lambda: prompted_value("?", {"yes": 1.0}), "answers"),
        (lambda: prompted_value("?", {"yes": 1.0, "no": "0"}), "answers"),
        (lambda: prompted_value(7, {"yes": 1.0, "no": 0.0}), "question"),
    ],
)
def test_a_bad_option_is_refused_by_name(make, named):
    with pytest.raises(InvalidArgument, match=named):
        make()


def test_answers_that_begin_alike_are_refused():
    engine = FakeEngine(9)
    judge = prompted_value("w8", {"w5 w6": 1.0, "w5": 0.0})
    with pytest.raises(InvalidArgument, match="token of its own"):
        judge([engine.prompt([1])])
