"""The FlashInfer backend on a GPU, against dense attention; where FlashInfer is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_flashinfer_plan import device_pages, with_items
from tree_cases import Segment, TreeCase, random_segments

from dendrite_engine.attention import DEVICE_ATTENTION_BACKENDS, AttentionSetup

pytestmark = pytest.mark.cuda

NAMES = ("flashinfer", "flashinfer-flat", "flashinfer-cascade")
SHAPES = ((8, 2, 64), (4, 4, 128), (32, 8, 128))
WINDOW = 40
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _needs_flashinfer():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    pytest.importorskip("flashinfer")


_BACKENDS = {}


def backend_of(name, shape, dtype):
    """One backend for each choice: making it compiles kernels and tries them out."""
    key = (name, shape, dtype)
    if key not in _BACKENDS:
        heads, kv_heads, head_dim = shape
        _BACKENDS[key] = DEVICE_ATTENTION_BACKENDS.get(name)(
            AttentionSetup(
                ops=None,
                device=torch.device("cuda"),
                dtype=dtype,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=head_dim,
                windows=frozenset((0, WINDOW)),
                page_size=16,
                max_rows=1024,
                graph_rows=0,
                deterministic=False,
                is_twin=False,
            )
        )
    return _BACKENDS[key]


def check(name, segments, shape, dtype=torch.bfloat16, seed=0):
    heads, kv_heads, head_dim = shape
    case = with_items(
        TreeCase(segments, heads=heads, kv_heads=kv_heads, head_dim=head_dim, seed=seed)
    )
    # Slots that no row may read hold large numbers: FlashInfer does not promise to survive NaN.
    k_pages, v_pages = (p.nan_to_num(50.0).to("cuda", dtype) for p in device_pages(case))
    attention = backend_of(name, shape, dtype)
    batch = SimpleNamespace(plan=case.plan, num_rows=len(case.q))
    q = torch.cat([case.q, case.q[:3]]).to("cuda", dtype)
    assert attention.prepare(case.plan, batch) == 0
    for window in (0, WINDOW):
        out = torch.full_like(q, float("nan"))
        attention.attend(q, k_pages, v_pages, batch, out, scale=head_dim**-0.5, window=window)
        assert "tree" not in attention.reason, attention.reason
        assert torch.isnan(out[len(case.q) :]).all()
        got, expected = out[: len(case.q)].double().cpu(), case.expected(head_dim**-0.5, window)
        error = torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected)
        assert error < TOLERANCE[dtype], f"window {window}: {error}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_on_a_tree_matches_dense_attention(name, shape):
    segments = [Segment(None, 0, 333, 0)]
    segments += [Segment(0, 333, 60 + n, 0) for n in range(3)]
    segments += [Segment(1 + n % 3, segments[1 + n % 3].end, 1 + n, 1) for n in range(20)]
    check(name, segments, shape)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_random_trees_with_prompts_match_dense_attention(name, seed):
    check(name, random_segments(seed, count=24), SHAPES[0], seed=seed)


def test_half_precision_is_closer():
    check("flashinfer-cascade", random_segments(7, count=12), SHAPES[1], torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_one_branch_alone_works(name):
    for length in (1, 16, 17, 700):
        check(name, [Segment(None, 0, length, 1)], SHAPES[2])
        check(name, [Segment(None, 0, length, length)], SHAPES[2])
