"""The tile of tree attention: chosen by the tree, kept by a captured pass."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from graph_fakes import RecordedGraphs

from dendrite_engine import SamplingParams
from dendrite_engine.attention import DEVICE_ATTENTION_BACKENDS, AttentionSetup
from dendrite_engine.attention.device_tree import DeviceTreeAttention
from dendrite_engine.cache.formats import PageShape
from dendrite_engine.cache.formats.choice import layer_format
from dendrite_engine.cache.formats.device_packed import DevicePackedFormat
from dendrite_engine.device.metadata import Metadata
from dendrite_engine.kernels.device_ops import DeviceKernels, load_emulated
from dendrite_lab.bench.gpu_trees import parse_tree, plan_tree

SETUP = AttentionSetup(
    ops=DeviceKernels("twin", "test"), device=torch.device("cpu"), dtype=torch.bfloat16,
    num_heads=32, num_kv_heads=8, head_dim=128, windows=frozenset((0,)), page_size=16,
    max_rows=1024, graph_rows=256, deterministic=False, is_twin=True,
)  # fmt: skip

SHARED, PRIVATE = "1,64; 4096,16", "1,64; 16,512"


def chosen(tree: str, **changes) -> int:
    """The variant of a tree's decode step."""
    backend = DEVICE_ATTENTION_BACKENDS.get("tree")(dataclasses.replace(SETUP, **changes))
    plan = plan_tree(parse_tree(tree)).plan
    metadata = Metadata(SETUP.max_rows, 1 << 20, SETUP.device)
    batch = metadata.fill(plan, len(plan.positions))
    assert batch.variant == 0
    backend.prepare(plan, batch)
    return batch.variant


def test_long_prefixes_of_many_rows_keep_the_wide_tile_and_private_pages_do_not():
    assert chosen(SHARED) == 0
    assert chosen(PRIVATE) == 1


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [8, 16, 32, 64, 128])
def test_a_prompt_keeps_the_wide_tile(heads, head_dim):
    assert chosen("prompt 512 after 512", num_heads=heads, head_dim=head_dim) == 0


def test_small_heads_take_the_narrow_tile_unless_much_is_read_by_many_rows():
    assert chosen("1,64; 1024,16", head_dim=128) == 0
    assert chosen("1,64; 1024,256", head_dim=64) == 1
    assert chosen("1,64; 4096,16", head_dim=128) == 0
    assert chosen("1,64; 4096,16", head_dim=64) == 1
    assert chosen("1,64; 32768,16", head_dim=64) == 0
    assert chosen("1,64; 4096,16", head_dim=64, deterministic=True) == 0


@pytest.mark.parametrize("tree", [SHARED, PRIVATE])
def test_the_deterministic_mode_chooses_by_the_tree_too(tree):
    """A row's bits do not depend on the tile: tests/kernels/test_device_attention.py."""
    assert chosen(tree, deterministic=True) == chosen(tree)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"head_dim": 256},
        {"num_heads": 8 * 128},  # more queries of one row than a narrow tile has
        {"max_rows": 16},
    ],
)
def test_where_there_is_one_way_there_is_one_variant(changes):
    tree = "1,16; 16,512" if "max_rows" in changes else PRIVATE
    assert chosen(tree, **changes) == 0


@pytest.mark.parametrize("heads", [8, 32, 64, 128])
def test_packed_pages_of_few_queries_have_a_kernel_of_their_own(heads):
    for tree in ("64; 1024", "1; 65536", "1,64; 16,1024"):
        assert chosen(tree, num_heads=heads, cell_bytes=4160) == 2, tree
    for tree in (SHARED, "1; 4096"):
        assert chosen(tree, num_heads=heads, cell_bytes=4160) in (0, 1), tree


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float32},
        {"head_dim": 256},
        {"head_dim": 96},
        {"num_heads": 8 * 17},
        {"cell_bytes": 0},
        {"deterministic": True},
    ],
)
def test_what_that_kernel_does_not_take_goes_to_the_others(changes):
    assert chosen("64; 1024", **{"cell_bytes": 4160, **changes}) in (0, 1)


def attended(tree: str, variant: int, monkeypatch) -> torch.Tensor:
    """Attention over random pages, by a variant of the twin."""
    monkeypatch.setattr(DeviceTreeAttention, "_choose", lambda *_: variant)
    backend = DEVICE_ATTENTION_BACKENDS.get("tree")(dataclasses.replace(SETUP, head_dim=64))
    planned = plan_tree(parse_tree(tree))
    rows = len(planned.plan.positions)
    metadata = Metadata(SETUP.max_rows, 1 << 20, SETUP.device)
    batch = metadata.fill(planned.plan, rows)
    metadata.send(batch, backend.prepare(planned.plan, batch))
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((rows, 32, 64), *[(planned.num_pages, 8, 16, 64)] * 2)
    )
    out = torch.zeros_like(q)
    backend.attend(q, k, v, batch, out, scale=0.125, window=0)
    return out


def test_both_variants_attend_alike(monkeypatch):
    for tree in ("1,2,40; 100,30,20", "1,64; 600,8"):
        wide, narrow = (attended(tree, variant, monkeypatch) for variant in (0, 1))
        assert wide.abs().max() > 0.05
        torch.testing.assert_close(wide, narrow, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["fp8_e4m3", "mxfp8", "k8v4", "tq4"])
@pytest.mark.parametrize("heads", [8, 32, 128])  # tiles of 8 and of 16 queries
def test_the_kernels_of_packed_pages_attend_alike(name, heads, monkeypatch):
    loaded = load_emulated()
    if not loaded.loaded:
        pytest.skip(loaded.reason)
    planned = plan_tree(parse_tree("1,2,9; 100,300,70"))
    page_format = DevicePackedFormat(name, [layer_format(name)], SETUP.device)
    shape = PageShape(1, planned.num_pages, 8, 64, 16)
    sides = page_format.allocate(shape).layers[0]
    generator = torch.Generator().manual_seed(1)
    slots = torch.arange(planned.num_pages * 16)
    for side in sides:
        vectors = torch.randn(len(slots), 8, 64, generator=generator)
        side.write_slots(slots, *side.encode(vectors))
    rows = len(planned.plan.positions)
    q = torch.randn(rows, heads, 64, generator=generator).bfloat16()
    outs = []
    for variant in (0, 1, 2):
        monkeypatch.setattr(DeviceTreeAttention, "_choose", lambda *_, v=variant: v)
        setup = dataclasses.replace(
            SETUP, ops=DeviceKernels("emulated", "test"), head_dim=64, num_heads=heads,
            cell_bytes=page_format.cell_bytes(shape), is_twin=False,
        )  # fmt: skip
        backend = DEVICE_ATTENTION_BACKENDS.get("tree")(setup)
        metadata = Metadata(SETUP.max_rows, 1 << 20, SETUP.device)
        batch = metadata.fill(planned.plan, rows)
        metadata.send(batch, backend.prepare(planned.plan, batch))
        outs.append(torch.full_like(q, float("nan")))
        backend.attend(q, *sides, batch, outs[-1], scale=0.125, window=0)
    assert outs[0].abs().max() > 0.05
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-2, rtol=2e-2)
    assert not torch.equal(outs[2], outs[0]), "another kernel, other sums"


def test_a_size_is_captured_once_for_each_variant(make_engine, monkeypatch):
    eager, engine = (
        make_engine("llama-wide", device="cuda-twin", dtype="bfloat16") for _ in range(2)
    )
    graphs = engine._parts.runner.state.graphs = RecordedGraphs()

    def decode(engine, turn):
        monkeypatch.setattr(DeviceTreeAttention, "_choose", lambda *_: next(turn))
        branches = engine.prompt("one tile or the other ").fork(40)
        engine.extend(branches, [[n] for n in range(40)])
        results = engine.complete(branches, SamplingParams(max_tokens=8, ignore_eos=True))
        engine.prune_all()
        return [result.token_ids for result in results]

    expected = decode(eager, itertools.repeat(0))
    assert decode(engine, itertools.cycle([0, 1])) == expected
    keys = [key for key in graphs._graphs if key[0] >= 40]
    assert {key[2] for key in keys} == {0, 1}
    assert len({key[:2] for key in keys}) < len(keys)
    assert engine.stats().graph_steps > 0
