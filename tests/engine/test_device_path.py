"""The device path: on its twin with CPU tensors everywhere, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from device_engines import ON_A_GPU, engine_maker, why_no_gpu

from dendrite_engine import SamplingParams
from dendrite_engine.errors import DeviceError, IntegrityError
from wide_models import VOCAB, WIDE

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, max_tokens=8, ignore_eos=True)
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. "
KINDS = ("llama", "llama-bias", "mistral-window", "qwen3", "qwen3-window")


@pytest.fixture(params=["twin", ON_A_GPU], name="on_device")
def _on_device(request, make_engine, monkeypatch):
    return engine_maker(request.param, make_engine, monkeypatch)


@pytest.fixture(params=["twin", "emulated", ON_A_GPU], name="on_kernels")
def _on_kernels(request, make_engine, monkeypatch):
    """As on_device, and in the emulator, which is slow: for tests of what kernels compute."""
    return engine_maker(request.param, make_engine, monkeypatch)


@pytest.fixture(name="on_cpu")
def _on_cpu(make_engine):
    """Makes engines on the CPU path with the same models."""

    def make(kind: str = "llama", **options):
        return make_engine(kind + WIDE, device="cpu", **options)

    return make


def _settle() -> None:
    """Tests write to the device on a stream of their own: wait for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _tree(engine, params=GREEDY) -> list[list[int]]:
    """Prompts, forks at the end and inside, rollbacks, prunes; returns what the branches hold."""
    root = engine.prompt(TEXT * 3)
    forks = root.fork(5)
    for i, branch in enumerate(forks):
        branch.extend("x" * (7 * i + 1))
    inner = [root.fork(at=at)[0] for at in (1, 15, 16, 17, 100)]
    engine.complete([*forks, *inner], params)
    forks[0].rollback(9)
    forks[1].prune()
    deeper = [*forks[0].fork(2), *forks[2].fork(2), *inner[3].fork(at=12)]
    engine.complete([*deeper, *inner[:2]], params)
    engine.check_integrity()
    return [branch.token_ids for branch in engine.branches]


@pytest.mark.parametrize("kind", KINDS)
def test_trees_hold_the_tokens_of_the_cpu_path(on_kernels, on_cpu, kind):
    assert _tree(on_kernels(kind)) == _tree(on_cpu(kind))


def test_drawn_tokens_are_those_of_the_cpu_path(on_device, on_cpu):
    assert _tree(on_device(), DRAWN) == _tree(on_cpu(), DRAWN)


def test_log_probabilities_are_close_to_the_cpu_path(on_device, on_cpu):
    values = []
    for engine in (on_device(), on_cpu()):
        branches = engine.prompt(TEXT).fork(3)
        engine.extend(branches, [[1], [2, 3], [4] * 20])
        engine.complete(branches, GREEDY)
        values.append([b.logprobs[b.fork_position + 20 :] for b in branches])
    for ours, theirs in zip(*values, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("page_size", [1, 2, 4, 16, 64, 256])
def test_every_page_size_gives_the_same_tokens(on_device, on_cpu, page_size):
    options = {"page_size": page_size, "num_pages": max(8192 // page_size, 40)}
    assert _tree(on_device(**options)) == _tree(on_cpu())


def test_prompts_in_chunks_give_the_tokens_of_prompts_at_once(on_device):
    whole, chunked = on_device(), on_device(max_batch_tokens=48, prefill_chunk=20)
    for engine in (whole, chunked):
        engine.complete([engine.prompt(TEXT * 4)], GREEDY)
    assert chunked.stats().steps > whole.stats().steps + 4
    assert chunked.branches[0].token_ids == whole.branches[0].token_ids
    assert _tree(chunked) == _tree(whole)


def test_sixty_four_branches_cost_one_page_each_when_they_diverge(on_device):
    engine = on_device(num_pages=600)
    root = engine.prompt(list(range(200)) * 5 + [1] * 5)
    one = engine.stats().pages_live
    branches = root.fork(64)
    assert engine.stats().pages_live == one
    engine.complete(branches, DRAWN.replace(max_tokens=2))
    stats = engine.stats()
    assert (stats.pages_live, stats.cow_copies) == (one + 64, 64)


def test_a_pool_that_is_full_gives_the_tokens_of_one_with_room(on_device):
    def run(num_pages: int):
        engine = on_device(num_pages=num_pages, prefix_cache=False)
        root = engine.prompt(TEXT)
        branches = [root.fork(at=root.num_tokens - i)[0] for i in range(20)]
        results = engine.complete(branches, GREEDY)
        return engine, [result.token_ids for result in results]

    roomy, expected = run(400)
    tight, found = run(roomy.stats().pages_live)
    assert tight.stats().pages_free == 0
    assert found == expected


def test_a_branch_that_finds_no_page_ends_alone(on_device):
    engine = on_device(num_pages=8, prefix_cache=False)
    branches = engine.prompt(TEXT).fork(6)
    results = engine.complete(branches, GREEDY.replace(max_tokens=40))
    reasons = {result.finish_reason for result in results}
    assert "out_of_pages" in reasons
    engine.check_integrity()


def test_rolling_back_and_going_on_gives_the_same_tokens(on_device):
    engine = on_device()
    branch = engine.prompt(TEXT)
    (first,) = engine.complete([branch], GREEDY)
    branch.rollback(len(first.token_ids))
    (second,) = engine.complete([branch], GREEDY)
    assert second.token_ids == first.token_ids


def test_deterministic_branches_do_not_depend_on_their_neighbours(on_kernels):
    """Bitwise with the kernels; the attention of the twins is plain torch and promises less."""
    engine = on_kernels(deterministic=True, num_pages=900)
    prefix, offsets = [(7 * i) % 251 for i in range(230)], range(214, 230)
    trunk = engine.prompt(prefix)
    forks = [trunk.fork(at=at)[0] for at in offsets]
    noise = [engine.prompt([i + 1] * (40 + 16 * i)) for i in range(3)]
    job = engine.submit(noise, DRAWN)
    results = engine.complete(forks, GREEDY)
    job.result()
    alone = on_kernels(deterministic=True, prefix_cache=False)
    for at, forked in list(zip(offsets, results, strict=True))[::3]:
        branch = alone.prompt(prefix[:at])
        (linear,) = alone.complete([branch], GREEDY)
        branch.prune()
        assert forked.token_ids == linear.token_ids, f"tokens differ at {at}"
        tolerance = 1e-4 if engine.report()["kernels"].startswith("twin") else 0.0
        assert forked.logprobs == pytest.approx(linear.logprobs, abs=tolerance, rel=0.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_sixteen_bits_are_close_to_fp32(on_kernels, dtype, tolerance):
    rows = {}
    for name in ("float32", dtype):
        engine = on_kernels(dtype=name, weights="random")  # tame: logits of order 1
        branches = engine.prompt(TEXT * 2).fork(3)
        engine.extend(branches, [[65], [66, 67], list(range(30))])
        alternatives = engine.top_tokens(branches, VOCAB)
        rows[name] = [{a.token_id: a.logprob for a in row} for row in alternatives]
    for half, full in zip(rows[dtype], rows["float32"], strict=True):
        assert max(full.values()) - min(full.values()) > 50 * tolerance
        assert half == pytest.approx(full, abs=tolerance)
    assert engine.report()["dtype"] == dtype
    assert engine._parts.pages.k.dtype == getattr(torch, dtype)


def test_padded_rows_write_no_page(on_kernels):
    engine = on_kernels(debug=False)
    pools = (engine._parts.pages.k, engine._parts.pages.v)
    for pool in pools:
        pool.fill_(123.0)
    _settle()
    branches = engine.prompt("12345").fork(3)
    engine.extend(branches, [[1], [2], [3]])
    engine.complete(branches, GREEDY.replace(max_tokens=2))
    held = sorted(
        {p for b in engine.branches for s in engine.core.segments(b.handle) for p in s[4]}
    )
    free = [page for page in range(512) if page not in held]
    for pool in pools:
        assert (pool[:, free] == 123.0).all()
        assert not (pool[:, held] == 123.0).all()


def test_a_full_page_that_changes_is_named(on_device):
    engine = on_device(debug=True, page_size=4)
    branch = engine.prompt("0123456789")
    engine.check_integrity()
    page = engine.core.segments(branch.handle)[0][4][1]
    value = engine._parts.pages.k[0, page, 0, 0, 0].item()
    engine._parts.pages.k[0, page, 0, 0, 0] = value + 1
    _settle()
    with pytest.raises(IntegrityError, match=f"page {page} changed"):
        engine.check_integrity()
    engine._parts.pages.k[0, page, 0, 0, 0] = value
    _settle()


def test_reading_a_slot_that_nobody_wrote_ends_the_branch(on_device):
    engine = on_device(debug=True, page_size=4)
    branch = engine.prompt("0123456789")
    page = engine.core.segments(branch.handle)[0][4][2]
    engine._parts.pages.poison([page])
    branch.extend("x")
    (result,) = engine.complete([branch], GREEDY)
    assert (result.finish_reason, result.token_ids) == ("numeric_error", [])
    branch.prune()
    assert engine.complete([engine.prompt("fresh")], GREEDY)[0].finish_reason == "length"


def test_logits_that_are_not_finite_end_their_branch_only(on_kernels):
    """The token's key is NaN then and its value 0, so that siblings, which see neither, go on."""
    engine = on_kernels("mistral", debug=False)  # its output matrix is another one
    branches = engine.prompt(TEXT).fork(4)
    embedding = engine._parts.runner.state.model.embedding
    good = embedding[7].clone()
    embedding[7] = float("nan")
    _settle()
    engine.extend(branches, [[1], [7], [2], [3]])
    results = engine.complete(branches, GREEDY.replace(max_tokens=3))
    embedding[7] = good
    reasons = [result.finish_reason for result in results]
    assert reasons == ["length", "numeric_error", "length", "length"]


def test_a_device_failure_is_repeated_by_every_later_call(on_device, monkeypatch):
    engine = on_device(debug=False)
    branch = engine.prompt("before")
    branch.extend("x")
    runner = engine._parts.runner

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore lines")

    monkeypatch.setattr(runner.attention, "prepare", fail)
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.complete([branch], GREEDY)
    monkeypatch.undo()
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.prompt("after")
    assert runner.failure is not None


def test_an_error_that_is_not_the_devices_fails_its_step_only(on_device, monkeypatch):
    engine = on_device(debug=False)
    branch = engine.prompt("before")
    branch.extend("x")

    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(engine._parts.runner.attention, "prepare", fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        engine.complete([branch], GREEDY)
    monkeypatch.undo()
    assert engine.complete([branch], GREEDY)[0].finish_reason == "length"


def test_times_are_known_once_steps_are_done(on_device):
    engine = on_device()
    engine.complete([engine.prompt("time")], GREEDY)
    engine._loop.call(engine._parts.runner.synchronize)
    stats = engine.stats()
    assert stats.step_ms_last > 0
    assert stats.host_ms_last > 0


@pytest.mark.cuda
def test_graphs_give_the_tokens_of_eager_steps(on_device):
    if not (reason := why_no_gpu()):
        graphed, eager = on_device(), on_device(graph_rows=0)
        for _ in range(2):  # the second time every size has been captured
            assert _tree(graphed) == _tree(eager)
        if graphed.report()["device"].startswith("cuda:"):
            assert graphed.report()["graphs"].startswith("on")
            assert graphed.stats().graph_steps > 0
        assert eager.stats().graph_steps == 0
    else:
        pytest.skip(reason)


@pytest.mark.cuda
def test_a_pass_that_can_not_be_captured_runs_eagerly(on_device, monkeypatch):
    if reason := why_no_gpu():
        pytest.skip(reason)
    expected, engine = _tree(on_device()), on_device()
    attention = engine._parts.runner.attention
    attend = attention.attend

    def waits(*args, **options):
        attend(*args, **options)
        torch.cuda.current_stream().synchronize()  # not allowed while capturing

    monkeypatch.setattr(attention, "attend", waits)
    assert _tree(engine) == expected
    if engine.report()["device"].startswith("cuda:"):
        assert engine.report()["graphs"].startswith("off: capturing")
    assert engine.stats().graph_steps == 0
