"""A forked branch gives the same tokens and log-probabilities as the same tokens run alone."""

from __future__ import annotations

import pytest
import torch

from dendrite_engine import SamplingParams

NEW_TOKENS = 6
OFFSETS = range(34)
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def _ids(count: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count,), generator=generator).tolist()


def _forked(engine, prefix: list[int], tail: list[int]):
    """Fork at every offset into `tail`, all generating at once, beside three unrelated branches."""
    trunk = engine.prompt(prefix)
    trunk.extend(tail)
    forks = [trunk.fork(at=len(prefix) + offset)[0] for offset in OFFSETS]
    noise = [engine.prompt(_ids(40 + 16 * i)) for i in range(3)]
    shared = engine.stats().pages_shared
    noisy = SamplingParams(temperature=1.5, max_tokens=9, ignore_eos=True)
    job = engine.submit(noise, noisy)
    results = engine.complete(forks, GREEDY)
    job.result()
    return results, shared


def _linear(engine, ids: list[int]):
    branch = engine.prompt(ids)
    (result,) = engine.complete([branch], GREEDY)
    branch.prune()
    return result


@pytest.mark.parametrize("prefix_length", [1, 511, 2048])
def test_forks_at_every_offset_equal_linear_generation(make_engine, prefix_length):
    engine = make_engine(deterministic=True, num_pages=900)
    prefix, tail = _ids(prefix_length), _ids(max(OFFSETS))
    results, shared = _forked(engine, prefix, tail)
    assert shared >= prefix_length // 16, "the test is about shared pages, and none were shared"
    alone = make_engine(deterministic=True, prefix_cache=False)
    for offset, forked in zip(OFFSETS, results, strict=True):
        linear = _linear(alone, prefix + tail[:offset])
        assert forked.token_ids == linear.token_ids, f"tokens differ at offset {offset}"
        assert forked.logprobs == linear.logprobs, f"log-probabilities differ at offset {offset}"
    engine.check_integrity()


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("page_size", [1, 4, 16, 32])
def test_forks_equal_linear_for_every_family_and_page_size(make_engine, kind, page_size):
    engine = make_engine(kind, deterministic=True, page_size=page_size, num_pages=4000 // page_size)
    prefix, tail = _ids(30), _ids(max(OFFSETS))
    results, _ = _forked(engine, prefix, tail)
    alone = make_engine(kind, deterministic=True, page_size=page_size, prefix_cache=False)
    for offset, forked in zip(OFFSETS, results, strict=True):
        linear = _linear(alone, prefix + tail[:offset])
        assert (forked.token_ids, forked.logprobs) == (linear.token_ids, linear.logprobs)


def test_the_same_holds_in_a_pool_that_is_full(make_engine):
    prefix, tail = _ids(47), _ids(max(OFFSETS))
    roomy = make_engine(deterministic=True, num_pages=600, prefix_cache=False)
    expected, _ = _forked(roomy, prefix, tail)
    needed = roomy.stats().pages_live
    tight = make_engine(deterministic=True, num_pages=needed, prefix_cache=False)
    results, _ = _forked(tight, prefix, tail)
    assert tight.stats().pages_free == 0
    assert [r.token_ids for r in results] == [r.token_ids for r in expected]
    assert [r.logprobs for r in results] == [r.logprobs for r in expected]


def test_without_the_deterministic_mode_tokens_are_still_the_same(make_engine):
    engine = make_engine(num_pages=900)
    prefix, tail = _ids(511), _ids(max(OFFSETS))
    results, _ = _forked(engine, prefix, tail)
    alone = make_engine(prefix_cache=False)
    for offset, forked in zip(OFFSETS, results, strict=True):
        assert forked.token_ids == _linear(alone, prefix + tail[:offset]).token_ids


@pytest.mark.parametrize("debug", [False, True])
def test_a_broken_copy_on_write_is_noticed(make_engine, monkeypatch, debug):
    """The negative control: when the copy does not happen, the comparison above must fail."""
    prefix, tail = _ids(47), _ids(max(OFFSETS))
    good = make_engine(deterministic=True)
    expected = [r.token_ids for r in _forked(good, prefix, tail)[0]]
    bad = make_engine(deterministic=True, debug=debug)
    if not debug:
        bad._parts.pages.k.zero_()
        bad._parts.pages.v.zero_()
    real = bad._parts.runner._ops

    class WithoutCopies:
        def __getattr__(self, name):
            return getattr(real, name)

        def copy_pages(self, *args):
            pass

    monkeypatch.setattr(bad._parts.runner, "_ops", WithoutCopies())
    broken = [r.token_ids for r in _forked(bad, prefix, tail)[0]]
    assert broken != expected


def test_a_thousand_repeats_beside_random_neighbours_give_one_output(make_engine):
    engine = make_engine(deterministic=True, num_pages=300)
    root = engine.prompt(_ids(37))
    params = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=2, ignore_eos=True, seed=5)
    reference = root.fork()[0]
    outputs = set()
    for i in range(100):
        copies = [engine.prompt(root.token_ids) for _ in range(10)]
        noise = [root.fork(at=1 + (7 * i + j) % 36)[0] for j in range(i % 5)]
        job = engine.submit(noise, SamplingParams(temperature=1.0, max_tokens=3, seed=i))
        results = engine.complete(copies, params)
        job.result()
        outputs |= {(tuple(r.token_ids), tuple(r.logprobs)) for r in results}
        for branch in (*copies, *noise):
            branch.prune()
    assert len(outputs) == 1
    reference.prune()
