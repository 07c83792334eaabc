"""Choosing an implementation."""

from __future__ import annotations

import sys

import pytest
import torch

from dendrite_engine import kernels
from dendrite_engine.errors import InvalidArgument, UnknownName


def test_each_load_is_independent(native, isa):
    other = kernels.load("native", isa=isa, threads=1)
    assert (native.threads, other.threads) == (2, 1)
    assert native.isa == isa
    assert isa in native.reason


def test_threads_follow_torch():
    ops = kernels.load("auto")
    if ops.name == "native":
        assert ops.threads == torch.get_num_threads()


def test_the_thread_team_is_torchs_own():
    ops = kernels.load("auto")
    if ops.name == "native" and sys.platform == "linux":
        assert "torch" in ops.reason


def test_every_operation_reports_its_implementation():
    table = kernels.implementation()
    assert set(table) == set(kernels.OPERATIONS)
    assert all(value.startswith(("native (", "reference (")) for value in table.values())


def test_the_module_offers_the_operations_themselves():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, _ = kernels.sample(logits, kernels.SamplingBatch.neutral(1))
    assert tokens.tolist() == [1]
    with pytest.raises(AttributeError, match="no_such_operation"):
        _ = kernels.no_such_operation


def test_unknown_choices_are_refused():
    with pytest.raises(UnknownName, match="known: auto, native, reference"):
        kernels.load("fast")


def test_an_instruction_set_that_this_machine_lacks_is_refused(native):
    with pytest.raises(InvalidArgument, match=r"'avx1024' can't run here; this machine has: auto"):
        kernels.load("native", isa="avx1024")
    with pytest.raises(InvalidArgument, match="threads must be >= 1, got 0"):
        kernels.load("native", threads=0)


def test_a_missing_native_module_falls_back_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "dendrite_engine.kernels.native", None)
    ops = kernels.load("auto")
    assert ops.name == "reference"
    assert "the native module is missing" in ops.reason
    with pytest.raises(ImportError):
        kernels.load("native")
