"""Plans as FlashInfer's page tables, and the backend around them, against dense attention."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import flashinfer_fake
import numpy as np
import pytest
import torch
from tree_cases import Segment, TreeCase, random_segments

from dendrite_engine.attention import (
    ATTENTION_BACKENDS,
    DEVICE_ATTENTION_BACKENDS,
    AttentionSetup,
)
from dendrite_engine.attention import flashinfer as backend
from dendrite_engine.attention.flashinfer_plan import cascade_depth, cascade_tables, flat_table
from dendrite_engine.cache import make_core
from dendrite_engine.errors import BackendUnavailable, IntegrityError
from dendrite_engine.kernels import load

SCALE = 0.25


@pytest.fixture
def fake(monkeypatch):
    """FlashInfer's stand-in as the importable module."""
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_fake)
    return flashinfer_fake


def with_items(case):
    """A case whose plan names its work items: a segment's rows."""
    starts = np.flatnonzero(np.diff(case.row_segment, prepend=-1))
    case.plan.item_indptr = np.array([*starts, len(case.row_segment)], np.int32)
    return case


def device_pages(case):
    """K and V as the device path lays them out, [pages, kv_heads, page_size, head_dim]."""
    return case.k_pages.transpose(2, 3).contiguous(), case.v_pages


def geometry(case, window=0, dtype=torch.float32):
    return backend.Geometry(
        case.heads, case.kv_heads, case.head_dim, case.page_size, dtype, SCALE, window
    )


def run_tables(case, tables, window=0):
    maker = backend.WrapperMaker(flashinfer_fake, torch.zeros(1, dtype=torch.uint8))
    run = maker.levels(len(tables)).plan(tables, geometry(case, window))
    return run(case.q, device_pages(case), None)


def check(case, tables, window=0):
    out = run_tables(case, tables, window)
    torch.testing.assert_close(out.double(), case.expected(SCALE, window), rtol=2e-5, atol=2e-5)


def tokens_read(tables, page_size=16):
    return sum(int(table.kv_lens(page_size).sum()) for table in tables)


@pytest.mark.parametrize("seed", range(12))
def test_a_flat_table_and_a_cascade_match_dense_attention_on_random_trees(seed):
    case = with_items(TreeCase(random_segments(seed, count=16), seed=seed))
    check(case, [flat_table(case.plan, 16)])
    check(case, cascade_tables(case.plan, 16))


@pytest.mark.parametrize("seed", range(4))
def test_every_choice_of_levels_matches_dense_attention(seed):
    case = with_items(TreeCase(random_segments(seed + 50, count=24, longest=40), seed=seed))
    depth = cascade_depth(case.plan)
    assert depth >= 2
    for count in range(depth + 1):
        for keep in itertools.islice(itertools.combinations(range(depth), count), 6):
            tables = cascade_tables(case.plan, 16, keep)
            assert len(tables) == count + 1
            check(case, tables)


@pytest.mark.parametrize("page_size", [1, 2, 16, 64])
def test_any_page_size_works(page_size):
    case = with_items(TreeCase(random_segments(6), page_size=page_size))
    check(case, [flat_table(case.plan, page_size)])
    check(case, cascade_tables(case.plan, page_size))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33])
def test_lengths_around_a_page_edge_work(length):
    segments = [Segment(None, 0, length, 0)]
    segments += [Segment(0, length, n, min(n, 3)) for n in (1, 2, 15, 16, 17)]
    case = with_items(TreeCase(segments))
    check(case, cascade_tables(case.plan, 16))


def test_a_window_of_a_flat_table_is_the_token_and_those_to_its_left():
    case = with_items(TreeCase(random_segments(9)))
    for window in (1, 2, 15, 16, 17, 40):
        check(case, [flat_table(case.plan, 16)], window)


def test_a_cascade_reads_every_shared_page_once():
    segments = [Segment(None, 0, 320, 0)]
    segments += [Segment(0, 320, 64, 0) for _ in range(4)]
    segments += [Segment(1 + i % 4, 384, 5, 1) for i in range(16)]
    case = with_items(TreeCase(segments))
    cascade = cascade_tables(case.plan, 16)
    assert [table.num_requests for table in cascade] == [1, 4, 16]
    assert tokens_read(cascade) == 320 + 4 * 64 + 16 * 5
    assert tokens_read([flat_table(case.plan, 16)]) == 16 * 389
    assert tokens_read(cascade_tables(case.plan, 16, [1])) == 4 * 384 + 16 * 5
    assert tokens_read(cascade_tables(case.plan, 16, [0])) == 320 + 16 * 69


def test_a_branch_without_shared_pages_is_one_causal_request():
    case = with_items(TreeCase([Segment(None, 0, 40, 7)]))
    (table,) = cascade_tables(case.plan, 16)
    assert table.qo_indptr.tolist() == [0, 7]
    assert table.last_page_len.tolist() == [8]


def test_plans_of_the_core_convert_and_cover_every_row():
    core = make_core(256, 16, implementation="reference")
    root, _ = core.create(np.arange(37, dtype=np.int32))
    branches = [core.fork(root) for _ in range(3)]
    for i, branch in enumerate(branches):
        core.append(branch, list(range(5 + i)), None)
    plan = core.plan([root, *branches], [64] * 4)
    plan.commit()
    for i, branch in enumerate([root, *branches]):
        core.append(branch, [i], None)
    plan = core.plan([root, *branches], [1] * 4)
    flat, cascade = flat_table(plan, 16), cascade_tables(plan, 16)
    assert flat.kv_lens(16).tolist() == (plan.positions + 1).tolist()
    total = np.zeros(4, np.int64)
    for table in cascade:
        total += np.repeat(table.kv_lens(16), np.diff(table.qo_indptr))
    assert total.tolist() == (plan.positions + 1).tolist()


def test_nodes_that_do_not_tile_are_refused():
    case = with_items(TreeCase([Segment(None, 0, 40, 0), Segment(0, 40, 8, 1)]))
    case.plan.node_len = case.plan.node_len - 1
    with pytest.raises(IntegrityError, match="tile"):
        flat_table(case.plan, 16)


# -- the choice -------------------------------------------------------------------------------


def shared_prefix(branches, prefix, own=16):
    segments = [Segment(None, 0, prefix, 0)]
    segments += [Segment(0, prefix, own, 1) for _ in range(branches)]
    return with_items(TreeCase(segments, heads=1, kv_heads=1, head_dim=8)).plan


@pytest.mark.parametrize(
    ("branches", "prefix", "levels"),
    [(1, 4096, 1), (6, 4096, 1), (64, 256, 1), (64, 32768, 2), (256, 4096, 2)],
)
def test_auto_takes_a_cascade_where_the_shared_prefix_is_worth_it(branches, prefix, levels):
    plan = shared_prefix(branches, prefix)
    llama = backend.Geometry(32, 8, 128, 16, torch.bfloat16, SCALE)
    assert len(backend.choose_tables(plan, llama)) == levels
    assert len(backend.choose_tables(plan, llama, "flat")) == 1
    windowed = dataclasses.replace(llama, window=64)
    assert len(backend.choose_tables(plan, windowed, "cascade")) == 1


# -- the backend ------------------------------------------------------------------------------


def setup_of(case, windows=(0,), **changes):
    setup = AttentionSetup(
        ops=load("reference"), device=torch.device("cpu"), dtype=torch.float32,
        num_heads=case.heads, num_kv_heads=case.kv_heads, head_dim=case.head_dim,
        windows=frozenset(windows), page_size=case.page_size, max_rows=64, graph_rows=0,
        deterministic=False, is_twin=True,
    )  # fmt: skip
    return dataclasses.replace(setup, **changes)


def batch_of(case, room=8):
    return SimpleNamespace(
        plan=case.plan, num_rows=len(case.q), host_work=np.zeros(room, np.int32),
        work=torch.zeros(room, dtype=torch.int32),
    )  # fmt: skip


def attend(attention, case, batch, window=0):
    rows = len(case.q)
    q = torch.cat([case.q, torch.full((3, *case.q.shape[1:]), float("nan"))])
    out = torch.full_like(q, float("nan"))
    attention.attend(q, *device_pages(case), batch, out, scale=SCALE, window=window)
    assert torch.isnan(out[rows:]).all()
    return out[:rows].double()


@pytest.mark.parametrize("name", ["flashinfer", "flashinfer-flat", "flashinfer-cascade"])
@pytest.mark.parametrize("new", [1, 4])
def test_every_mode_matches_dense_attention_and_leaves_padding_alone(fake, name, new):
    segments = [Segment(None, 0, 50, 0)]
    segments += [Segment(0, 50, n, min(n, new)) for n in (3, 20, 33)]
    case = with_items(TreeCase(segments))
    attention = DEVICE_ATTENTION_BACKENDS.get(name)(setup_of(case, windows=(0, 24)))
    assert attention.name == name
    for _ in range(2):
        batch = batch_of(case)
        assert attention.prepare(case.plan, batch) == 0
        for window in (0, 24):
            expected = case.expected(SCALE, window)
            torch.testing.assert_close(attend(attention, case, batch, window), expected)
    assert attention.reason == f"FlashInfer 0.0-fake, {attention.mode}"


class Dense:
    """Stands in for the device's tree backend; asks for two ints of work."""

    reason = "dense"

    def __init__(self, setup):
        pass

    def prepare(self, plan, batch):
        batch.host_work[:2] = (7, 9)
        return 2

    def attend(self, q, k_pages, v_pages, batch, out, *, scale, window):
        assert batch.work[:2].tolist() == [7, 9]
        out[: batch.num_rows] = 1.0


@pytest.fixture
def dense(monkeypatch):
    monkeypatch.setitem(DEVICE_ATTENTION_BACKENDS._entries, "tree", f"{__name__}:Dense")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Dense.__module__])


def fail(*args, **kwargs):
    raise RuntimeError("no kernel image")


def test_a_plan_that_fails_hands_the_step_to_the_tree_backend(fake, dense, monkeypatch):
    case = with_items(TreeCase(random_segments(2)))
    attention = backend.FlashInferAttention(setup_of(case))
    for kind in (
        fake.BatchDecodeWithPagedKVCacheWrapper, fake.BatchPrefillWithPagedKVCacheWrapper,
        fake.MultiLevelCascadeAttentionWrapper,
    ):  # fmt: skip
        monkeypatch.setattr(kind, "plan", fail)
    batch = batch_of(case)
    assert attention.prepare(case.plan, batch) == 2
    batch.work[:2] = torch.from_numpy(batch.host_work[:2])
    assert (attend(attention, case, batch) == 1.0).all()
    assert "no kernel image" in attention.reason
    assert "dense" in attention.reason


def test_a_kernel_that_fails_hands_over_in_the_middle_of_a_step(fake, dense, monkeypatch):
    case = with_items(TreeCase([Segment(None, 0, 20, 0), Segment(0, 20, 3, 1)]))
    attention = backend.FlashInferAttention(setup_of(case))
    batch = batch_of(case)
    attention.prepare(case.plan, batch)
    monkeypatch.setattr(fake.BatchDecodeWithPagedKVCacheWrapper, "run", fail)
    assert (attend(attention, case, batch) == 1.0).all()


def test_a_kernel_that_fails_without_room_for_a_work_list_fails_that_step_only(
    fake, dense, monkeypatch
):
    case = with_items(TreeCase([Segment(None, 0, 20, 0), Segment(0, 20, 3, 1)]))
    attention = backend.FlashInferAttention(setup_of(case))
    monkeypatch.setattr(fake.BatchDecodeWithPagedKVCacheWrapper, "run", fail)
    monkeypatch.setattr(Dense, "prepare", lambda self, plan, batch: 2)
    batch = batch_of(case, room=0)
    attention.prepare(case.plan, batch)
    with pytest.raises(RuntimeError, match="no kernel image"):
        attend(attention, case, batch)
    assert attention.prepare(case.plan, batch) == 2


def test_a_missing_flashinfer_is_named(monkeypatch):
    case = TreeCase([Segment(None, 0, 20, 1)])
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(BackendUnavailable, match="can't be imported"):
        backend.FlashInferAttention(setup_of(case))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"deterministic": True}, "neighbours"),
        ({"is_twin": False}, "NVIDIA GPU"),
        ({"is_twin": False, "device": torch.device("cuda", 0)}, "float32"),
        (
            {"is_twin": False, "device": torch.device("cuda", 0), "dtype": torch.float16},
            "head_dim",
        ),
    ],
)
def test_what_flashinfer_cannot_serve_is_refused_with_the_reason(fake, change, words):
    case = TreeCase([Segment(None, 0, 20, 1)])
    with pytest.raises(BackendUnavailable, match=words):
        backend.FlashInferAttention(setup_of(case, **change))


def test_on_a_cpu_the_name_gives_the_tree_backend_and_the_reason():
    for name in ("flashinfer", "flashinfer-flat", "flashinfer-cascade"):
        attention = ATTENTION_BACKENDS.get(name)(load("reference"))
        assert attention.name == "tree"
        assert "NVIDIA GPU" in attention.reason
