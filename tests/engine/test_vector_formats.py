"""Vector formats alone: codebooks, errors and sizes against kv_formats' table of anchors."""

from __future__ import annotations

import math

import pytest
import torch

from dendrite_engine.cache.formats import VECTOR_FORMATS, PageShape
from dendrite_engine.cache.formats.choice import choose_format, layer_format
from dendrite_engine.cache.formats.turboquant import BOUNDARIES, CENTROIDS, TurboQuant
from dendrite_engine.cache.pages import KVPages
from dendrite_engine.errors import InvalidArgument, NumericError
from dendrite_engine.kernels.hadamard import random_signs, transform, tree_sum

VECTORS = 8192
CODEBOOK_ERROR = {2: 0.117482, 3: 0.034548, 4: 0.009501}


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def normal_pdf(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_lloyd_max_of_the_normal_distribution(bits):
    """Each level is the mean of its cell, each boundary the middle of two levels."""
    half, inner = CENTROIDS[bits], BOUNDARIES[bits]
    edges = [0.0, *inner, math.inf]
    error = 0.0
    for level, low, high in zip(half, edges[:-1], edges[1:], strict=True):
        mass = (1.0 if math.isinf(high) else normal_cdf(high)) - normal_cdf(low)
        mean = (normal_pdf(low) - normal_pdf(high)) / mass
        assert level == pytest.approx(mean, abs=2e-6)
        error += 2 * mass * level * level
    for boundary, low, high in zip(inner, half[:-1], half[1:], strict=True):
        assert boundary == pytest.approx((low + high) / 2, abs=2e-6)
    assert 1 - error == pytest.approx(CODEBOOK_ERROR[bits], abs=2e-6)


def data(kind: str, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(VECTORS, dim, generator=generator)
    if kind == "outliers":
        x[:, : dim // 32] *= 10
    elif kind == "offset":
        x[:, : dim // 32] += 15
    return x


def relative_error(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(((x - y).square().sum(-1) / x.square().sum(-1)).mean())


def error_of(name: str, x: torch.Tensor, draws: int = 1) -> float:
    """Mean relative squared error over rotations."""
    form, total = layer_format(name).key, 0.0
    for draw in range(draws):
        signs = random_signs(draw, 0, 0, 1, x.shape[-1])[0]
        total += relative_error(x, form.decode(*form.encode(x, signs), signs))
    return total / draws


@pytest.mark.parametrize(
    ("name", "dim", "expected"),
    [
        ("fp8_e4m3", 64, 6.3e-4), ("mxfp8", 64, 7.0e-4), ("mxfp8", 128, 7.0e-4),
        ("fp8_e5m2", 64, 2.8e-3), ("fp8_e5m2", 128, 2.8e-3),
        ("tq4", 64, 8.9e-3), ("tq3", 64, 3.25e-2), ("tq2", 64, 1.13e-1),
        ("tq4", 128, 9.2e-3), ("tq3", 128, 3.36e-2), ("tq2", 128, 1.155e-1),
    ],
)  # fmt: skip
def test_errors_on_normal_data_are_the_measured_ones(name, dim, expected):
    assert error_of(name, data("normal", dim)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("name", "kind", "dim", "expected"),
    [
        ("fp8_e4m3", "outliers", 64, 3.3e-4), ("fp8_e4m3", "offset", 64, 2.8e-4),
        ("mxfp8", "outliers", 64, 7.0e-4), ("mxfp8", "outliers", 128, 7.0e-4),
        ("fp8_e5m2", "outliers", 64, 2.8e-3), ("fp8_e5m2", "offset", 64, 1.8e-3),
        ("mxfp8", "offset", 64, 5.0e-4), ("mxfp8", "offset", 128, 5.0e-4),
    ],
)  # fmt: skip
def test_errors_of_floats_on_outliers_and_offsets_are_the_measured_ones(name, kind, dim, expected):
    assert error_of(name, data(kind, dim)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", ["normal", "outliers", "offset"])
@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2"])
def test_the_rotation_makes_the_error_independent_of_the_data(name, kind, dim):
    """Without it outliers cost 20 times as much at 4 bits."""
    normal, other = error_of(name, data("normal", dim)), error_of(name, data(kind, dim), draws=8)
    assert 0.6 * normal < other < 1.02 * normal


@pytest.mark.parametrize("name", VECTOR_FORMATS.names())
@pytest.mark.parametrize("kind", ["normal", "outliers", "offset"])
def test_no_format_exceeds_the_bound_it_states(name, kind):
    assert error_of(name, data(kind, 64)) <= layer_format(name).key.error_bound


ROTATED = {
    ("outliers", "tq4"): (0.0085, 0.0086), ("offset", "tq4"): (0.0083, None),
    ("outliers", "tq3"): (0.0305, 0.0307), ("offset", "tq3"): (0.0303, None),
    ("outliers", "tq2"): (0.0991, 0.1008), ("offset", "tq2"): (0.0826, None),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), list(ROTATED))
def test_codes_with_the_norm_as_scale_have_the_measured_errors(kind, name):
    """The anchors are of the plain norm; the stored scale has to do no worse. With 4 offsets at
    head_dim 128 the error depends on the signs, so there is no one number.
    """
    form = layer_format(name).key
    assert isinstance(form, TurboQuant)
    for dim, expected in zip((64, 128), ROTATED[kind, name], strict=True):
        x, by_norm = data(kind, dim), []
        for draw in range(4):
            signs = random_signs(draw, 0, 0, 1, dim)[0]
            levels = form.centroids[form.encode(x, signs)[0].long()]
            scaled = levels * (x.norm(dim=-1, keepdim=True) / dim)
            by_norm.append(relative_error(x, transform(scaled) * signs))
        mean = sum(by_norm) / len(by_norm)
        assert expected is None or mean == pytest.approx(expected, rel=0.03)
        assert error_of(name, x, draws=4) < mean


def test_the_least_squares_scale_beats_the_norm():
    x = data("normal", 64)
    form = layer_format("tq2").key
    assert isinstance(form, TurboQuant)
    codes, scales = form.encode(x)
    by_norm = form.centroids[codes.long()] * (x.norm(dim=-1, keepdim=True) / 8)
    restored = transform(by_norm) / 8
    assert relative_error(x, form.decode(codes, scales)) < relative_error(x, restored)


@pytest.mark.parametrize("dim", [1, 2, 16, 128])
def test_the_transform_is_the_walsh_hadamard_matrix(dim):
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    x = torch.randn(3, dim, generator=torch.Generator().manual_seed(dim))
    torch.testing.assert_close(transform(x), x @ matrix, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(transform(transform(x)) / dim, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tree_sum(x), x.sum(-1), rtol=1e-5, atol=1e-5)


def test_signs_differ_between_heads_layers_and_sides_and_never_change():
    signs = [random_signs(7, layer, side, 3, 64) for layer in range(3) for side in range(2)]
    rows = torch.cat(signs)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)
    assert abs(float(rows.mean())) < 0.1
    first = "".join("+" if x > 0 else "-" for x in random_signs(0x2504_19874, 0, 0, 1, 32)[0])
    assert first == "---+--+-+-----++++----+--+++-+++"


def test_zero_vectors_stay_zero():
    for name in VECTOR_FORMATS.names():
        form = layer_format(name).key
        assert torch.equal(form.decode(*form.encode(torch.zeros(3, 64))), torch.zeros(3, 64)), name


@pytest.mark.parametrize("name", VECTOR_FORMATS.names())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_encoding_what_is_not_finite_is_an_error_that_says_where(name, bad):
    x = torch.zeros(2, 64)
    x[1, 5] = bad
    with pytest.raises(NumericError, match=rf"{name}: x\[1, 5\] is"):
        layer_format(name).key.encode(x)


@pytest.mark.parametrize("name", ["tq4", "tq3", "tq2"])
def test_rotated_formats_refuse_a_head_dim_that_is_no_power_of_two(name):
    with pytest.raises(InvalidArgument, match="power of two; this model's is 80"):
        layer_format(name).key.encode(torch.zeros(1, 80))


RATIOS = {
    "tq4": (3.76, 3.88), "tq3": (4.92, 5.12), "tq2": (7.11, 7.53), "fp8_e4m3": (1.94, 1.97),
    "mxfp8": (1.94, 1.94), "k8v4": (2.56, 2.61), "k4v2": (4.92, 5.12), "fp8_e5m2": (2.0, 2.0),
    "bf16": (1.0, 1.0), "fp16": (1.0, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", list(RATIOS))
def test_pools_take_the_bytes_that_the_format_promises(name):
    """Bytes of the tensor that was allocated, against the same pool of 16-bit numbers."""
    for dim, expected in zip((64, 128), RATIOS[name], strict=True):
        shape = PageShape(30, 7, 3, dim, 16)
        page_format = choose_format(name, shape)
        held = KVPages(page_format, shape).store.data.nbytes
        numbers = 2 * 30 * 7 * 3 * dim * 16
        assert 2 * numbers / held == pytest.approx(expected, abs=0.005)
        assert page_format.ratio(shape) == pytest.approx(expected, abs=0.005)
        assert page_format.bytes_per_token(shape) * 7 * 16 == held


def test_pages_of_codes_have_no_numbers_to_read():
    shape = PageShape(2, 3, 1, 64, 16)
    with pytest.raises(InvalidArgument, match="hold codes, not numbers"):
        _ = KVPages(choose_format("tq4", shape), shape).k
