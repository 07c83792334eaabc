"""What a step needs as arrays says the same as the plain objects it was made from."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from dendrite_engine import SamplingParams
from dendrite_engine.lanes import DecodingLane, LaneGroup, Roster
from dendrite_engine.sampling import SamplerState, SamplingRows, uniform, uniform_rows
from dendrite_engine.scheduler import Lane, Scheduler, Waiting


class PlainScheduler:
    """The rules of `Scheduler`, lane by lane."""

    def __init__(self, max_batch_tokens: int, prefill_chunk: int) -> None:
        self.max_batch_tokens, self.prefill_chunk = max_batch_tokens, prefill_chunk
        self.step = 0
        self.served: dict[int, int] = {}

    def next_batch(self, lanes: list[Lane], pending: dict[int, int]) -> dict[int, int]:
        self.step += 1
        order = sorted(
            lanes,
            key=lambda x: (-x.job.priority, self.served.get(x.handle, -1), -x.value, x.arrival),
        )
        left = self.max_batch_tokens
        decoding = any(pending[lane.handle] <= 1 for lane in lanes)
        prefill_left = min(left, self.prefill_chunk) if decoding else left
        quotas: dict[int, int] = {}
        for lane in order:
            want = max(pending[lane.handle], 1)
            quota = min(want, left, prefill_left) if want > 1 else min(want, left)
            if quota > 0:
                quotas[lane.handle] = quota
                self.served[lane.handle] = self.step
                left -= quota
                prefill_left -= quota if want > 1 else 0
        return quotas


class PendingOnly:
    """A core that knows how many tokens are pending, -1 for a stale handle."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}

    def pending(self, handles: np.ndarray) -> np.ndarray:
        return np.array([self.counts.get(h, -1) for h in handles.tolist()], np.int32)


def waiting(lanes: list[Lane]) -> Waiting:
    return Waiting(tuple(lanes), np.array([lane.handle for lane in lanes], np.int64))


def make_lane(arrival: int, priority: int = 0, value: float | None = None) -> Lane:
    job = SimpleNamespace(priority=priority, values=None if value is None else [value])
    return Lane(job, 0, None, 1000 + arrival, arrival)


@pytest.mark.parametrize("seed", range(60))
def test_the_scheduler_chooses_as_its_rules_say_whatever_path_it_takes(seed):
    rng = random.Random(seed)
    limits = rng.choice([(4, 2), (8, 3), (64, 16), (64, 64)])
    scheduler, plain, core = Scheduler(*limits), PlainScheduler(*limits), PendingOnly()

    def lane_of(arrival: int) -> Lane:
        return make_lane(arrival, rng.choice([0, 0, 3]), rng.choice([None, 0.5, -1.0]))

    lanes = [lane_of(i) for i in range(rng.randint(1, 6))]
    shown = waiting(lanes)
    arrival = len(lanes)
    for _ in range(40):
        if rng.random() < 0.3:
            lanes = [lane for lane in lanes if rng.random() < 0.8] or lanes[:1]
            lanes.append(lane_of(arrival := arrival + 1))
            shown = waiting(lanes)
        long = rng.random() < 0.4
        for lane in lanes:
            core.counts[lane.handle] = rng.choice([0, 1, 2, 5, 30]) if long else rng.randint(0, 1)
        selection = scheduler.next_batch(shown, core)
        assert dict(
            zip(selection.handles.tolist(), selection.quotas.tolist(), strict=True)
        ) == plain.next_batch(lanes, core.counts)
        chosen = range(len(lanes)) if selection.chosen is None else selection.chosen.tolist()
        assert [lanes[place].handle for place in chosen] == selection.handles.tolist()
        assert (selection.handles.dtype, selection.quotas.dtype) == (np.int64, np.int32)


def test_of_branches_that_waited_equally_long_those_of_more_value_run_first_and_none_starves():
    lanes = [make_lane(i, value=value) for i, value in enumerate([0.1, 0.9, 0.5, 0.7])]
    core, scheduler, shown = PendingOnly(), Scheduler(2, 2), waiting(lanes)
    core.counts = {lane.handle: 1 for lane in lanes}
    served = [scheduler.next_batch(shown, core).chosen.tolist() for _ in range(4)]
    assert served == [[1, 3], [2, 0], [1, 3], [2, 0]]


def test_stale_lanes_are_named_before_anything_is_chosen():
    lanes = [make_lane(i) for i in range(4)]
    core = PendingOnly()
    core.counts = {lanes[0].handle: 1, lanes[2].handle: 9}
    selection = Scheduler(64, 16).next_batch(waiting(lanes), core)
    assert selection.stale == (lanes[1], lanes[3])
    assert len(selection.handles) == 0


def test_draws_of_many_rows_are_those_of_each():
    rng = np.random.default_rng(0)
    seeds, keys = rng.integers(0, 2**64, (2, 500), dtype=np.uint64)
    positions = rng.integers(0, 2**31, 500).astype(np.int32)
    rows = zip(seeds.tolist(), keys.tolist(), positions.tolist(), strict=True)
    assert uniform_rows(seeds, keys, positions).tolist() == [uniform(*row) for row in rows]


SETTINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=4, top_p=0.9, min_p=0.1, seed=-3),
    SamplingParams(temperature=1.0, repetition_penalty=1.2, stop=["x"]),
    SamplingParams(temperature=1.0, presence_penalty=0.4, frequency_penalty=-0.5, logprobs=3),
    SamplingParams(logit_bias={9: 1.5, 2: -float("inf")}, stop_token_ids=[4, 5], ignore_eos=True),
    SamplingParams(temperature=2.0, logit_bias={1: 3.0}, repetition_penalty=0.9, max_tokens=7),
]


def states(order: list[int]) -> list[SamplerState]:
    made = []
    for i in order:
        state = SamplerState(SETTINGS[i], 7 if SETTINGS[i].seed is None else -3, 2**63 + i)
        state.load(np.array([3, 1, 3, i], np.int32), np.array([False, True, True, True]))
        state.accept(40 + i)
        made.append(state)
    return made


def arrays_of(rows: SamplingRows) -> list:
    batch = rows.batch(np.arange(len(rows), dtype=np.int32) + 5)
    return [None if array is None else array.tolist() for array in batch.arrays()]


ORDERS = [[0], [1, 0], [5, 4, 3, 2, 1, 0], [2, 2, 0, 5], [4, 0, 1]]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_that_were_taken_and_joined_are_as_if_made_at_once(order):
    whole = SamplingRows.of(states(list(range(len(SETTINGS)))))
    expected = arrays_of(SamplingRows.of(states(order)))
    assert arrays_of(whole.take(np.array(order))) == expected
    for cut in range(len(order) + 1):
        first, second = np.array(order[:cut], np.int64), np.array(order[cut:], np.int64)
        assert arrays_of(whole.take(first).joined(whole.take(second))) == expected


def test_a_row_says_what_its_state_says():
    made = states(list(range(len(SETTINGS))))
    batch = SamplingRows.of(made).batch(np.full(len(made), 11, np.int32))
    for i, state in enumerate(made):
        params = state.params
        assert batch.temperature[i] == np.float32(params.temperature)
        assert batch.top_k[i] == params.top_k
        assert batch.repetition[i] == np.float32(params.repetition_penalty)
        drawn = uniform(state.seed, state.path_key, 11) if params.temperature > 0 else 0.0
        assert batch.uniform[i] == drawn
        ids = batch.pen_ids[batch.pen_indptr[i] : batch.pen_indptr[i + 1]].tolist()
        counts = batch.pen_counts[batch.pen_indptr[i] : batch.pen_indptr[i + 1]].tolist()
        if params.has_penalties:
            assert ids == sorted(state.context_ids)
            assert counts == [state.counts.get(token, 0) for token in ids]
        else:
            assert ids == []
        bias = slice(batch.bias_indptr[i], batch.bias_indptr[i + 1])
        pairs = dict(
            zip(batch.bias_ids[bias].tolist(), batch.bias_values[bias].tolist(), strict=True)
        )
        assert pairs == (params.logit_bias or {})


def decoding_lanes(order: list[int]) -> list[DecodingLane]:
    return [
        DecodingLane(
            SimpleNamespace(priority=0, values=None), 0, SimpleNamespace(id=10 + i), 100 + i, i,
            sampler=state, decoder=None,
        )
        for i, state in zip(order, states(order), strict=True)
    ]  # fmt: skip


def test_a_group_knows_which_parts_of_a_step_concern_which_lane():
    group = LaneGroup.of(decoding_lanes(list(range(6))))
    assert group.ends_on_eos.tolist() == [True, True, True, True, False, True]
    assert group.with_stop_texts == [2]
    assert group.with_penalties == [2, 3, 5]
    assert (group.with_top, group.num_top) == ([3], 3)
    rows, ids = group.stop_ids
    assert (rows.tolist(), ids.tolist()) == ([4, 4], [4, 5])
    assert group.left.tolist() == [16] * 5 + [7]
    some = group.without({group.lanes[2], group.lanes[4]})
    assert some.ids.tolist() == [10, 11, 13, 15]
    assert (some.with_stop_texts, some.stop_ids, some.with_penalties) == ([], None, [2, 3])


def test_the_settings_of_a_group_do_not_depend_on_when_they_are_made():
    lanes = decoding_lanes(list(range(6)))
    for made_early in (False, True):
        first, second = LaneGroup.of(lanes[:4]), LaneGroup.of(lanes[4:])
        if made_early:
            assert len(first.settings) == 4
        some = first.without({lanes[1]}).take(np.array([2, 0])).joined(second)
        expected = [lanes[3], lanes[0], lanes[4], lanes[5]]
        assert some.lanes == tuple(expected)
        assert arrays_of(some.settings) == arrays_of(
            SamplingRows.of([lane.sampler for lane in expected])
        )
    assert len(first.without(set(lanes)).settings) == 0


def test_the_roster_sorts_its_group_once_and_keeps_its_list_while_nothing_changes():
    roster = Roster()
    lanes = decoding_lanes(list(range(4)))
    roster.add(LaneGroup.of(lanes), [probe := make_lane(9)])
    shown = roster.waiting
    assert roster.waiting is shown
    assert shown.lanes == (*lanes, probe)
    assert roster.order_by(np.array([0, 0, 1, 2])) is None, "some share a row"
    assert roster.waiting is shown
    assert roster.order_by(np.array([2, 0, 3, 1])).tolist() == [1, 3, 0, 2]
    assert roster.waiting.handles.tolist() == [101, 103, 100, 102, 1009]
    assert roster.order_by(np.arange(4)) is None
    roster.remove({lanes[0], probe})
    assert roster.waiting.lanes == (lanes[1], lanes[3], lanes[2])
    assert len(roster) == 3
