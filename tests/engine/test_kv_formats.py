"""Every page format in an engine: forks equal linear runs in tokens, logprobs and stored bytes."""

from __future__ import annotations

import pytest
import torch

from dendrite_engine import SamplingParams
from dendrite_engine.cache.formats.choice import format_names
from dendrite_engine.cache.key_mean import save_key_mean
from dendrite_engine.errors import IntegrityError, InvalidArgument, OutOfPages, UnknownName
from dendrite_engine.kernels.packed import PackedPages

FORMATS = [*(name for name in format_names() if name not in ("fp32", "mxfp8")), "tq4/fp32"]
GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)
OFFSETS = range(0, 34, 3)


def _ids(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def stored_bytes(engine, branch) -> list[torch.Tensor]:
    """Codes and scales of every computed token of a branch, all layers, in position order."""
    _, pages, _ = engine.core.page_tables([branch._handle])
    (computed,) = engine.core.describe([branch._handle])["num_computed"]
    assert computed >= branch.num_tokens - 1
    found = []
    for sides in engine._parts.pages.views():
        for side in sides:
            assert isinstance(side, PackedPages)
            if side.first is not None:
                place = side.first_index[int(pages[0])].long()[None]
                assert place >= 0
                begun = side.first.stored(place).transpose(1, 2).flatten(0, 1)
                found.append(begun[:computed])
            for part in side.read(torch.from_numpy(pages).long()):
                skipped = 0 if side.first is None else engine.config.page_size
                tokens = part.transpose(1, 2).flatten(0, 1)[skipped:computed]
                found.append(tokens)
    return found


def _forked(engine, prefix, tail):
    trunk = engine.prompt(prefix)
    trunk.extend(tail)
    forks = [trunk.fork(at=len(prefix) + offset)[0] for offset in OFFSETS]
    noise = [engine.prompt(_ids(40 + 16 * i)) for i in range(2)]
    job = engine.submit(noise, SamplingParams(temperature=1.5, max_tokens=7, ignore_eos=True))
    results = engine.complete(forks, GREEDY)
    job.result()
    return forks, results


def _assert_linear(engine, forks, results, alone, prefix, tail):
    for offset, fork, forked in zip(OFFSETS, forks, results, strict=True):
        branch = alone.prompt(prefix + tail[:offset])
        (linear,) = alone.complete([branch], GREEDY)
        assert (forked.token_ids, forked.logprobs) == (linear.token_ids, linear.logprobs)
        pairs = zip(stored_bytes(engine, fork), stored_bytes(alone, branch), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), f"stored bytes differ at offset {offset}"
        branch.prune()


@pytest.mark.parametrize("name", FORMATS)
def test_forks_equal_linear_generation_in_tokens_logprobs_and_bytes(make_engine, name):
    prefix, tail = _ids(47), _ids(max(OFFSETS))
    engine = make_engine(deterministic=True, kv_format=name)
    forks, results = _forked(engine, prefix, tail)
    alone = make_engine(deterministic=True, kv_format=name, prefix_cache=False)
    _assert_linear(engine, forks, results, alone, prefix, tail)


@pytest.mark.parametrize("first", ["bf16", "fp8_e4m3"])
@pytest.mark.parametrize("page_size", [16, 32])
def test_forks_inside_the_first_page_equal_linear_generation(make_engine, first, page_size):
    """Every offset forks inside page 0, so that copies of first pages are made."""
    options = {"kv_format": "tq4", "kv_first_page": first, "page_size": page_size}
    engine = make_engine(deterministic=True, **options)
    forks, results = _forked(engine, _ids(3), _ids(max(OFFSETS)))
    assert engine.stats().cow_copies > 3
    alone = make_engine(deterministic=True, prefix_cache=False, **options)
    _assert_linear(engine, forks, results, alone, _ids(3), _ids(max(OFFSETS)))


def test_places_of_first_pages_are_taken_back(make_engine):
    engine = make_engine(kv_format="tq4", kv_first_page="bf16", num_pages=64, prefix_cache=False)
    first = engine._parts.pages.store.first
    assert len(first.data) == 8
    for round_ in range(6):
        branches = [engine.prompt(_ids(20 + round_ + i)) for i in range(5)]
        engine.complete(branches, GREEDY)
        for branch in branches:
            branch.prune()
    branches = [engine.prompt(_ids(60 + i)) for i in range(8)]
    assert int((first.index >= 0).sum()) == 8
    with pytest.raises(OutOfPages, match="first pages"):
        engine.prompt(_ids(9))
    branches[0].prune()
    assert engine.complete([engine.prompt(_ids(9))], GREEDY)[0].finish_reason == "length"


def test_a_budget_holds_the_first_pages_too(make_engine):
    options = {"num_pages": None, "kv_budget": "1MiB", "kv_format": "tq4"}
    plain = make_engine(**options).stats()
    stats = make_engine(kv_first_page="bf16", **options).stats()
    assert stats.pages_total < plain.pages_total
    assert (1 << 20) - stats.page_bytes * 6 < stats.bytes_total <= 1 << 20


@pytest.mark.parametrize("name", ["tq4", "tq3", "fp8_e4m3", "k8v4"])
def test_the_same_holds_in_a_pool_that_is_full(make_engine, name):
    prefix, tail = _ids(47), _ids(max(OFFSETS))
    roomy = make_engine(deterministic=True, kv_format=name, prefix_cache=False)
    _forked(roomy, prefix, tail)
    needed = roomy.stats().pages_live
    tight = make_engine(deterministic=True, kv_format=name, prefix_cache=False, num_pages=needed)
    forks, results = _forked(tight, prefix, tail)
    assert tight.stats().pages_free == 0
    alone = make_engine(deterministic=True, kv_format=name, prefix_cache=False)
    _assert_linear(tight, forks, results, alone, prefix, tail)


@pytest.mark.parametrize("kind", ["mistral-window", "qwen3"])
def test_every_family_forks_like_a_linear_run(make_engine, kind):
    prefix, tail = _ids(30), _ids(max(OFFSETS))
    engine = make_engine(kind, deterministic=True, kv_format="tq4", page_size=32)
    forks, results = _forked(engine, prefix, tail)
    alone = make_engine(kind, deterministic=True, kv_format="tq4", page_size=32, prefix_cache=False)
    _assert_linear(engine, forks, results, alone, prefix, tail)


def test_a_broken_copy_on_write_is_noticed(make_engine, monkeypatch):
    """The negative control of the comparisons above."""
    prefix, tail = _ids(47), _ids(max(OFFSETS))
    good = make_engine(deterministic=True, kv_format="tq4")
    expected = [r.token_ids for r in _forked(good, prefix, tail)[1]]
    bad = make_engine(deterministic=True, kv_format="tq4")
    real = bad._parts.runner._ops

    class WithoutCopies:
        def __getattr__(self, name):
            return getattr(real, name)

        def copy_packed(self, *args):
            pass

    monkeypatch.setattr(bad._parts.runner, "_ops", WithoutCopies())
    assert [r.token_ids for r in _forked(bad, prefix, tail)[1]] != expected


@pytest.mark.parametrize("name", ["tq4", "k8v4", "fp8_e5m2", "bf16"])
def test_the_native_kernels_and_the_plain_oracle_choose_the_same_tokens(make_engine, name):
    """The oracle restores every vector and knows nothing of the rotated basis."""
    prompt = _ids(70)
    results = []
    for attention in ("tree", "reference"):
        engine = make_engine(kv_format=name, attention=attention)
        results.append(engine.complete([engine.prompt(prompt)], GREEDY)[0])
    assert results[0].token_ids == results[1].token_ids
    assert results[0].logprobs == pytest.approx(results[1].logprobs, abs=2e-3)


@pytest.mark.parametrize(
    ("name", "ratio"), [("bf16", 1.0), ("fp8_e5m2", 2.0), ("tq4", 3.2), ("tq2", 5.333)]
)
def test_a_budget_in_bytes_gives_pages_by_the_format(make_engine, name, ratio):
    """head_dim is 16 here, so scales weigh more than in real models."""
    plain = make_engine(num_pages=None, kv_budget="1MiB", kv_format="fp32").stats()
    packed = make_engine(num_pages=None, kv_budget="1MiB", kv_format=name)
    stats = packed.stats()
    assert stats.kv_format == name
    assert stats.page_bytes * stats.pages_total == stats.bytes_total <= 1 << 20
    assert stats.bytes_total > (1 << 20) - stats.page_bytes
    assert stats.page_bytes * 2 * ratio == pytest.approx(plain.page_bytes, rel=1e-3)
    assert stats.pages_total == pytest.approx(2 * ratio * plain.pages_total, rel=0.02)
    assert f"{name}, 1 MiB" in packed.report()["pages"]


def test_layers_may_have_formats_of_their_own(make_engine):
    engine = make_engine(kv_format="tq4", kv_layers={0: "bf16", -1: "fp8_e4m3/bf16"})
    names = [(k.codec.name, v.codec.name) for k, v in engine._parts.pages.views()]
    assert names == [("bf16", "bf16"), ("tq4", "tq4"), ("fp8_e4m3", "bf16")]
    assert engine.stats().kv_format == "tq4 (1 layers bf16, 1 layers fp8_e4m3/bf16)"
    (result,) = engine.complete([engine.prompt(_ids(40))], GREEDY)
    assert result.finish_reason == "length"


def test_nan_in_one_branch_ends_that_branch_alone(make_engine):
    engine = make_engine(kv_format="tq4", debug=False)
    root = engine.prompt(_ids(32))
    sick, well = root.fork(2)
    sick.extend(_ids(20))
    engine.complete([sick], SamplingParams(max_tokens=1, ignore_eos=True))
    page = engine.core.segments(sick._handle)[-1][4][0]
    engine._parts.pages.poison([page])
    results = engine.complete([sick, well], GREEDY)
    assert [r.finish_reason for r in results] == ["numeric_error", "length"]


def test_a_model_whose_keys_are_nan_ends_with_a_numeric_error(make_engine):
    engine = make_engine(kv_format="tq4")
    branch = engine.prompt(_ids(20))
    engine._parts.runner.model.layers[1].qkv = lambda x: torch.full((len(x), 10 * 16), torch.nan)
    branch.extend("x")
    (result,) = engine.complete([branch], GREEDY)
    assert result.finish_reason == "numeric_error"


def test_a_page_of_codes_that_changes_is_named(make_engine):
    engine = make_engine(debug=True, kv_format="tq4")
    branch = engine.prompt(_ids(40))
    page = engine.core.segments(branch._handle)[0][4][1]
    engine._parts.pages.store.data[page, 7] ^= 1
    with pytest.raises(IntegrityError, match=f"page {page} changed"):
        engine.check_integrity()
    engine._parts.pages.store.data[page, 7] ^= 1


def test_calibrated_means_are_read_from_the_model_folder(make_engine, tiny_model, tmp_path):
    from dendrite_engine import Engine

    directory = tmp_path / "model"
    directory.mkdir()
    for file in tiny_model("llama").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InvalidArgument, match="dendrite-lab calibrate model"):
        Engine.from_pretrained(directory, kv_format="tq4", kv_center=True, num_pages=20)
    save_key_mean(directory, torch.full((3, 2, 16), 0.5))
    with Engine.from_pretrained(
        directory, kv_format="fp32/bf16", kv_center=True, num_pages=20
    ) as engine:
        (centred,) = engine.complete([engine.prompt(_ids(40))], GREEDY)
    plain = make_engine(kv_format="fp32/bf16")
    (expected,) = plain.complete([plain.prompt(_ids(40))], GREEDY)
    assert centred.token_ids == expected.token_ids
    assert centred.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert centred.logprobs != expected.logprobs


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"kv_format": "int1"}, UnknownName, "unknown page format 'int1'; known: bf16, fp16"),
        ({"kv_format": "tq4/int1"}, UnknownName, "unknown page format 'tq4/int1'"),
        ({"kv_format": "tq4/tq4/tq4"}, UnknownName, "pairs such as"),
        ({"kv_format": "tq4", "page_size": 8}, InvalidArgument, "multiple of 16 tokens"),
        ({"kv_format": "mxfp8"}, InvalidArgument, "multiple of 32; this model's is 16"),
        ({"kv_layers": {3: "tq4"}}, InvalidArgument, "names layer 3, but the model has 3 layers"),
        ({"kv_layers": {0: "int1"}}, UnknownName, "int1"),
        ({"kv_format": "tq4", "kv_first_page": "tq3"}, InvalidArgument, "is coarser"),
        ({"kv_layers": ["tq4"]}, InvalidArgument, "kv_layers must map"),
    ],
)  # fmt: skip
def test_formats_that_can_not_work_are_refused_by_name(make_engine, options, error, match):
    with pytest.raises(error, match=match):
        make_engine(**options)


def test_a_head_dim_that_is_no_power_of_two_is_refused_for_rotated_formats(tmp_path):
    from dendrite_engine.cache.formats import PageShape
    from dendrite_engine.cache.formats.choice import choose_format

    unit = PageShape(2, 1, 2, 80, 16)
    for name in ("tq4", "k8v4", "bf16/tq2"):
        with pytest.raises(InvalidArgument, match="must be a power of two; this model's is 80"):
            choose_format(name, unit)
    assert choose_format("fp8_e4m3", unit).name == "fp8_e4m3"
