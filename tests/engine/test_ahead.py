"""Passes that are launched before the tokens they compute are known: nobody can tell."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dendrite_engine import SamplingParams
from dendrite_engine.ahead import foresee, pages_needed
from dendrite_engine.cache import make_core
from dendrite_engine.device.sampler import DeviceTokens
from dendrite_engine.errors import DendriteError
from wide_models import WIDE

FREE = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True)
MIXED = [
    FREE,
    FREE.replace(max_tokens=3),
    FREE.replace(max_tokens=1),
    FREE.replace(logprobs=3, max_tokens=9),
    FREE.replace(repetition_penalty=1.3, frequency_penalty=0.2),
    FREE.replace(stop_token_ids=list(range(0, 259, 5))),
    FREE.replace(stop=["a", "zz", "M"], max_tokens=80),
    FREE.replace(ignore_eos=False, logit_bias={258: 8.0}, max_tokens=60),
    FREE.replace(seed=99, top_k=5, top_p=0.9, min_p=0.01),
]

# -- what is foreseen is what comes --------------------------------------------------------------


def reads(plan) -> dict[int, dict[int, int]]:
    """For each row, by its slot: the slot in which it finds each position."""
    found: dict[int, dict[int, int]] = {}
    for node in range(plan.num_nodes):
        pages = plan.page_indices[plan.node_page_indptr[node] : plan.node_page_indptr[node + 1]]
        begin, length = int(plan.node_pos[node]), int(plan.node_len[node])
        assert len(pages) == -(-length // 16)
        for row in range(plan.node_row_begin[node], plan.node_row_end[node]):
            here = found.setdefault(int(plan.slots[row]), {})
            for offset in range(length):
                assert begin + offset not in here
                if begin + offset <= plan.positions[row]:
                    here[begin + offset] = int(pages[offset // 16]) * 16 + offset % 16
    return found


def grown(seed: int, prefix_cache: bool = True):
    """A core, and branches of a random tree that have each computed a token of their own."""
    random = np.random.default_rng(seed)
    core = make_core(512, 16, prefix_cache=prefix_cache)
    handles = [core.create(random.integers(0, 50, random.integers(1, 40)).astype(np.int32))[0]]
    for _ in range(random.integers(1, 12)):
        source = handles[random.integers(len(handles))]
        at = int(random.integers(1, core.num_tokens(source) + 1))
        handles.append(core.fork_at(source, at))
        core.append(handles[-1], random.integers(0, 50, random.integers(1, 20)).astype(np.int32))
    while core.pending(np.array(handles)).max() > 0:
        core.plan(np.array(handles), np.full(len(handles), 64, np.int32)).commit()
    step(core, handles)
    return core, np.array(handles), random


def step(core, handles) -> object:
    """One token for each branch; returns the plan that computes it."""
    handles = np.array(handles)
    ids = np.arange(len(handles), dtype=np.int32)
    held = np.array([core.num_tokens(handle) for handle in handles.tolist()], np.int32)
    assert not core.append_batch(handles, ids, None, held).any()
    plan = core.plan(handles, np.ones(len(handles), np.int32))
    plan.commit()
    return plan


def foreseen_by(core, plan, goes_on):
    need = pages_needed(plan, plan.logits_row[goes_on], 16)
    return foresee(plan, plan.logits_row, goes_on, core.peek_free(need), 16)


@pytest.mark.parametrize("seed", range(40))
def test_the_foreseen_plan_is_the_one_that_comes(seed):
    core, handles, random = grown(seed)
    for _ in range(40):  # over every offset in a page
        before = step(core, handles)
        goes_on = random.random(len(handles)) < 0.9
        goes_on[random.integers(len(handles))] = True
        foreseen = foreseen_by(core, before, goes_on)
        assert foreseen is not None
        places = np.flatnonzero(goes_on)
        plan = step(core, handles[places])
        assert foreseen.agrees(plan, places)
        assert reads(foreseen) == reads(plan)
        assert (foreseen.token_ids[foreseen.rows[places]] == -1 - places).all()
        handles = handles[places]
        if random.random() < 0.2:  # the next step finds another order
            handles = random.permutation(handles)


def test_a_branch_that_forks_meanwhile_was_not_foreseen():
    core, handles, _ = grown(3)
    before = step(core, handles)
    everybody = np.ones(len(handles), bool)
    foreseen = foreseen_by(core, before, everybody)
    child = core.fork(int(handles[0]))
    assert not foreseen.agrees(step(core, handles), np.arange(len(handles)))
    core.prune(child)


def test_a_branch_that_rolls_back_and_grows_meanwhile_was_not_foreseen():
    core, handles, _ = grown(4)
    before = step(core, handles)
    foreseen = foreseen_by(core, before, np.ones(len(handles), bool))
    first = int(handles[0])
    core.rollback(first, 1)
    core.append(first, np.array([7, 8], np.int32))
    plan = core.plan(handles, np.full(len(handles), 9, np.int32))
    assert not foreseen.agrees(plan, np.arange(len(handles)))
    plan.cancel()


def test_nothing_is_foreseen_where_rows_are_shared_or_many():
    core, handles, _ = grown(5)
    twin = core.fork(int(handles[0]))
    both = np.array([handles[0], twin])
    everybody = np.ones(2, bool)
    shared = core.plan(both, np.ones(2, np.int32))  # both read one row back
    assert foresee(shared, shared.logits_row, everybody, np.zeros(9, np.int32), 16) is None
    shared.cancel()
    core.append(twin, np.arange(5, dtype=np.int32))
    many = core.plan(both, np.full(2, 5, np.int32))
    assert foresee(many, many.logits_row, everybody, np.zeros(9, np.int32), 16) is None
    many.cancel()


def test_free_pages_are_those_that_are_taken_next():
    core = make_core(8, 16)
    for expected in ([0, 1, 2], [3, 4, 5]):
        assert core.peek_free(3).tolist() == expected
        handle, _ = core.create(np.arange(40, dtype=np.int32) + expected[0])
        plan = core.plan(np.array([handle]), np.array([40], np.int32))
        assert sorted(set(plan.slots // 16)) == expected
        plan.commit()
    assert core.peek_free(9).tolist() == [6, 7]
    with pytest.raises(DendriteError, match="n must be at least 0"):
        core.peek_free(-1)


# -- the engine ----------------------------------------------------------------------------------


@pytest.fixture(name="make_ahead")
def _make_ahead(make_engine):
    """Engines that run ahead: without the checks of the pages that no pass may write unasked."""

    def make(*, ahead: bool = True, **options):
        engine = make_engine(device="cuda-twin", debug=False, **options)
        if not ahead:
            engine._loop._forward.launch_ahead = lambda *_: None
        return engine

    return make


def told(engine, branches, params) -> list[list[tuple]]:
    """What is told of each branch, in order."""
    number = {branch: i for i, branch in enumerate(branches)}
    heard: list[list[tuple]] = [[] for _ in branches]
    for e in engine.generate(branches, params):
        heard[number[e.branch]].append((e.token_id, e.text, e.logprob, e.top, e.finish_reason))
    return heard


def ahead_of(engine) -> tuple[int, int]:
    forward = engine._loop._forward
    return forward.num_ahead, forward.num_in_vain


def test_every_kind_of_lane_is_told_the_same(make_ahead):
    results = []
    for ahead in (True, False):
        engine = make_ahead(ahead=ahead, seed=4)
        branches = engine.prompt("the same in any order").fork(len(MIXED))
        results.append(told(engine, branches, MIXED))
        launched, in_vain = ahead_of(engine)
        assert launched > 30 * ahead or not ahead
        assert in_vain < launched / 4 or not ahead
        for branch, heard in zip(branches, results[-1], strict=True):
            assert branch.own_token_ids == [event[0] for event in heard if event[0] is not None]
    for mine, plain in zip(*results, strict=True):
        assert [event[0] for event in mine] == [event[0] for event in plain]
        assert [event[4] for event in mine] == [event[4] for event in plain]
        # Who else is in a batch may round a row differently.
        assert [event[2] for event in mine if event[2] is not None] == pytest.approx(
            [event[2] for event in plain if event[2] is not None], abs=1e-4
        )


@pytest.mark.cuda
def test_on_a_gpu_deterministic_branches_get_the_same_bits(make_engine):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    results = []
    for ahead in (True, False):
        engine = make_engine("llama" + WIDE, device="cuda", debug=False, deterministic=True, seed=4)
        if not ahead:
            engine._loop._forward.launch_ahead = lambda *_: None
        branches = engine.prompt("the same in any order").fork(len(MIXED))
        results.append(told(engine, branches, MIXED))
        assert ahead == (ahead_of(engine)[0] > 30)
    assert results[0] == results[1]


def test_a_lone_branch_is_ahead_in_every_step_but_the_first_and_last(make_ahead):
    engine = make_ahead()
    branch = engine.prompt("one branch, many pages, one after the other")
    engine.complete(branch, FREE.replace(max_tokens=50))
    assert ahead_of(engine) == (48, 0)


def test_branches_go_on_where_a_full_pool_leaves_nothing_to_foresee(make_ahead):
    outcomes = []
    for ahead in (True, False):
        engine = make_ahead(ahead=ahead, num_pages=14, seed=1)
        branches = engine.prompt("x" * 60).fork(4)
        done = engine.complete(branches, FREE.replace(max_tokens=60))
        outcomes.append([(one.token_ids, one.finish_reason) for one in done])
    assert outcomes[0] == outcomes[1]
    assert {"out_of_pages"} <= {reason for _, reason in outcomes[0]}


def fork(engine, branch):
    branch.fork(2)


def fork_inside(engine, branch):
    branch.fork(at=10)


def grow(engine, branch):
    engine.core.append(branch._handle, np.array([65, 66], np.int32))  # users have to wait for that


def shrink(engine, branch):
    engine.core.rollback(branch._handle, 3)


def prune(engine, branch):
    branch.prune()


def submit(engine, branch):
    engine.submit(branch.fork(2), FREE.replace(max_tokens=5))


@pytest.mark.parametrize("act", [fork, fork_inside, grow, shrink, prune, submit])
@pytest.mark.parametrize("at", [2, 3, 15, 16, 17])
def test_what_users_do_while_tokens_are_on_their_way_counts(make_ahead, monkeypatch, act, at):
    """With and without: the same texts, apart from when a change is noticed."""
    waited = SimpleNamespace(times=0, act=None)
    wait = DeviceTokens.wait

    def noted(self):
        waited.times += 1
        if waited.times == at and waited.act is not None:
            waited.act()
        return wait(self)

    monkeypatch.setattr(DeviceTokens, "wait", noted)
    texts = []
    for ahead in (True, False):
        waited.times, waited.act = 0, None
        engine = make_ahead(ahead=ahead, seed=7)
        branches = engine.prompt("users do what they like").fork(3)
        waited.times, waited.act = 0, lambda e=engine, b=branches[1]: act(e, b)
        job = engine.submit(branches, FREE)
        try:
            job.result()
        except DendriteError:
            assert act is prune
        engine.check_integrity()
        texts.append([b.token_ids for b in branches if b.is_alive])
    assert texts[0][0] == texts[1][0]
    assert texts[0] == texts[1]


def test_a_cancelled_job_ends_and_its_branches_can_be_used(make_ahead):
    engine = make_ahead()
    branches = engine.prompt("until told otherwise").fork(3)
    heard = threading.Semaphore(0)
    endless = FREE.replace(max_tokens=10_000)
    job = engine.submit(branches, endless, on_event=lambda _: heard.release())
    for _ in range(20):
        heard.acquire()
    job.cancel()
    job.result()
    held = [len(branch.token_ids) for branch in branches]
    again = engine.complete(branches, FREE.replace(max_tokens=4))
    assert [len(one.token_ids) for one in again] == [4] * 3
    assert [len(branch.token_ids) - 4 for branch in branches] == held
    engine.check_integrity()


def test_closing_an_engine_that_is_ahead_ends_its_jobs(make_ahead):
    engine = make_ahead()
    job = engine.submit(engine.prompt("never done"), FREE.replace(max_tokens=10_000))
    while not ahead_of(engine)[0]:
        pass
    engine.close()
    with pytest.raises(DendriteError, match="closed"):
        job.result()


def test_a_failing_pass_that_was_launched_ahead_fails_the_job_only(make_ahead):
    engine = make_ahead()
    forward = engine._loop._forward
    launch = forward.launch_ahead

    def broken(*arguments):
        forward.launch_ahead = launch
        raise RuntimeError("no luck")

    forward.launch_ahead = broken
    with pytest.raises(RuntimeError, match="no luck"):
        engine.complete(engine.prompt("first"), FREE)
    assert len(engine.complete(engine.prompt("second"), FREE)[0].token_ids) == 40
    engine.check_integrity()
