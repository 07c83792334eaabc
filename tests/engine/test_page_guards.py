"""Debug mode: canaries change no output, and notice every wrong write and read."""

from __future__ import annotations

import pytest

from dendrite_engine import SamplingParams
from dendrite_engine.errors import IntegrityError

SAMPLED = SamplingParams(temperature=0.9, max_tokens=20, ignore_eos=True)


def _run(engine) -> list[tuple]:
    root = engine.prompt("canaries in the coal mine sing until the air is bad")
    branches = [*root.fork(3), *root.fork(2, at=17)]
    engine.complete(branches, SAMPLED)
    branches[0].rollback(9)
    branches[1].prune()
    again = [*branches[0].fork(2), *branches[2].fork(at=30)]
    engine.complete(again, SAMPLED)
    engine.check_integrity()
    return [(tuple(b.token_ids), tuple(b.logprobs)) for b in engine.branches]


@pytest.mark.parametrize("page_size", [4, 16])
def test_canaries_change_no_token(make_engine, page_size):
    guarded = make_engine(debug=True, page_size=page_size)
    plain = make_engine(debug=False, page_size=page_size)
    assert _run(guarded) == _run(plain)


def test_a_full_page_that_changes_is_named(make_engine):
    engine = make_engine(debug=True, page_size=4)
    branch = engine.prompt("0123456789")
    engine.check_integrity()
    page = engine.core.segments(branch._handle)[0][4][1]
    value = engine._parts.pages.k[0, page, 0, 0, 0].item()
    engine._parts.pages.k[0, page, 0, 0, 0] = value + 1
    with pytest.raises(IntegrityError, match=f"page {page} changed"):
        engine.check_integrity()
    engine._parts.pages.k[0, page, 0, 0, 0] = value
    engine.check_integrity()


def test_a_page_that_a_rollback_opened_again_may_change(make_engine):
    engine = make_engine(debug=True, page_size=4)
    branch = engine.prompt("0123456789")
    branch.rollback(5)
    branch.extend("abcdef")
    engine.complete([branch], SAMPLED)
    branch.rollback(7)
    engine.complete([branch], SAMPLED)
    engine.check_integrity()


def test_reading_a_slot_that_nobody_wrote_ends_the_branch(make_engine):
    engine = make_engine(debug=True, page_size=4)
    branch = engine.prompt("0123456789")
    page = engine.core.segments(branch._handle)[0][4][2]
    engine._parts.pages.poison([page])
    branch.extend("x")
    (result,) = engine.complete([branch], SAMPLED)
    assert result.finish_reason == "numeric_error"
    assert result.token_ids == []
    branch.prune()
    assert engine.complete([engine.prompt("fresh")], SAMPLED)[0].finish_reason == "length"


def test_freed_pages_are_poisoned_before_they_are_used_again(make_engine):
    engine = make_engine(debug=True, page_size=4, prefix_cache=False)
    branch = engine.prompt("0123456789")
    pages = [p for segment in engine.core.segments(branch._handle) for p in segment[4]]
    branch.prune()
    engine.prompt("z")
    held = {p for b in engine.branches for s in engine.core.segments(b._handle) for p in s[4]}
    for page in set(pages) - held:
        assert engine._parts.pages.k[:, page].isnan().all()
