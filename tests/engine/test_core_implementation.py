"""Which control plane runs, and why."""

from __future__ import annotations

import warnings

import pytest

from dendrite_engine.cache import core_implementation, make_core, native
from dendrite_engine.errors import InvalidArgument, UnknownName


@pytest.fixture
def no_native(monkeypatch):
    """As if the native module had not been built."""
    monkeypatch.setattr(native, "load", lambda: (None, "native module does not load: test"))


def test_the_native_core_is_chosen_and_says_where_it_is():
    name, reason = core_implementation(make_core(4))
    assert name == "native"
    assert "_core" in reason
    assert core_implementation() == (name, reason)


def test_the_reference_core_can_be_asked_for():
    core = make_core(4, implementation="reference")
    assert core_implementation(core) == ("reference", "implementation='reference' was asked for")


def test_an_unknown_implementation_lists_the_known_ones():
    with pytest.raises(UnknownName, match="auto, native, reference"):
        make_core(4, implementation="cuda")


@pytest.mark.usefixtures("no_native")
def test_the_twin_stands_in_with_one_warning_where_the_native_module_is_missing():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        cores = [make_core(4) for _ in range(3)]
    assert [type(core).__module__ for core in cores] == ["dendrite_engine.cache.reference"] * 3
    assert [w.category for w in caught] == [RuntimeWarning]
    assert core_implementation(cores[0]) == ("reference", "native module does not load: test")


@pytest.mark.usefixtures("no_native")
def test_insisting_on_a_missing_native_module_is_an_error():
    with pytest.raises(InvalidArgument, match="does not load"):
        make_core(4, implementation="native")
