"""The workbench on a real engine with a tiny random model, and the guard of the comm routing."""

from __future__ import annotations

from types import SimpleNamespace

import ipywidgets
import pytest

from dendrite_engine import SamplingParams
from dendrite_lab import Explorer, plots
from dendrite_lab.comm_guard import answer_all_on_sender, answer_on_sender


@pytest.fixture
def explorer(make_engine):
    engine = make_engine("llama", page_size=4)
    widget = Explorer(engine, list(range(5, 15)), sampling=SamplingParams(temperature=1.0, seed=3))
    yield widget
    widget.close()


def ok(reply):
    assert reply["ok"], reply
    return reply["result"]


def finish(explorer):
    for job, _ in explorer._operations._jobs:
        job.wait(30)


def test_what_nodes_show_is_what_the_engine_holds(explorer):
    engine = explorer.engine
    made = ok(explorer.simulate("fork", node=1, count=3, go=True, max_tokens=6))
    finish(explorer)
    ok(explorer.simulate("fork", node=made["nodes"][0], at=13, count=2))
    ok(explorer.simulate("prune", node=made["nodes"][1]))
    engine.check_integrity()
    tree = explorer.tree
    for branch in engine.branches:
        node = tree.of(branch)
        assert (node.end, node.pages, node.owned_pages) == (
            branch.num_tokens,
            branch.pages,
            branch.owned_pages,
        )
    path = explorer._session.model.path(explorer._session.piece(made["nodes"][0]))
    tokens = [t for piece in path for t in explorer._session.model.tokens(piece)]
    assert tokens == engine.branch(made["branches"][0]).token_ids[: len(tokens)]


def test_a_fork_costs_no_page_and_a_prune_gives_back_what_it_promised(explorer):
    cost = ok(explorer.simulate("fork", node=1, count=8))["cost"]
    assert (cost["pages_taken"], cost["bytes_copied"]) == (0, 0)
    made = ok(explorer.simulate("fork", node=1, go=True, max_tokens=9))
    finish(explorer)
    promised = ok(explorer.simulate("cost", node=made["nodes"][0]))["pages"]
    assert promised > 0
    assert ok(explorer.simulate("prune", node=made["nodes"][0]))["cost"]["pages_freed"] == promised


def test_alternatives_match_the_engine_and_edit_reuses_pages(explorer):
    engine = explorer.engine
    root = engine.branches[0]
    found = ok(explorer.simulate("top", node=1, k=4))["alternatives"]
    expected = engine.top_tokens([root], 4)[0]
    assert [a["token_id"] for a in found] == [a.token_id for a in expected]
    inner = ok(explorer.simulate("top", node=1, k=4, at=6))["alternatives"]
    assert len(inner) == 4
    assert [branch.id for branch in engine.branches] == [root.id]
    forced = ok(explorer.simulate("force", node=1, token_id=inner[1]["token_id"], at=6))
    branch = engine.branch(forced["branches"][0])
    assert branch.token_ids == [*root.token_ids[:6], inner[1]["token_id"]]


def test_figures_agree_with_the_engines_own_counts(explorer):
    engine = explorer.engine
    ok(explorer.simulate("fork", node=1, count=3, go=True, max_tokens=5))
    finish(explorer)
    stats = engine.stats()
    bars = plots.refcounts(engine).data[0]
    assert sum(bars.y) == stats.pages_live
    holders = plots.memory(engine).data[0].z
    assert holders[0][0] == 4
    assert f"live pages: {stats.pages_live} ({stats.pages_shared} shared" in (
        plots.memory(engine).layout.title.text
    )


def test_errors_of_the_engine_come_back_by_name(explorer):
    def refused(reply):
        assert not reply["ok"]
        return reply["error"]["type"]

    made = ok(explorer.simulate("fork", node=1, go=True, max_tokens=400))
    assert refused(explorer.simulate("generate", node=made["nodes"][0])) == "InvalidArgument"
    ok(explorer.simulate("stop"))
    finish(explorer)
    assert explorer.tree.node(made["nodes"][0]).finish_reason == "cancelled"
    too_much = explorer.simulate("force", node=1, token_id=10**6)
    assert refused(too_much) == "InvalidArgument"


def test_the_comm_guard_sends_messages_where_they_came_from():
    comm = SimpleNamespace(_reply_subshell_for=lambda data, default: "the last sender")
    answer_on_sender(SimpleNamespace(comm=comm))
    assert comm._reply_subshell_for({"x": 1}, "the front end") == "the front end"


def test_the_comm_guard_leaves_other_comms_alone():
    comm = SimpleNamespace()
    answer_on_sender(SimpleNamespace(comm=comm))
    answer_on_sender(SimpleNamespace(comm=None))
    assert vars(comm) == {}


def test_the_comm_guard_reaches_every_widget_of_a_panel(monkeypatch):
    guarded = []
    monkeypatch.setattr("dendrite_lab.comm_guard.answer_on_sender", guarded.append)
    inner = ipywidgets.Button()
    answer_all_on_sender(ipywidgets.VBox([ipywidgets.HBox([inner]), ipywidgets.Label()]))
    assert len(guarded) == 4
    assert inner in guarded


def test_the_hook_that_the_guard_replaces_exists_in_this_ipykernel():
    """A new ipykernel that renames the hook must not pass unnoticed."""
    import ipykernel
    from ipykernel.comm.comm import BaseComm

    version = tuple(int(part) for part in ipykernel.__version__.split(".")[:2])
    assert hasattr(BaseComm, "_reply_subshell_for") == (version >= (7, 4))
