"""What a checkpoint can hold comes back as it was; what it can't is named."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import random
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
from search_fakes import FakeEngine

from dendrite_engine.errors import SearchError, SnapshotRejected
from dendrite_engine.sampling_params import SamplingParams
from dendrite_engine.search import Budget, resume_search, start_search
from dendrite_engine.search.base import Search, State
from dendrite_engine.search.budget import BatchPlan
from dendrite_engine.search.codec import Decoder, Encoder, known_types
from dendrite_engine.search.tree import Tree


class Mood(enum.Enum):
    CALM = 1
    WILD = 2


class Pair(NamedTuple):
    left: int
    right: Any


@dataclass(frozen=True)
class Box:
    inside: Any
    size: int = 3


@dataclass
class Unknown:
    x: int = 1


TYPES = {
    **{f"{cls.__module__}.{cls.__qualname__}": cls for cls in (Mood, Pair, Box)},
    **known_types(SamplingParams),
}


@pytest.fixture
def tree():
    engine = FakeEngine(9)
    made = Tree(engine.prompt([1, 2]))
    made.add(made.root, (3,), (-0.5,), branch=made.root.branch.fork()[0])
    return made


def through(value, tree):
    """The value, written as strict JSON and read back."""
    owners = {node.branch_id: node.id for node in tree.nodes}
    text = json.dumps(Encoder(TYPES, owners).encode(value, "state.x"), allow_nan=False)
    return Decoder(TYPES, tree.nodes).decode(json.loads(text), "state.x")


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(2**70), "täxt\0", 0.1, 1e-320, -0.0, math.inf, -math.inf,
        [1, [2.5, "a"]], (), (1, (2,)), {}, {"a": 1}, {1: (2, 3), (4, 5): [None]}, {True: 1},
        set(), {3, 1, 2}, frozenset({(1, 2)}), deque([1, 2], 5), Pair(1, (2, [3])), Mood.WILD,
        Box({"$": "dict"}), [Box(Pair(1, Mood.CALM), 7)], {"$": "float", "v": "x"},
        SamplingParams(temperature=0.5, logit_bias={3: -math.inf}, stop=("a",)),
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_comes_back_as_what_it_was(value, tree):
    found = through(value, tree)
    assert found == value
    assert type(found) is type(value)


def test_details_that_equality_does_not_see_come_back_too(tree):
    assert math.isnan(through(math.nan, tree))
    assert math.copysign(1, through(-0.0, tree)) == -1
    assert through(deque([1], 5), tree).maxlen == 5
    counts = through(defaultdict(list, {1: [2]}), tree)
    assert counts[1] == [2]
    assert counts["new"] == []
    assert list(through({3: 0, 1: 0, 2: 0}, tree)) == [3, 1, 2]


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", "uint8"])
def test_arrays_keep_dtype_and_shape(dtype, tree):
    value = np.arange(6).reshape(2, 3).astype(dtype)
    found = through(value, tree)
    np.testing.assert_array_equal(found, value)
    assert found.dtype == value.dtype
    assert through(np.zeros((0, 2)), tree).shape == (0, 2)
    assert through(np.float32(0.1), tree) == np.float32(0.1)


def test_random_generators_go_on_where_they_were(tree):
    plain, numpy = random.Random(3), np.random.default_rng(3)
    plain.gauss(0, 1), numpy.random(5)
    found, other = through(plain, tree), through(numpy, tree)
    assert [found.gauss(0, 1) for _ in range(5)] == [plain.gauss(0, 1) for _ in range(5)]
    assert other.random(5).tolist() == numpy.random(5).tolist()


def test_nodes_come_back_as_themselves_and_branches_as_those_of_their_nodes(tree):
    found = through({"node": tree.nodes[1], "branch": tree.nodes[1].branch}, tree)
    assert found["node"] is tree.nodes[1]
    assert found["branch"] is tree.nodes[1].branch


@pytest.mark.parametrize(
    "value", [object(), len, Unknown(), [lambda: 1], {"a": Unknown()}, Counter("a"), b"bytes"]
)
def test_what_can_not_be_stored_is_named(value, tree):
    with pytest.raises(SearchError, match=r"^state\.x"):
        through(value, tree)


def test_a_branch_that_no_node_owns_can_not_be_stored(tree):
    with pytest.raises(SearchError, match="no node of the tree owns"):
        through(tree.root.branch.fork()[0], tree)


@pytest.mark.parametrize(
    "data",
    [
        {"$": "node", "v": 9}, {"$": "node", "v": -1}, {"$": "object", "v": ["os.system", {}]},
        {"$": "object", "v": ["builtins.eval", {"source": "1"}]}, {"$": "import", "v": "os"},
        {"a": 1}, {"$": "float", "v": "x"}, {"$": "enum", "v": ["nope", "A"]},
        {"$": "generator", "v": {"$": "dict", "v": [["bit_generator", "os"]]}},
        {"$": "random", "v": [1]}, {"$": "array", "v": ["<f8", [3], [1.0]]}, {"$": "dict", "v": 3},
    ],
    ids=str,
)  # fmt: skip
def test_data_that_nobody_wrote_are_refused(data, tree):
    with pytest.raises(SnapshotRejected) as caught:
        Decoder(TYPES, tree.nodes).decode([data], "state.x")
    assert caught.value.field.startswith("state.x[0]")


# -- an algorithm with everything in its state --------------------------------------------------


@dataclass(slots=True)
class HoarderState(State):
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    seen: dict[Any, Any] = field(default_factory=dict)
    boxes: list[Box] = field(default_factory=list)
    cache: dict[int, Any] = field(default_factory=dict, metadata={"checkpoint": False})


@dataclass(frozen=True, kw_only=True)
class Hoarder(Search[HoarderState]):
    """Expands a random node each time; keeps a cache that is rebuilt."""

    name = "hoarder"

    def init(self, root):
        return HoarderState(Tree(root))

    def plan(self, state):
        return BatchPlan(2, 1, 2, 1)

    def ask(self, state, n):
        params = SamplingParams(temperature=1.0, max_tokens=2, ignore_eos=True)
        nodes = [state.rng.choice(state.tree.nodes) for _ in range(n)]
        return [self.open_trial(state, "expand", node, params=params) for node in nodes]

    def tell(self, state, results):
        for trial, outcome in self.take_trials(state, results):
            node = state.tree.add(
                trial.node, outcome.token_ids, outcome.logprobs, branch=outcome.branch
            )
            node.score = outcome.value
            state.seen[outcome.token_ids] = node
            state.boxes.append(Box(node, len(state.cache)))
            state.cache[node.id] = sum(outcome.token_ids)

    def best(self, state):
        return max(state.tree.nodes, key=lambda n: (n.score or 0.0, -n.id))

    def restored(self, state):
        state.cache = {node.id: sum(node.token_ids) for node in state.tree.nodes[1:]}


def test_an_algorithm_of_ones_own_is_saved_without_a_line_about_saving(tmp_path):
    def begin():
        engine = FakeEngine(9)
        options = {"evaluator": lambda branches: [b.token_ids[-1] / 9 for b in branches]}
        budget = Budget(iterations=30)
        return start_search(engine, engine.prompt([1]), Hoarder(), budget, paused=True, **options)

    def ending(handle):
        handle.resume()
        handle.wait(60)
        state = handle._session.state
        return (
            [n.token_ids for n in state.tree.nodes], state.rng.random(), state.cache,
            {k: v.id for k, v in state.seen.items()}, [(b.inside.id, b.size) for b in state.boxes],
        )  # fmt: skip

    handle = begin()
    handle.step(5)
    assert handle.wait_paused(60)
    handle.save(tmp_path / "s")
    again = resume_search(
        FakeEngine(9),
        tmp_path / "s",
        algorithm=Hoarder,
        evaluator=handle._session.evaluator,
        paused=True,
    )
    assert again._session.state.boxes[0].inside is again.tree.nodes[1]
    assert ending(again) == ending(handle)
    assert dataclasses.is_dataclass(again._session.state)
