"""Engines with attention="flashinfer": the same tokens; and what they say where it can't run."""

from __future__ import annotations

import sys

import flashinfer_fake
import pytest

from dendrite_engine import SamplingParams

GREEDY = SamplingParams(max_tokens=6, ignore_eos=True)
NAMES = ("flashinfer", "flashinfer-flat", "flashinfer-cascade")


def grow(engine):
    """Tokens of a small tree: forks at the end, inside, and of forks."""
    root = engine.prompt("the quick brown fox jumps over the lazy dog, and the dog sleeps on")
    first = root.fork(3)
    engine.complete(first, GREEDY)
    second = [*first[0].fork(2), *first[1].fork(1, at=40)]
    engine.complete([*first, *second], GREEDY)
    return [branch.token_ids for branch in (*first, *second)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "mistral-window"])
def test_flashinfer_gives_the_tokens_of_the_tree_backend(make_engine, monkeypatch, kind, name):
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_fake)
    other = make_engine(kind, device="cuda-twin", attention=name)
    assert other.report()["attention"].startswith(f"{name}: FlashInfer 0.0-fake")
    assert grow(other) == grow(make_engine(kind, device="cuda-twin"))


@pytest.mark.parametrize("options", [{}, {"deterministic": True}])
def test_an_engine_without_flashinfer_runs_and_says_why(make_engine, monkeypatch, options):
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_fake if options else None)
    engine = make_engine("llama", device="cuda-twin", attention="flashinfer-cascade", **options)
    report = engine.report()["attention"]
    assert report.startswith("tree:")
    assert ("neighbours" if options else "can't be imported") in report
    assert engine.complete(engine.prompt("once"), GREEDY)[0].token_ids


def test_a_flashinfer_that_fails_in_a_step_costs_no_token(make_engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_fake)
    engine = make_engine("llama", device="cuda-twin", attention="flashinfer")
    wanted = grow(make_engine("llama", device="cuda-twin"))

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel image")

    for kind in ("BatchDecode", "BatchPrefill"):
        monkeypatch.setattr(
            getattr(flashinfer_fake, f"{kind}WithPagedKVCacheWrapper"), "plan", fail
        )
    assert grow(engine) == wanted
    assert "FlashInfer failed (RuntimeError: no kernel image)" in engine.report()["attention"]


def test_on_the_cpu_path_flashinfer_is_the_tree_backend_and_the_report_says_so(make_engine):
    engine = make_engine("llama", device="cpu", attention="flashinfer")
    assert "NVIDIA GPU" in engine.report()["attention"]
    assert engine.complete(engine.prompt("once"), GREEDY)[0].token_ids
