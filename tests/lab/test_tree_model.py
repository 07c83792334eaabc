"""Runs and pieces: how the event log becomes the nodes on the screen."""

from __future__ import annotations

import itertools
import random

import pytest
from fakes import FakeEngine

from dendrite_engine.trace import Event
from dendrite_lab.tree_model import TreeModel


def decode(ids):
    return [f"<{i}>" for i in ids]


def event(kind, branch, **data):
    return Event(0, kind, branch, data)


def model_of(*events):
    model = TreeModel(decode)
    for item in events:
        model.apply(item)
    return model


def shape(model):
    """(branch, start, end, parent's (branch, start)) of every node."""
    pieces = {p.node: p for p in model.all_pieces()}
    rows = []
    for piece in pieces.values():
        above = pieces.get(piece.parent)
        rows.append((piece.key, piece.start, piece.end, above and (above.key, above.start)))
    return sorted(rows)


PROMPT = event("prompt", 1, tokens=list(range(10)), cached=0)


def test_a_prompt_is_one_node():
    assert shape(model_of(PROMPT)) == [(1, 0, 10, None)]


def test_forks_at_the_end_hang_below_the_whole_node():
    model = model_of(
        PROMPT,
        event("fork", 2, parent=1, position=10),
        event("fork", 3, parent=1, position=10),
    )
    assert shape(model) == [(1, 0, 10, None), (2, 10, 10, (1, 0)), (3, 10, 10, (1, 0))]


def test_a_fork_inside_a_node_cuts_it_and_the_head_keeps_its_id():
    model = model_of(PROMPT)
    before = model.all_pieces()[0].node
    model.apply(event("fork", 2, parent=1, position=6))
    assert shape(model) == [(1, 0, 6, None), (1, 6, 10, (1, 0)), (2, 6, 6, (1, 0))]
    assert model.pieces(1)[0].node == before


def test_children_move_below_the_tail_when_their_node_is_cut():
    model = model_of(PROMPT, event("fork", 2, parent=1, position=10))
    model.take_changes()
    model.apply(event("fork", 3, parent=1, position=4))
    assert (2, 10, 10, (1, 4)) in shape(model)
    changed = {piece.key for piece in model.take_changes().pieces}
    assert 2 in changed


def test_a_fork_above_the_parents_own_tokens_attaches_to_the_run_that_holds_them():
    model = model_of(
        PROMPT,
        event("fork", 2, parent=1, position=10),
        event("extend", 2, tokens=[50, 51], logprobs=[-1, -2]),
        event("fork", 3, parent=2, position=5),
    )
    assert (3, 5, 5, (1, 0)) in shape(model)


def test_a_parent_that_writes_on_after_a_fork_gets_a_node_of_its_own():
    model = model_of(
        PROMPT,
        event("fork", 2, parent=1, position=10),
        event("extend", 1, tokens=[7, 8], logprobs=None),
    )
    assert shape(model) == [(1, 0, 10, None), (1, 10, 12, (1, 0)), (2, 10, 10, (1, 0))]


def test_pruning_a_leaf_joins_what_it_had_cut():
    model = model_of(PROMPT, event("fork", 2, parent=1, position=6))
    gone = {p.node for p in model.all_pieces()} - {model.pieces(1)[0].node}
    model.take_changes()
    model.apply(event("prune", 2))
    assert shape(model) == [(1, 0, 10, None)]
    assert set(model.take_changes().removed) == gone


def test_a_pruned_parent_stays_as_far_as_its_children_hold_its_tokens():
    model = model_of(
        PROMPT,
        event("fork", 2, parent=1, position=6),
        event("prune", 1),
    )
    assert shape(model) == [(1, 0, 6, None), (2, 6, 6, (1, 0))]
    assert not model.runs[1].alive
    model.apply(event("prune", 2))
    assert shape(model) == []


def test_rollback_leaves_shared_tokens_to_the_children_that_hold_them():
    model = model_of(
        PROMPT,
        event("fork", 2, parent=1, position=8),
        event("fork", 3, parent=1, position=6),
        event("rollback", 1, to=4),
    )
    assert shape(model) == [
        (-1, 4, 6, (1, 0)),
        (-1, 6, 8, (-1, 4)),
        (1, 0, 4, None),
        (2, 8, 8, (-1, 6)),
        (3, 6, 6, (-1, 4)),
    ]
    assert model.tokens(model.pieces(-1)[0]) == [4, 5]


def test_rollback_past_the_fork_position_hangs_the_branch_further_up():
    model = model_of(
        PROMPT,
        event("fork", 2, parent=1, position=10),
        event("extend", 2, tokens=[20, 21], logprobs=None),
        event("rollback", 2, to=3),
        event("extend", 2, tokens=[30], logprobs=None),
    )
    assert (2, 3, 4, (1, 0)) in shape(model)
    assert model.tokens(model.tip(2)) == [30]


def test_a_character_split_over_tokens_is_decoded_whole_when_it_is_complete():
    halves = {1: b"\xc3", 2: b"\xa9", 3: b"!"}

    def pieces(ids):
        out, held = [], b""
        for i in ids:
            held += halves[i]
            try:
                out.append(held.decode())
                held = b""
            except UnicodeDecodeError:
                out.append("")
        if held:
            out[-1] += "\ufffd"
        return out

    model = TreeModel(pieces)
    model.apply(event("prompt", 1, tokens=[3, 1], cached=0))
    assert model.texts(model.tip(1)) == ["!", "\ufffd"]
    model.apply(event("extend", 1, tokens=[2], logprobs=None))
    assert "".join(model.texts(model.tip(1))) == "!é"


def test_only_what_changed_is_taken_and_only_once():
    model = model_of(PROMPT, event("fork", 2, parent=1, position=10))
    model.take_changes()
    assert not model.has_changes
    model.apply(event("extend", 2, tokens=[5], logprobs=[-1]))
    assert [piece.key for piece in model.take_changes().pieces] == [2]
    assert model.take_changes().pieces == []


def test_unknown_branches_and_other_kinds_change_nothing():
    model = model_of(
        PROMPT,
        event("extend", 99, tokens=[1], logprobs=None),
        event("fork", 5, parent=98, position=1),
        event("prune", 97),
        event("job", 0, state="start", branches=[1]),
    )
    assert shape(model) == [(1, 0, 10, None)]


def test_a_chain_of_ten_thousand_forks_needs_no_recursion():
    model = model_of(PROMPT)
    for k in range(2, 10_002):
        model.apply(event("fork", k, parent=k - 1, position=8 + k))
        model.apply(event("extend", k, tokens=[k], logprobs=None))
    assert model.tip(10_001).end == 10_010
    assert len(model.all_pieces()) == 10_001


@pytest.mark.parametrize("seed", range(20))
def test_the_path_to_every_tip_spells_the_branch_whatever_happened(seed):
    """The oracle is the engine's own list of tokens, through random forks, rollbacks and prunes."""
    rng = random.Random(seed)
    engine = FakeEngine(num_pages=4096)
    model, seq, ids = TreeModel(engine.tokenizer.pieces), 0, itertools.count()
    engine.prompt([engine.tokenizer._id(f"w{next(ids)}") for _ in range(8)])
    for _ in range(120):
        branch = rng.choice(engine.branches)
        verb = rng.choice(["fork", "fork_at", "extend", "extend", "rollback", "prune"])
        if verb == "fork":
            branch.fork(rng.randint(1, 3))
        elif verb == "fork_at":
            branch.fork(at=rng.randint(1, branch.num_tokens))
        elif verb == "extend":
            branch.extend([engine.tokenizer._id(f"w{next(ids)}") for _ in range(rng.randint(1, 5))])
        elif verb == "rollback" and branch.num_tokens > 1:
            branch.rollback(rng.randint(1, branch.num_tokens - 1))
        elif verb == "prune" and len(engine.branches) > 1:
            branch.prune()
        events = engine.trace.since(seq)
        seq += len(events)
        for item in events:
            model.apply(item)
        check(model, engine)


def check(model, engine):
    pieces = {piece.node: piece for piece in model.all_pieces()}
    assert len(pieces) == len(model.all_pieces())
    for branch in engine.branches:
        path = model.path(model.tip(branch.id))
        assert [t for piece in path for t in model.tokens(piece)] == branch.token_ids
        assert all(a.end == b.start for a, b in itertools.pairwise(path))
    inner = {piece.parent for piece in pieces.values()}
    for piece in pieces.values():
        assert piece.parent == 0 or piece.parent in pieces
        if piece.node not in inner:
            assert model.runs[piece.key].alive, "a leaf that no branch holds"
