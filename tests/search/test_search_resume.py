"""A search saved in the middle and resumed elsewhere ends as the uninterrupted one."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
from search_fakes import FakeEngine
from test_search_contract import evaluator_for, make, picture

from dendrite_engine.errors import InvalidArgument, SearchError, SnapshotRejected
from dendrite_engine.search import MCTS, SEARCHES, BeamSearch, Budget, resume_search, start_search
from dendrite_engine.search.base import Search
from dendrite_engine.snapshots.container import read_snapshot, write_snapshot

# LATS moves its root, and says so when it is to be saved
ALL = pytest.mark.parametrize("name", [n for n in SEARCHES.names() if n != "lats"])

WAIT = 60
BUDGET = Budget(iterations=60, tokens=400)


def fresh(**options):
    return FakeEngine(9, **{"eos": 0.5, **options})


def grown_root(engine):
    """A root that is a fork, and was forked before: its draws are not those of a new prompt."""
    first = engine.prompt([1, 2, 3])
    first.fork(2)[0].prune()
    root = first.fork()[0]
    root.extend([4, 5], [-0.5, -0.25])
    root.fork()[0].prune()
    return root


def begin(engine, search, **options):
    options = {"evaluator": evaluator_for(search), **options}
    return start_search(engine, grown_root(engine), search, BUDGET, **options)


def saved_after(batches, search, path, engine=None):
    """A file of a search after so many batches; `None` where it had ended before."""
    engine = engine or fresh()
    handle = begin(engine, search, paused=True)
    if batches:
        handle.step(batches)
    assert handle.wait_paused(WAIT)
    if handle.state == "done":
        return None
    handle.save(path)
    handle.stop()
    return handle.wait(WAIT)


def resumed(path, search, engine=None, **options):
    options = {"evaluator": evaluator_for(search), **options}
    return resume_search(engine or fresh(), path, **options)


def ending(handle):
    """All that must be equal in the end."""
    result = handle.wait(WAIT)
    counts = (result.reason, result.nodes, result.iterations, result.tokens, result.value)
    held = result.best.token_ids if result.best is not None else None
    return picture(handle._session.state), counts, result.token_ids, held, result.node.id


@ALL
@pytest.mark.parametrize("seed", [None, 5])
def test_a_resumed_search_ends_as_the_uninterrupted_one(name, seed, tmp_path):
    search = make(name, seed=seed)
    whole = ending(begin(fresh(), search))
    tried = 0
    for batches in (0, 1, 2, 3, 5, 8):
        path = tmp_path / f"{batches}"
        if saved_after(batches, search, path) is None:
            break
        engine = fresh()
        engine.prompt([7, 7]).fork(3)  # ids and pages are others than those of the first run
        handle = resumed(path, search, engine)
        assert ending(handle) == whole, batches
        engine.check_integrity()
        handle.result.prune()
        handle.root.prune()
        assert len(engine.branches) == 4
        tried += 1
    assert tried >= 3


@ALL
def test_a_search_resumed_twice_in_a_row_ends_as_the_uninterrupted_one(name, tmp_path):
    search = make(name)
    whole = ending(begin(fresh(), search))
    assert saved_after(2, search, tmp_path / "a") is not None
    middle = resumed(tmp_path / "a", search, paused=True)
    middle.step(2)
    assert middle.wait_paused(WAIT)
    middle.save(tmp_path / "b")
    middle.stop()
    middle.wait(WAIT)
    assert ending(resumed(tmp_path / "b", search)) == whole


@ALL
def test_saving_changes_nothing_about_the_search(name, tmp_path):
    search = make(name)
    whole = ending(begin(fresh(), search))
    handle = begin(fresh(), search, paused=True)
    for index in range(4):
        handle.step()
        assert handle.wait_paused(WAIT)
        handle.save(tmp_path / f"{index}")
    handle.resume()
    assert ending(handle) == whole


@ALL
def test_a_search_that_ended_by_its_budget_goes_on_with_a_larger_one(name, tmp_path):
    search = make(name)
    small, large = Budget(iterations=9), Budget(iterations=30)
    engine, other, third = fresh(), fresh(), fresh()
    full = start_search(engine, grown_root(engine), search, large, evaluator=evaluator_for(search))
    part = start_search(other, grown_root(other), search, small, evaluator=evaluator_for(search))
    assert part.wait(WAIT).iterations <= 9
    part.save(tmp_path / "ended")
    assert resumed(tmp_path / "ended", search, fresh()).wait(WAIT).iterations <= 9
    assert ending(resumed(tmp_path / "ended", search, third, budget=large))[2] == ending(full)[2]


@ALL
def test_a_running_search_can_be_saved_from_any_thread(name, tmp_path):
    search = make(name)
    engine = fresh(eos=-1e9)
    gate = threading.Event()
    handle = begin(engine, search, on_event=lambda event: gate.set())
    assert gate.wait(WAIT)
    written = handle.save(tmp_path / "live")
    assert written["nodes"] >= 1
    expected = ending(handle)
    assert ending(resumed(tmp_path / "live", search, fresh(eos=-1e9))) == expected


@ALL
def test_no_algorithm_state_is_left_out_of_a_checkpoint(name, tmp_path):
    search = make(name)
    engine = fresh()
    handle = begin(engine, search, paused=True)
    handle.step(3)
    assert handle.wait_paused(WAIT)
    handle.save(tmp_path / "s")
    again = resumed(tmp_path / "s", search, paused=True)
    for field, value in vars_of(handle._session.state).items():
        assert plain(vars_of(again._session.state)[field]) == plain(value), field
    assert again.usage().tokens == handle.usage().tokens
    for one in (handle, again):
        one.stop()


def vars_of(state):
    skip = ("tree", "notes")
    fields = state.__dataclass_fields__
    return {
        n: getattr(state, n)
        for n in fields
        if n not in skip and fields[n].metadata.get("checkpoint", True)
    }


def plain(value):
    """A value with its nodes named, so that those of two trees can be compared."""
    if hasattr(value, "token_ids") and hasattr(value, "virtual"):
        return "node", value.id
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [plain(v) for v in value]
    if hasattr(value, "getstate"):
        return value.getstate()
    if hasattr(value, "__dataclass_fields__"):
        return {n: plain(getattr(value, n)) for n in value.__dataclass_fields__ if n != "branch"}
    return value


# -- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    saved_after(4, MCTS(width=3, tokens_per_node=3, parallel=3), tmp_path / "f")
    return tmp_path / "f"


def value(branches):
    return [len(set(b.token_ids)) / 10 for b in branches]


def refused(path, field, engine=None, **options):
    engine = engine or fresh()
    with pytest.raises(SnapshotRejected) as caught:
        resume_search(engine, path, **{"evaluator": value, **options})
    assert caught.value.field == field, caught.value
    assert engine.live == {}
    assert engine.refs == {}
    assert engine.log == []


def test_another_model_seed_or_kind_of_file_is_refused_before_a_page_is_touched(file, tmp_path):
    refused(file, "model", FakeEngine(10))
    refused(file, "model", FakeEngine(9, seed=3))
    other = FakeEngine(9, seed=3)
    other.fingerprint = fresh().fingerprint
    refused(file, "engine.seed", other)
    write_snapshot(tmp_path / "k", "branches", {}, {})
    refused(tmp_path / "k", "kind")


def test_a_truncated_or_flipped_file_is_refused_before_a_page_is_touched(file):
    data = file.read_bytes()
    for size in range(0, len(data), 211):
        file.write_bytes(data[:size])
        refused(file, "length")
    engine = fresh()
    for index in range(0, len(data), 53):
        flipped = bytearray(data)
        flipped[index] ^= 1 << index % 8
        file.write_bytes(flipped)
        with pytest.raises(SnapshotRejected):
            resume_search(engine, file, evaluator=value)
    assert engine.live == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda b: b["algorithm"].pop("options"), "algorithm"),
        (lambda b: b["algorithm"]["options"].update(speed=3), "options.speed"),
        (lambda b: b["algorithm"]["options"].update(width={"$": "code", "v": 1}), "options.width"),
        (lambda b: b["state"].pop("leader"), "state"),
        (lambda b: b["state"].update(leader={"$": "node", "v": 10**6}), "state.leader"),
        (lambda b: b["state"].update(leader={"$": "object", "v": ["os.stat", {}]}), "state.leader"),
        (lambda b: b["tree"].update(root=99999), "tree.root"),
        (lambda b: b["tree"]["parents"].__setitem__(1, 1), "tree.parents"),
        (lambda b: b["tree"]["children"].__setitem__(0, [0]), "tree.children"),
        (lambda b: b["tree"]["columns"].update(mood=b["tree"]["columns"]["depth"]),
         "tree.columns.mood"),
        (lambda b: b["tree"]["columns"]["depth"].pop(), "tree.columns"),
        (lambda b: b["tree"].update(draws={"$": "dict", "v": [[10**6, [1, 2]]]}), "tree.draws"),
        (lambda b: b.update(budget=3), "budget"),
        (lambda b: b.update(usage=None), "usage"),
        (lambda b: b.pop("tree"), "tree"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_add_up_is_refused_by_field(file, change, field):
    snapshot = read_snapshot(file, "search")
    change(snapshot.body)
    write_snapshot(file, "search", snapshot.body, snapshot.arrays)
    refused(file, field)


def test_arrays_that_do_not_add_up_are_refused_by_field(file):
    snapshot = read_snapshot(file, "search")
    for name, field in (
        ("tokens", "token_counts"),
        ("root_tokens", "root_logprobs"),
        ("logprob_counts", "tree"),
    ):
        arrays = {**snapshot.arrays, name: snapshot.arrays[name][:-1]}
        if name == "logprob_counts":
            arrays["logprobs"] = arrays["logprobs"][: arrays[name].sum()]
        write_snapshot(file, "search", snapshot.body, arrays)
        refused(file, field)


def test_an_evaluator_that_was_code_has_to_be_given_again(file):
    with pytest.raises(InvalidArgument, match="evaluator"):
        resume_search(fresh(), file)


def test_an_evaluator_that_is_data_is_kept(tmp_path):
    engine = fresh()
    handle = start_search(engine, grown_root(engine), "mcts", BUDGET, paused=True)
    handle.step(2)
    assert handle.wait_paused(WAIT)
    handle.save(tmp_path / "s")
    handle.resume()
    other = resume_search(fresh(), tmp_path / "s")
    assert ending(other) == ending(handle)
    assert other._session.evaluator == handle._session.evaluator


def test_live_options_may_change_on_the_way_and_others_may_not(file):
    handle = resume_search(fresh(), file, evaluator=value, exploration=0.1, paused=True)
    assert handle.algorithm.exploration == 0.1
    assert handle.algorithm.width == 3
    handle.stop()
    with pytest.raises(InvalidArgument, match="max_depth can't change"):
        resume_search(fresh(), file, evaluator=value, max_depth=3)


def test_an_algorithm_of_ones_own_is_given_by_its_class(tmp_path):
    saved_after(2, Lazy(width=2, pick=len), tmp_path / "own")
    with pytest.raises(InvalidArgument, match="algorithm="):
        resume_search(fresh(), tmp_path / "own", evaluator=value)
    with pytest.raises(SnapshotRejected, match="lazy"):
        resume_search(fresh(), tmp_path / "own", evaluator=value, algorithm=BeamSearch)
    with pytest.raises(InvalidArgument, match="pick"):
        resume_search(fresh(), tmp_path / "own", evaluator=value, algorithm=Lazy)
    handle = resume_search(fresh(), tmp_path / "own", evaluator=value, algorithm=Lazy, pick=len)
    assert handle.wait(WAIT).iterations > 2


@dataclass(frozen=True, kw_only=True)
class Lazy(MCTS):
    """MCTS under another name, with an option that is code."""

    name = "lazy"
    pick: Any = None


def test_a_state_that_can_not_be_stored_says_where_and_the_search_goes_on(tmp_path):
    engine = fresh()
    handle = begin(engine, MCTS(width=2, tokens_per_node=2), evaluator=value, paused=True)
    handle.step()
    assert handle.wait_paused(WAIT)
    handle._session.state.high = object()
    with pytest.raises(SearchError, match=r"state\.high holds a object"):
        handle.save(tmp_path / "s")
    handle._session.state.high = 1.0
    assert not (tmp_path / "s").exists()
    handle.resume()
    assert handle.wait(WAIT).nodes > 1


def test_a_search_can_not_wait_for_itself_and_a_failed_one_can_not_be_saved(tmp_path):
    engine, errors = fresh(), []

    def save(event):
        try:
            handle.save(tmp_path / "s")
        except SearchError as error:
            errors.append(str(error))

    handle = begin(engine, MCTS(width=2), evaluator=value, paused=True)
    handle.on_event(save)
    handle.resume()
    handle.wait(WAIT)
    assert "can't wait for itself" in errors[0]
    engine = fresh()
    handle = begin(engine, MCTS(width=2), evaluator=value, paused=True)
    engine.closed = True
    handle.resume()
    with pytest.raises(Exception, match="closed"):
        handle.wait(WAIT)
    with pytest.raises(SearchError, match="failed"):
        handle.save(tmp_path / "s")


def test_a_search_whose_root_was_pruned_can_not_be_saved(tmp_path):
    handle = begin(fresh(), MCTS(width=2), evaluator=value, paused=True)
    assert handle.wait_paused(WAIT)
    handle.root.prune()
    with pytest.raises(SearchError, match="root was pruned"):
        handle.save(tmp_path / "s")
    handle.stop()


def test_a_resumed_search_on_a_pool_that_holds_little_more_than_the_root_goes_on(file):
    engine = fresh(num_pages=12)
    handle = resume_search(engine, file, evaluator=value)
    whole = resume_search(fresh(), file, evaluator=value)
    result, expected = handle.wait(WAIT), whole.wait(WAIT)
    engine.check_integrity()
    assert result.token_ids == expected.token_ids
    assert result.released > 0


def test_every_registered_search_is_resumed_by_its_name():
    for name in SEARCHES.names():
        kind = SEARCHES.get(name)
        assert kind.name == name
        assert issubclass(kind, Search)


def test_a_search_whose_root_has_moved_says_so_and_is_not_saved(tmp_path):
    search = make("lats")
    handle = begin(fresh(), search, paused=True)
    handle.step(12)
    assert handle.wait_paused(WAIT)
    assert handle._session.state.tree.root.parent is not None
    with pytest.raises(SearchError, match="root has moved to node"):
        handle.save(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    handle.stop()
