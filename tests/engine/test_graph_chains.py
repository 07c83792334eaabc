"""A captured pass is a chain of graphs over ranges of layers, and computes what a whole pass does.

Without a GPU a graph is stood in for by what it would have captured, called again at each replay:
so a part that kept something of the step it was captured in is found here too.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from graph_fakes import RecordedGraphs

from dendrite_engine import SamplingParams
from dendrite_engine.device.graphs import chain_of

GREEDY = SamplingParams(max_tokens=5, ignore_eos=True)
TEXT = "a chain is as strong as its weakest link, "
DEPTHS = (1, 2, 9)  # layers of models that there are


def _record(engine) -> RecordedGraphs:
    graphs = RecordedGraphs()
    engine._parts.runner.state.graphs = graphs
    return graphs


def _branches(engine, count: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of `count` branches that diverge inside a page."""
    branches = engine.prompt(TEXT * 2).fork(count)
    engine.extend(branches, [[i % 251, *[7] * (i % 3)] for i in range(count)])
    results = engine.complete(branches, GREEDY)
    engine.prune_all()
    return [(result.token_ids, result.logprobs) for result in results]


# -- how a pass is cut ------------------------------------------------------------------------


def test_the_parts_of_a_chain_are_all_layers_in_order_and_grow():
    for layers in range(1, 129):
        chain = chain_of(layers)
        assert [index for part in chain for index in part] == list(range(layers))
        sizes = [len(part) for part in chain]
        assert sizes == sorted(sizes)
        assert sizes[0] == 1
        assert len(chain) <= 5


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [(1, [1]), (2, [1, 1]), (3, [1, 2]), (9, [1, 3, 5]), (22, [1, 3, 9, 9]), (32, [1, 3, 9, 19])],
)
def test_a_chain_is_cut_into_few_parts(layers, sizes):
    assert [len(part) for part in chain_of(layers)] == sizes


# -- what it computes -------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("layers", DEPTHS)
def test_a_pass_in_parts_computes_what_a_whole_pass_does(
    make_engine, monkeypatch, layers, deterministic
):
    def results(cut):
        engine = make_engine(
            f"llama-of-{layers}-wide", device="cuda-twin", deterministic=deterministic
        )
        model = engine._parts.runner.state.model
        whole = model.forward

        def in_parts(*args) -> None:
            *arguments, _ = args
            for part in cut:
                whole(*arguments, part)

        if cut:
            monkeypatch.setattr(model, "forward", in_parts)
        return [_branches(engine, count) for count in (1, 5, 20)]

    expected = results(())
    assert results(chain_of(layers)) == expected
    assert results([range(i, i + 1) for i in range(layers)]) == expected


@pytest.mark.parametrize("layers", DEPTHS)
def test_a_chain_of_recorded_parts_serves_later_steps(make_engine, layers):
    kind = f"llama-of-{layers}-wide"
    eager, engine = (make_engine(kind, device="cuda-twin") for _ in range(2))
    graphs = _record(engine)
    for count in (1, 2, 3, 20, 3, 1):
        assert _branches(engine, count) == _branches(eager, count)
    stats, chains = engine.stats(), graphs._graphs.values()
    assert {len(chain) for chain in chains} == {len(chain_of(layers))}
    assert 12 < stats.graph_steps < stats.steps, "a step counts once, however many graphs it takes"


def test_a_chain_of_which_a_part_can_not_be_captured_is_given_up_as_a_whole(
    make_engine, monkeypatch
):
    idle = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: idle)
    eager, engine = (make_engine("llama-of-9-wide", device="cuda-twin") for _ in range(2))
    graphs = _record(engine)
    graphs.refused = 4  # the second part of the second size
    assert [_branches(engine, n) for n in (1, 3, 1)] == [_branches(eager, n) for n in (1, 3, 1)]
    assert (len(graphs), graphs.is_on) == (0, False)
    assert engine.report()["graphs"].startswith("off: capturing")
    assert "not permitted" in engine.report()["graphs"]


@pytest.mark.cuda
@pytest.mark.parametrize("layers", DEPTHS)
def test_a_chain_of_graphs_replays_what_eager_steps_compute(make_engine, layers):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    kind, options = f"llama-of-{layers}-wide", {"device": "cuda", "dtype": "float32"}
    eager, engine = (make_engine(kind, **options) for _ in range(2))
    eager._parts.runner.state.graphs.is_on = False  # padded to the same sizes, never captured
    for count in (1, 2, 3, 8, 17, 100, 17, 1):
        ours, theirs = _branches(engine, count), _branches(eager, count)
        for (tokens, logprobs), (same_tokens, same_logprobs) in zip(ours, theirs, strict=True):
            assert tokens == same_tokens, f"{count} branches"
            assert logprobs == pytest.approx(same_logprobs, abs=1e-5)
    chains = engine._parts.runner.state.graphs._graphs
    assert {len(chain) for chain in chains.values()} == {len(chain_of(layers))}
    assert (eager.stats().graph_steps, engine.report()["graphs"][:2]) == (0, "on")
    assert engine.stats().graph_steps > 8
