"""Every page format on the device path: forks equal linear runs in tokens, logprobs and bytes."""

from __future__ import annotations

import pytest
import torch
from device_engines import ON_A_GPU, engine_maker, need_packed_kernels

from dendrite_engine import Engine, SamplingParams
from dendrite_engine.attention import device_tree
from dendrite_engine.attention.device_tree import DeviceTreeAttention
from dendrite_engine.cache.formats.choice import format_names
from dendrite_engine.cache.key_mean import save_key_mean
from dendrite_engine.errors import IntegrityError, InvalidArgument, ModelError, UnknownName
from dendrite_engine.kernels.device_packed import DevicePages
from wide_models import WIDE

FORMATS = [*(name for name in format_names() if name != "fp32"), "tq4/fp32"]
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)
OFFSETS = range(0, 34, 6)


@pytest.fixture(params=["twin", "emulated", ON_A_GPU])
def packed(request, make_engine, monkeypatch):
    """Makes engines whose kernels read packed pages."""
    make = engine_maker(request.param, make_engine, monkeypatch)
    need_packed_kernels(request.param)
    return make


@pytest.fixture
def twin(make_engine, monkeypatch):
    """Makes engines on the twins."""
    return engine_maker("twin", make_engine, monkeypatch)


def ids(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stored_bytes(engine, branch) -> list[torch.Tensor]:
    """Codes and scales of every computed token of a branch, all layers, in position order."""
    settle()
    _, pages, _ = engine.core.page_tables([branch._handle])
    (computed,) = engine.core.describe([branch._handle])["num_computed"]
    assert computed >= branch.num_tokens - 1
    size = engine.config.page_size
    at = torch.arange(int(computed))
    slots = torch.from_numpy(pages).long()[at // size] * size + at % size
    found = []
    for sides in engine._parts.pages.views():
        for side in sides:
            assert isinstance(side, DevicePages)
            found += [part.cpu() for part in side.read_slots(slots)]
    return found


def forked(engine, prefix, tail):
    trunk = engine.prompt(prefix)
    trunk.extend(tail)
    forks = [trunk.fork(at=len(prefix) + offset)[0] for offset in OFFSETS]
    noise = [engine.prompt(ids(40 + 16 * i)) for i in range(2)]
    job = engine.submit(noise, SamplingParams(temperature=1.5, max_tokens=7, ignore_eos=True))
    results = engine.complete(forks, GREEDY)
    job.result()
    return forks, results


def assert_linear(engine, forks, results, alone, prefix, tail):
    for offset, fork, result in zip(OFFSETS, forks, results, strict=True):
        branch = alone.prompt(prefix + tail[:offset])
        (linear,) = alone.complete([branch], GREEDY)
        assert (result.token_ids, result.logprobs) == (linear.token_ids, linear.logprobs)
        pairs = zip(stored_bytes(engine, fork), stored_bytes(alone, branch), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"stored bytes differ at offset {offset}"
        branch.prune()


@pytest.mark.parametrize("name", FORMATS)
def test_forks_equal_linear_generation_in_tokens_logprobs_and_bytes(packed, name):
    prefix, tail = ids(47), ids(max(OFFSETS))
    engine = packed(deterministic=True, kv_format=name)
    forks, results = forked(engine, prefix, tail)
    assert engine.stats().cow_copies > 0
    alone = packed(deterministic=True, kv_format=name, prefix_cache=False)
    assert_linear(engine, forks, results, alone, prefix, tail)


@pytest.mark.parametrize("name", ["tq4", "tq3", "mxfp8", "k8v4"])
def test_the_same_holds_in_a_pool_that_is_full(packed, name):
    prefix, tail = ids(47), ids(max(OFFSETS))
    roomy = packed(deterministic=True, kv_format=name, prefix_cache=False)
    forked(roomy, prefix, tail)
    needed = roomy.stats().pages_live
    tight = packed(deterministic=True, kv_format=name, prefix_cache=False, num_pages=needed)
    forks, results = forked(tight, prefix, tail)
    assert tight.stats().pages_free == 0
    alone = packed(deterministic=True, kv_format=name, prefix_cache=False)
    assert_linear(tight, forks, results, alone, prefix, tail)


@pytest.mark.parametrize("kind", ["mistral-window", "qwen3", "llama-bias"])
def test_every_family_forks_like_a_linear_run(packed, kind):
    prefix, tail = ids(30), ids(max(OFFSETS))
    options = {"deterministic": True, "kv_format": "tq4", "page_size": 32}
    engine = packed(kind, **options)
    forks, results = forked(engine, prefix, tail)
    alone = packed(kind, prefix_cache=False, **options)
    assert_linear(engine, forks, results, alone, prefix, tail)


def test_a_broken_copy_on_write_is_noticed(twin, monkeypatch):
    """The negative control of the comparisons above."""
    prefix, tail = ids(47), ids(max(OFFSETS))
    expected = [
        r.logprobs for r in forked(twin(deterministic=True, kv_format="tq4"), prefix, tail)[1]
    ]
    bad = twin(deterministic=True, kv_format="tq4")
    monkeypatch.setattr(bad._parts.pages, "copy_on_device", lambda *_: None)
    assert [r.logprobs for r in forked(bad, prefix, tail)[1]] != expected


# Kernels add in another order than the CPU. A number near a limit may get another code, and where
# an exponent changes 32 of them do.
NEAR = {"mxfp8": 3e-2}


@pytest.mark.parametrize("name", ["fp32/bf16", "fp8_e4m3", "mxfp8", "k8v4", "tq4", "tq2"])
def test_tokens_are_those_of_the_cpu_path(packed, make_engine, name):
    results = []
    for engine in (packed(kv_format=name), make_engine("llama" + WIDE, kv_format=name)):
        branches = engine.prompt(ids(70)).fork(3)
        engine.extend(branches, [[1], [2, 3], [4] * 20])
        results.append(engine.complete(branches, GREEDY))
    for ours, theirs in zip(*results, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=NEAR.get(name, 4e-3))


@pytest.mark.parametrize("name", ["fp8_e4m3", "k8v4", "tq4"])
def test_an_engine_runs_on_the_kernel_for_few_readers(packed, monkeypatch, name):
    """Chosen as the engine chooses it, but for the least work that is worth its while. What it
    computes is compared in test_attention_variants.py: this model in bf16 amplifies any rounding.
    """
    choose, variants = DeviceTreeAttention._choose, []

    def noted(self, plan, rows):
        variants.append(choose(self, plan, rows))
        return variants[-1]

    monkeypatch.setattr(DeviceTreeAttention, "_choose", noted)
    monkeypatch.setattr(device_tree, "_LEAST_FEW_READS", 0)
    engine = packed(kv_format=name, dtype="bfloat16")
    branches = [engine.prompt(ids(length)) for length in (70, 33, 16)]
    results = engine.complete(branches, GREEDY)
    assert variants.count(2) >= 4
    assert {result.finish_reason for result in results} == {"length"}
    assert all(-50 < logprob <= 0 for result in results for logprob in result.logprobs)


@pytest.mark.parametrize("name", ["fp8_e4m3", "k8v4", "tq3"])
def test_the_plain_backend_chooses_the_same_tokens(packed, name):
    """It decodes every vector of V and gathers each branch on its own."""
    results = []
    for attention in ("tree", "reference"):
        engine = packed(kv_format=name, attention=attention)
        branches = engine.prompt(ids(70)).fork(2)
        engine.extend(branches, [[1], [4] * 20])
        results.append(engine.complete(branches, GREEDY))
        assert engine.report()["attention"].startswith(attention)
    for tree, plain in zip(*results, strict=True):
        assert tree.token_ids == plain.token_ids
        assert tree.logprobs == pytest.approx(plain.logprobs, abs=2e-3)


def test_poisoned_pages_and_checksums_of_debug_mode_find_nothing_wrong(packed):
    engine = packed(kv_format="k8v4", debug=True)
    root = engine.prompt(ids(50))
    forks = root.fork(3)
    engine.complete(forks, GREEDY)
    forks[0].rollback(3)
    forks[1].prune()
    results = engine.complete([forks[0], *root.fork(at=17)], GREEDY)
    assert [r.finish_reason for r in results] == ["length", "length"]
    engine.check_integrity()


@pytest.mark.parametrize("name", ["bf16", "mxfp8", "tq4", "fp8_e5m2/fp16"])
def test_poison_reads_as_nan_keys_and_finite_values(twin, name):
    engine = twin(kv_format=name, debug=True)
    for keys, values in engine._parts.pages.views():
        assert keys.stored(torch.tensor([5])).isnan().all()
        assert values.stored(torch.tensor([5])).isfinite().all()
        assert (values.stored(torch.tensor([5])).abs().amax(-1) > 1e3).all()


def test_a_page_of_codes_that_changes_is_named(packed):
    engine = packed(debug=True, kv_format="tq4")
    branch = engine.prompt(ids(40))
    page = engine.core.segments(branch._handle)[0][4][1]
    settle()
    engine._parts.pages.store.data[page, 7] ^= 1
    settle()
    with pytest.raises(IntegrityError, match=f"page {page} changed"):
        engine.check_integrity()
    engine._parts.pages.store.data[page, 7] ^= 1
    settle()


def test_nan_in_one_branch_ends_that_branch_alone(packed):
    engine = packed(kv_format="tq4", debug=False)
    root = engine.prompt(ids(32))
    sick, well = root.fork(2)
    sick.extend(ids(20))
    engine.complete([sick], SamplingParams(max_tokens=1, ignore_eos=True))
    settle()
    engine._parts.pages.poison([engine.core.segments(sick._handle)[-1][4][0]])
    settle()
    results = engine.complete([sick, well], GREEDY)
    assert [r.finish_reason for r in results] == ["numeric_error", "length"]


def test_rolled_back_tokens_are_written_again(packed):
    engine = packed(kv_format="tq3", deterministic=True)
    branch = engine.prompt(ids(40))
    (first,) = engine.complete([branch], GREEDY)
    before = stored_bytes(engine, branch)
    branch.rollback(5)
    (again,) = engine.complete([branch], GREEDY)
    assert (again.token_ids, again.logprobs) == (first.token_ids, first.logprobs)
    assert all(map(torch.equal, stored_bytes(engine, branch), before))


def test_cached_prompts_are_read_in_their_format(packed):
    engine = packed(kv_format="k8v4", deterministic=True)
    prompt = ids(64)
    first = engine.prompt(prompt)
    (expected,) = engine.complete([first], GREEDY)
    first.prune()
    (result,) = engine.complete([engine.prompt(prompt)], GREEDY)
    assert engine.stats().prefix_hit_tokens >= 48
    assert (result.token_ids, result.logprobs) == (expected.token_ids, expected.logprobs)


RATIOS = [
    ("bf16", 1.0), ("fp8_e4m3", 1.94), ("fp8_e5m2", 2.0), ("mxfp8", 1.94), ("k8v4", 2.56),
    ("tq4", 3.76), ("tq3", 4.92), ("tq2", 7.11),
]  # fmt: skip


@pytest.mark.parametrize(("name", "ratio"), RATIOS)
def test_a_budget_in_bytes_gives_pages_by_the_format(twin, name, ratio):
    """Heads of 64: the ratios of the table, counted on the pool itself."""
    options = {"num_pages": None, "kv_budget": "2MiB"}
    plain = twin(kv_format="auto", **options).stats()
    engine = twin(kv_format=name, **options)
    stats, data = engine.stats(), engine._parts.pages.store.data
    assert stats.kv_format == name
    assert data.numel() == stats.bytes_total == stats.page_bytes * stats.pages_total <= 2 << 20
    assert plain.page_bytes / 2 / data.shape[1] == pytest.approx(ratio, abs=0.005)
    assert stats.pages_total == pytest.approx(2 * ratio * plain.pages_total, rel=0.05)
    assert f"{name}, 2 MiB" in engine.report()["pages"]
    assert f"({ratio:.2f} times less" in engine.report()["pages"]


def test_layers_may_have_formats_of_their_own(packed):
    engine = packed(kv_format="tq4", kv_layers={0: "bf16", -1: "fp8_e4m3/bf16"})
    names = [(k.codec.name, v.codec.name) for k, v in engine._parts.pages.views()]
    assert names == [("bf16", "bf16"), ("tq4", "tq4"), ("fp8_e4m3", "bf16")]
    assert engine.stats().kv_format == "tq4 (1 layers bf16, 1 layers fp8_e4m3/bf16)"
    (result,) = engine.complete([engine.prompt(ids(40))], GREEDY)
    assert result.finish_reason == "length"


def test_unquantised_pages_of_the_compute_dtype_are_not_packed(twin):
    for options in ({}, {"kv_format": "fp32"}, {"kv_format": "tq4", "kv_layers": dict.fromkeys(
        range(3), "fp32")}):  # fmt: skip
        assert twin(**options)._parts.pages.k.dtype == torch.float32
    packed = twin(kv_format="bf16")
    assert packed._parts.pages.views()[0][0].codec.name == "bf16"


def test_flash_infer_is_replaced_where_pages_are_packed(twin, monkeypatch):
    monkeypatch.setattr("dendrite_engine.attention.flashinfer._import", lambda: None)
    engine = twin(kv_format="tq4", attention="flashinfer")
    report = engine.report()["attention"]
    assert report.startswith("tree:")
    assert "FlashInfer reads unquantised pages of the compute dtype, not kv_format 'tq4'" in report


def test_calibrated_means_are_read_from_the_model_folder(twin, tiny_model, tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    for file in tiny_model("llama" + WIDE).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    options = {"device": "cuda-twin", "kv_format": "fp32/bf16", "num_pages": 20}
    with pytest.raises(InvalidArgument, match="dendrite-lab calibrate model"):
        Engine.from_pretrained(directory, kv_center=True, **options)
    save_key_mean(directory, torch.full((3, 2, 64), 0.5))
    with Engine.from_pretrained(directory, kv_center=True, **options) as engine:
        assert (engine._parts.pages.views()[2][0].mean == 0.5).all()
        (centred,) = engine.complete([engine.prompt(ids(40))], GREEDY)
    plain = twin(kv_format="fp32/bf16")
    (expected,) = plain.complete([plain.prompt(ids(40))], GREEDY)
    assert centred.token_ids == expected.token_ids
    assert centred.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    save_key_mean(directory, torch.full((3, 2, 16), 0.5))
    with pytest.raises(ModelError, match="calibrate it again"):
        Engine.from_pretrained(directory, kv_center=True, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kv_format": "int1"}, UnknownName, "unknown page format 'int1'; known: bf16, fp16"),
        ({"kv_format": "tq4/int1"}, UnknownName, "unknown page format 'tq4/int1'"),
        ({"kv_format": "tq4", "page_size": 8}, InvalidArgument, "multiple of 16 tokens"),
        ({"kv_layers": {3: "tq4"}}, InvalidArgument, "names layer 3, but the model has 3 layers"),
        ({"kv_first_page": "bf16"}, InvalidArgument, "is for the CPU.*kv_layers"),
    ],
)
def test_formats_that_can_not_work_are_refused_by_name(twin, options, error, match):
    with pytest.raises(error, match=match):
        twin(**options)


@pytest.mark.parametrize(
    ("name", "dim", "match"),
    [
        ("tq4", 96, "must be a power of two; this model's is 96"),
        ("fp8_e4m3", 80, "GPU kernels for head_dim 64, 96, 128, 256, and this model's is 80"),
    ],
)
def test_heads_without_a_kernel_are_refused_by_name(name, dim, match):
    from dendrite_engine.cache.formats import PageShape
    from dendrite_engine.cache.formats.choice import choose_device_format

    unit = PageShape(2, 1, 2, dim, 16)
    with pytest.raises(InvalidArgument, match=match):
        choose_device_format(name, unit, torch.device("cuda"), "bf16")
