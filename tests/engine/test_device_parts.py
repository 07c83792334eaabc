"""Pieces of the device path on their own: metadata, sizes, products, random weights, settings."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.attention.device_base import BatchLayout
from dendrite_engine.config import EngineConfig
from dendrite_engine.device.graphs import BUCKETS, Buckets
from dendrite_engine.device.metadata import Metadata, wanted_rows
from dendrite_engine.errors import InvalidArgument, UnknownName
from dendrite_engine.kernels.device_ops import DeviceKernels
from dendrite_engine.models.device_linear import DEVICE_DETERMINISTIC_TILE, DeviceLinearFactory
from dendrite_engine.models.families import read_model_config
from dendrite_engine.models.random_weights import RandomWeights
from dendrite_engine.types import LogitsEpoch
from wide_models import wide_config, write_tokenizer

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)


def _plan(rows: int, copies: int = 0, logits=None) -> SimpleNamespace:
    generator = np.random.default_rng(rows)
    return SimpleNamespace(
        token_ids=generator.integers(0, 99, rows).astype(np.int32),
        positions=generator.integers(0, 99, rows).astype(np.int32),
        slots=generator.integers(0, 99, rows).astype(np.int32),
        copies=generator.integers(0, 99, (copies, 3)).astype(np.int32),
        logits_row=np.array(range(rows) if logits is None else logits, np.int32),
        num_tokens=rows,
    )


# -- metadata ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 16, 63, 64, 65, 256, 2048])
def test_sections_of_a_batch_do_not_overlap(rows):
    layout = BatchLayout(rows)
    sections = [layout.row_array(index) for index in range(4)]
    spans = [(0, 16), *((s.start, s.stop) for s in (*sections, layout.copies))]
    spans.append((layout.work, layout.work + 1))
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end <= begin
    assert all(begin % 4 == 0 for begin, _ in spans), "int4 loads need 16 bytes"


@pytest.mark.parametrize(
    ("count", "rows", "copies"), [(1, 1, 1), (5, 8, 3), (8, 8, 8), (70, 80, 0)]
)
def test_a_batch_arrives_as_it_was_written_and_padded(count, rows, copies):
    metadata = Metadata(128, 100, CPU)
    for _ in range(3):  # both host buffers, and one of them again
        plan = _plan(count, copies, logits=[-1, count - 1])
        batch = metadata.fill(plan, rows)
        batch.host_work[:10] = range(10)
        metadata.send(batch, 10)
        assert batch.token_ids.tolist() == [*plan.token_ids, *[0] * (rows - count)]
        assert batch.positions.tolist() == [*plan.positions, *[0] * (rows - count)]
        assert batch.slots.tolist() == [*plan.slots, *[-1] * (rows - count)]
        assert batch.logits_rows.tolist() == [count - 1, *[0] * (rows - 1)]
        assert batch.copies[:copies].tolist() == plan.copies.tolist()
        assert batch.copy_count.tolist() == [copies]
        assert batch.work[:10].tolist() == list(range(10))


def test_the_host_may_write_the_next_batch_before_the_last_one_was_read():
    metadata = Metadata(8, 4, CPU)
    first = metadata.fill(_plan(4), 4)
    ids = first.host.copy()
    metadata.fill(_plan(3), 4)
    assert (first.host == ids).all()


def test_buffers_grow_with_the_work_list():
    metadata = Metadata(8, 4, CPU)
    room = len(metadata.fill(_plan(2), 2).host_work)
    metadata.grow(1000)
    batch = metadata.fill(_plan(2), 2)
    assert len(batch.host_work) >= 1000 > room
    batch.host_work[999] = 5
    metadata.send(batch, 1000)
    assert batch.work[999] == 5


def test_wanted_rows_are_distinct_and_increasing():
    assert wanted_rows(np.array([-1, 3, 3, 0, -1, 9], np.int32)).tolist() == [0, 3, 9]
    assert wanted_rows(np.array([-1], np.int32)).tolist() == []
    assert wanted_rows(np.array([4, 5], np.int32)).tolist() == [4, 5]


def test_a_step_whose_work_does_not_fit_grows_the_buffers(make_engine, monkeypatch):
    from dendrite_engine.attention.device_tree import DeviceTreeAttention

    monkeypatch.setattr(DeviceTreeAttention, "work_capacity", lambda self, num_pages: 8)
    engine = make_engine("llama-wide", device="cuda-twin")
    expected = make_engine("llama-wide", device="cpu")
    results = [e.complete([e.prompt("grow " * 30)], GREEDY)[0] for e in (engine, expected)]
    assert results[0].token_ids == results[1].token_ids


# -- sizes ------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_the_smallest_bucket_that_holds_it():
    buckets = Buckets(256)
    assert buckets.largest == 256
    for rows in range(1, 257):
        found = buckets.of(rows)
        assert found == min(size for size in BUCKETS if size >= rows)
    assert buckets.of(257) == 257
    assert [Buckets(400).of(rows) for rows in (257, 289, 384, 385)] == [288, 320, 384, 385]
    assert (Buckets(0).largest, Buckets(0).of(3)) == (0, 3)
    assert (Buckets(5).largest, Buckets(5).of(5)) == (4, 5)


# -- products ---------------------------------------------------------------------------------


def _linear(dtype: torch.dtype, *, deterministic: bool, bias: bool, outputs: int = 48):
    factory = DeviceLinearFactory(DeviceKernels("twin", "test"), dtype, deterministic=deterministic)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, 40, generator=generator).to(dtype)
    return factory, factory(weight, torch.randn(outputs).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_output", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 192])
def test_products_are_written_into_their_buffer(dtype, wide_output, bias, rows):
    for deterministic in (False, True):
        if deterministic and rows % DEVICE_DETERMINISTIC_TILE:
            continue
        _, linear = _linear(dtype, deterministic=deterministic, bias=bias)
        x = torch.randn(rows, 40).to(dtype)
        out = torch.full((rows, 48), float("nan"), dtype=torch.float32 if wide_output else dtype)
        linear(x, out)
        exact = x.double() @ linear.weight.double().t()
        exact += 0 if linear.bias is None else linear.bias.double()
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
        assert (out.double() - exact).abs().max() < tolerance


def test_larger_tiles_are_used_where_they_give_the_same_bits():
    factory, linear = _linear(torch.float32, deterministic=True, bias=False)
    factory.find_tiles(512, [])
    assert linear.tiles[-1] == DEVICE_DETERMINISTIC_TILE
    assert list(linear.tiles) == sorted(linear.tiles, reverse=True)
    assert "48x40: 64" in factory.reason
    x = torch.randn(960, 40)
    out, single = torch.empty(960, 48), torch.empty(64, 48)
    linear(x, out)
    for begin in range(0, 960, 64):
        linear(x[begin : begin + 64], single)
        assert torch.equal(out[begin : begin + 64], single)


def test_a_tile_that_gives_other_bits_is_not_used(monkeypatch):
    factory, linear = _linear(torch.float32, deterministic=True, bias=False)
    real = linear._multiply

    def careless(x, out):
        real(x, out)
        if x.shape[0] == 256:
            out[77, 3] += 1e-6 * out[77, 3].abs() + 1e-6

    monkeypatch.setattr(linear, "_multiply", careless)
    factory.find_tiles(512, [])
    assert 256 not in linear.tiles


class Recorder(DeviceKernels):
    """Twins that note which kernel was asked for."""

    def __init__(self, *, has_stream: bool) -> None:
        super().__init__("twin", "test")
        self.has_stream, self.asked = has_stream, []

    def stream_linear_serves(self, like):
        return self.has_stream

    def skinny_linear(self, *arguments):
        self.asked.append("skinny")
        super().skinny_linear(*arguments)

    def stream_linear(self, *arguments):
        self.asked.append("stream")
        super().stream_linear(*arguments)


@pytest.mark.parametrize(
    ("shape", "has_stream", "kernels"),
    [
        ((256, 128), True, {1: "skinny", 8: "skinny", 9: "stream", 64: "stream", 65: "torch"}),
        ((4096, 4096), True, {1: "stream", 64: "stream", 65: "torch"}),
        ((8192, 4096), True, {1: "stream", 128: "stream", 129: "torch"}),
        ((256, 128), False, {16: "skinny", 17: "torch"}),
        ((4096, 4096), False, {8: "skinny", 9: "torch"}),
        ((4096, 4160), False, {1: "torch"}),
        ((256, 72), True, {16: "skinny", 17: "torch"}),  # inputs in no whole panels
        ((252, 128), True, {16: "skinny", 17: "torch"}),
    ],
)
def test_the_matrix_and_the_rows_choose_the_kernel(shape, has_stream, kernels):
    ops = Recorder(has_stream=has_stream)
    linear = DeviceLinearFactory(ops, torch.bfloat16)(torch.ones(shape, dtype=torch.bfloat16))
    for rows, kernel in kernels.items():
        ops.asked.clear()
        out = torch.empty(rows, shape[0], dtype=torch.bfloat16)
        linear(torch.ones(rows, shape[1], dtype=torch.bfloat16), out)
        assert (ops.asked or ["torch"]) == [kernel], rows
        assert (out == shape[1]).all()
        assert linear.serves_silu_mul(rows) == (kernel != "torch")


def test_fp32_goes_to_torch():
    linear = DeviceLinearFactory(Recorder(has_stream=True), torch.float32)(torch.ones(256, 128))
    assert not linear.serves_silu_mul(1)


@pytest.mark.parametrize("has_stream", [False, True])
def test_fixed_tiles_are_those_of_stream_linear_where_it_serves(has_stream):
    ops = Recorder(has_stream=has_stream)
    factory = DeviceLinearFactory(ops, torch.bfloat16, deterministic=True)
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = factory(weight)
    for rows, tiles in {64: 1, 192: 2, 320: 3}.items():
        ops.asked.clear()
        x, out = torch.ones(rows, 128).bfloat16(), torch.empty(rows, 256)
        linear(x, out)
        assert ops.asked == ["stream"] * tiles * has_stream
        assert torch.allclose(out, (x.double() @ weight.double().T).float(), atol=1e-4)
    factory.find_tiles(512, [])
    assert linear.tiles[-1] == DEVICE_DETERMINISTIC_TILE
    assert (128 in linear.tiles) or not has_stream


def test_gates_that_add_up_otherwise_are_not_fused():
    factory = DeviceLinearFactory(Recorder(has_stream=True), torch.bfloat16, deterministic=True)
    assert factory(torch.ones(4096, 64).bfloat16()).serves_silu_mul(64)
    assert not factory(torch.ones(4088, 64).bfloat16()).serves_silu_mul(64)
    assert not factory(torch.ones(4096, 4160).bfloat16()).serves_silu_mul(64)


# -- random weights ---------------------------------------------------------------------------


@pytest.fixture(name="bare_model")
def _bare_model(tmp_path):
    """A directory with config and tokenizer, and no weights."""
    config = wide_config("llama-wide") | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path)
    return tmp_path


def test_random_weights_depend_on_name_and_seed_only(bare_model):
    config = read_model_config(bare_model)
    one, two = (RandomWeights(config, CPU, torch.bfloat16, seed=3) for _ in range(2))
    two.get("model.layers.0.mlp.up_proj.weight", 10, 10)
    name = "model.layers.1.self_attn.q_proj.weight"
    weight = one.get(name, 256, 128)
    assert torch.equal(weight, two.get(name, 256, 128))
    assert weight.dtype == torch.bfloat16
    assert 0.018 < weight.float().std() < 0.022
    assert not torch.equal(weight, RandomWeights(config, CPU, torch.bfloat16).get(name, 256, 128))
    assert torch.equal(one.get("model.norm.weight", 5).float(), torch.ones(5))
    assert "lm_head.weight" in one


@pytest.mark.parametrize("device", ["cpu", "cuda-twin"])
def test_an_engine_runs_on_random_weights_without_weight_files(bare_model, device):
    def run(seed: int) -> tuple[list[int], float]:
        options = {"device": device, "weights": "random", "num_pages": 64, "seed": seed}
        with Engine.from_pretrained(bare_model, **options) as engine:
            ((best,),) = engine.top_tokens([engine.prompt("random")], 1)
            (result,) = engine.complete([engine.prompt("random")], GREEDY)
        return result.token_ids, best.logprob

    first, logprob = run(0)
    assert run(0)[0] == first != run(1)[0]
    assert -6.0 < logprob < -2.0, "logits of order 1 over 259 tokens"


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "CUDA", "", 3])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(InvalidArgument, match="device must be auto, cpu, cuda"):
        EngineConfig(device=name)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"device": "cuda-twin", "kv_format": "int1"}, UnknownName, "known: bf16, fp16, fp32"),
        ({"device": "cuda-twin", "kv_first_page": "bf16"}, InvalidArgument, "kv_first_page='bf16'"),
        ({"device": "cuda-twin", "attention": "magic"}, UnknownName, "known: flashinfer"),
        ({"device": "cpu", "dtype": "bfloat16"}, InvalidArgument, "needs a CUDA device"),
        ({"device": "cuda-twin", "kv_budget": 10, "num_pages": None}, InvalidArgument, "no page"),
        ({"graph_rows": -1}, InvalidArgument, "graph_rows"),
        ({"weights": "pickled"}, InvalidArgument, "weights must be one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_engine, options, error, match):
    with pytest.raises(error, match=match):
        make_engine(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_auto_takes_the_cpu_and_says_why(make_engine):
    report = make_engine(device="auto").report()
    assert report["device"].startswith("cpu: torch")
    assert report["dtype"] == "float32"
    for name in ("cuda", "cuda:1"):
        with pytest.raises(InvalidArgument, match=f"device '{name}' can't be used: torch"):
            make_engine(device=name)


def test_the_report_of_the_device_path_says_what_runs(make_engine):
    report = make_engine("llama-wide", device="cuda-twin", deterministic=True).report()
    assert report["device"].startswith("cuda-twin")
    assert report["attention"].startswith("tree")
    assert report["graphs"] == "off: CPU tensors"
    assert "tiles" in report["linear"]
    assert {"core", "pages", "dtype", "kernels", "deterministic", "debug"} <= set(report)


def test_a_backend_that_can_not_run_is_replaced_and_reported(make_engine):
    engine = make_engine("llama-wide", device="cuda-twin", attention="flashinfer")
    report = engine.report()["attention"]
    assert report.startswith("tree")
    assert "flashinfer can't run" in report
    assert len(engine.complete([engine.prompt("fall back")], GREEDY)[0].token_ids) == 6


def test_without_the_native_core_work_lists_are_cut_in_python(make_engine, monkeypatch):
    native = make_engine("llama-wide", device="cuda-twin")
    monkeypatch.delattr("dendrite_engine._core.attention_work")
    engine = make_engine("llama-wide", device="cuda-twin", core="reference")
    assert "work lists are cut in Python" in engine.report()["attention"]
    results = [e.complete(e.prompt("cut " * 20).fork(3), GREEDY) for e in (native, engine)]
    assert [r.token_ids for r in results[0]] == [r.token_ids for r in results[1]]


# -- logits -----------------------------------------------------------------------------------


def test_logits_are_current_until_the_next_pass(make_engine):
    engine = make_engine("llama-wide", device="cuda-twin")
    runner = engine._parts.runner
    engine.prompt("first")
    epoch = runner.logits_epoch
    assert isinstance(epoch, LogitsEpoch)
    assert epoch.is_current
    engine.prompt("second")
    assert not epoch.is_current
    assert runner.logits_epoch.is_current


def test_more_logits_than_the_buffer_holds_are_kept(make_engine):
    engine = make_engine("llama-wide", device="cuda-twin", graph_rows=0)
    branches = engine.prompt("many").fork(70)
    engine.extend(branches, [[i] for i in range(70)])
    engine.complete(branches, GREEDY.replace(max_tokens=1))
    assert engine._parts.runner.logits_epoch is None
