"""The random draws: a pure function of seed, path and position, and uniform."""

from __future__ import annotations

import numpy as np

from dendrite_engine.sampling import child_key, mix64, uniform


def test_draws_are_a_pure_function_of_seed_path_and_position():
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    values = {uniform(s, p, i) for s in range(10) for p in range(10) for i in range(10)}
    assert len(values) == 1000


def test_draws_are_uniform_over_seeds_paths_and_positions():
    for vary in range(3):
        draws = np.array(
            [uniform(*[i if axis == vary else 7 for axis in range(3)]) for i in range(20_000)]
        )
        assert draws.min() >= 0
        assert draws.max() < 1
        counts = np.histogram(draws, bins=20, range=(0, 1))[0]
        chi_square = ((counts - 1000) ** 2 / 1000).sum()
        assert chi_square < 50, "19 degrees of freedom: p < 1e-4 beyond 50"


def test_neighbouring_draws_are_not_correlated():
    draws = np.array([uniform(0, 9, i) for i in range(20_000)])
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_children_have_keys_of_their_own():
    keys = {child_key(0, position, n) for position in range(100) for n in range(100)}
    assert len(keys) == 10_000
    assert len({mix64(i) for i in range(10_000)}) == 10_000


def test_the_path_fixes_the_key_not_the_order_of_creation(make_engine):
    one, two = make_engine(), make_engine()
    a = one.prompt("keys")
    a1, a2 = a.fork(2)
    b = two.prompt("keys")
    two.prompt("something else").fork(3)
    b1, b2 = b.fork(2)
    assert [x.path_key for x in (a, a1, a2)] == [x.path_key for x in (b, b1, b2)]
    assert a1.path_key != a2.path_key
    assert a1.fork()[0].path_key == b1.fork()[0].path_key
