"""Trees as data: exported from searches and branches, drawn, tabled, read back, grown again."""

from __future__ import annotations

import json
import sys

import pytest

from dendrite_engine import Budget, SamplingParams
from dendrite_engine.errors import InvalidArgument, SnapshotRejected
from dendrite_engine.search import MCTS, BeamSearch
from dendrite_lab import cli, trees
from dendrite_lab.trees import TreeData, TreeNode
from dendrite_lab.trees.drawing import outline
from dendrite_lab.trees.tables import MissingPackage

PROMPT = list(range(5, 25))


@pytest.fixture
def engine(make_engine):
    return make_engine()


def searched(engine, algorithm=None, paused=False):
    root = engine.prompt(PROMPT)
    handle = engine.search(
        root, algorithm or MCTS(width=2, tokens_per_node=3, seed=1), Budget(iterations=12)
    )
    handle.wait(60)
    return handle


@pytest.fixture
def branches(engine):
    """A root, two children of it, and one that hangs inside the first child."""
    root = engine.prompt(PROMPT)
    a, b = root.fork(2)
    engine.complete([a, b], SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True))
    c = a.fork(at=23)[0]
    c.extend([9, 8])
    c.label = "mine"
    return [root, a, b, c]


def sample():
    return TreeData(
        [
            TreeNode(0, text='say "hi"\n<b>', token_ids=(1, 2), logprobs=(None, None), best=True),
            TreeNode(1, 0, 2, (3,), (-0.5,), "x\\y", 3, 0.5, 0.25, 0.1, "terminal", "eos", True, 7),
            TreeNode(2, 0, 1, (4,), (-0.1,), "\x1b[31mred\u202e", status="pruned"),
        ],
        "search:mcts",
        "toy",
    )


# -- sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "algorithm", [None, BeamSearch(width=2, max_tokens=5)], ids=["mcts", "beam"]
)
def test_a_search_exports_every_node_with_its_statistics_and_the_best_path(engine, algorithm):
    handle = searched(engine, algorithm)
    tree = trees.export(handle)
    assert len(tree) == len(handle.tree)
    assert tree.source == f"search:{handle.algorithm.name}"
    for node, other in zip(tree.nodes, handle.tree.nodes, strict=True):
        assert (node.visits, node.score, node.status) == (other.visits, other.score, other.status)
        if other.parent is not None:
            assert node.parent == other.parent.id
            assert (node.start, node.token_ids) == (other.start, other.token_ids)
    best = tree.best()
    assert tree.token_ids(best) == [*PROMPT, *handle.result.token_ids]


def test_live_branches_export_with_the_place_where_they_part(branches, engine):
    tree = trees.export(engine)
    assert [n.parent for n in tree.nodes] == [-1, 0, 0, 1]
    assert tree.nodes[3].start == 23
    assert tree.nodes[3].label == "mine"
    for node, branch in zip(tree.nodes, branches, strict=True):
        assert tree.token_ids(node) == branch.token_ids
    below_a = trees.export(branches[1])
    assert [n.branch_id for n in below_a.nodes] == [branches[1].id, branches[3].id]
    assert below_a.nodes[0].token_ids == tuple(branches[1].token_ids)


def test_a_branch_rolled_back_and_changed_since_it_was_forked_is_still_exported_whole(engine):
    root = engine.prompt(PROMPT)
    child = root.fork()[0]
    child.extend([3, 4])
    root.rollback(5)
    root.extend([1, 1, 1])
    tree = trees.export([root, child])
    assert tree.nodes[1].start == len(PROMPT) - 5
    assert tree.token_ids(tree.nodes[1]) == child.token_ids


def test_what_is_no_tree_is_refused(engine):
    handle = searched(engine)
    for source in (handle.result, 5, []):
        with pytest.raises(InvalidArgument):
            trees.export(source)


# -- text and tables ----------------------------------------------------------------------------


def test_dot_and_mermaid_escape_what_a_model_wrote():
    dot, mermaid = sample().to_dot(), sample().to_mermaid()
    assert dot.splitlines()[2] == '  n0 [label="0: say \\"hi\\"\\\\n<b>", penwidth=2];'
    assert 'label="1: x\\\\y\\nN=3 Q=0.500 score=0.250 eos"' in dot
    assert "n0 -> n1 [penwidth=2];" in dot
    assert "style=dashed" in dot
    assert '  n0["0: say #quot;hi#quot;\\n#lt;b#gt;"]' in mermaid
    assert "n0 ==> n1" in mermaid
    assert "n0 --> n2" in mermaid
    assert "class n2 pruned" in mermaid
    for text in (dot, mermaid, outline(sample())):
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_long_texts_are_cut():
    tree = TreeData([TreeNode(0, text="word " * 100)], "branches")
    assert max(map(len, tree.to_mermaid(width=20).splitlines())) < 40


def test_the_outline_marks_the_path_to_the_best():
    assert outline(sample()).splitlines()[1] == "  *1: x\\y  N=3 Q=0.500 score=0.250 eos"


def test_networkx_gets_nodes_with_fields_and_edges(engine):
    networkx = pytest.importorskip("networkx")
    tree = trees.export(searched(engine))
    graph = tree.to_networkx()
    assert networkx.is_arborescence(graph)
    assert graph.number_of_nodes() == len(tree)
    assert graph.nodes[1]["visits"] == tree.nodes[1].visits
    assert graph.graph["source"] == "search:mcts"


def test_pandas_gets_a_row_for_each_node(engine):
    pytest.importorskip("pandas")
    tree = trees.export(searched(engine))
    frame = tree.to_pandas()
    assert list(frame.index) == [node.id for node in tree.nodes]
    assert frame["depth"].tolist() == [tree.depth(node) for node in tree.nodes]
    assert frame["tokens"].tolist() == [len(node.token_ids) for node in tree.nodes]
    assert "extra.ordinal" in frame.columns


@pytest.mark.parametrize("name", ["networkx", "pandas"])
def test_a_missing_package_is_named_with_the_way_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match=f"{name} is not installed: pip install {name}"):
        getattr(sample(), f"to_{name}")()


# -- JSON ---------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was(engine, branches, tmp_path):
    for tree in (sample(), trees.export(engine), trees.export(searched(engine))):
        assert trees.from_json(tree.to_json()) == tree
        (tmp_path / "t.json").write_text(tree.to_json(indent=2), encoding="utf-8")
        assert trees.read(tmp_path / "t.json") == tree


def test_numbers_that_json_lacks_become_null():
    tree = TreeData([TreeNode(0, value=float("nan"), extra={"a": [float("inf")]})], "x")
    assert "NaN" not in tree.to_json()
    back = trees.from_json(tree.to_json()).nodes[0]
    assert back.value is None
    assert back.extra == {"a": [None]}


def test_extra_that_is_no_json_is_refused():
    with pytest.raises(InvalidArgument, match="extra"):
        TreeData([TreeNode(0, extra={"a": object()})], "x").to_json()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda b: b.update(schema="other"), "schema"),
        (lambda b: b.update(version=2), "version"),
        (lambda b: b.update(nodes={}), "nodes"),
        (lambda b: b["nodes"][1].pop("text"), "nodes[1]"),
        (lambda b: b["nodes"][1].update(parent=1), "nodes[1].parent"),
        (lambda b: b["nodes"][1].update(start=9), "nodes[1].start"),
        (lambda b: b["nodes"][1].update(visits=True), "nodes[1].visits"),
        (lambda b: b["nodes"][1].update(best=1), "nodes[1].best"),
        (lambda b: b["nodes"][1].update(token_ids=["a"]), "nodes[1].token_ids"),
        (lambda b: b["nodes"][1].update(logprobs="x"), "nodes[1].logprobs"),
    ],
)
def test_json_that_does_not_add_up_is_refused_by_field(change, field):
    body = json.loads(sample().to_json())
    change(body)
    with pytest.raises(SnapshotRejected) as caught:
        trees.from_json(json.dumps(body))
    assert caught.value.field == field


# -- back into the engine -----------------------------------------------------------------------


def test_an_exported_tree_becomes_a_search_tree_with_the_same_statistics(engine):
    handle = searched(engine)
    tree = trees.from_json(trees.export(handle).to_json()).to_tree()
    assert len(tree) == len(handle.tree)
    for node, other in zip(tree.nodes, handle.tree.nodes, strict=True):
        assert (node.span, node.depth, node.status) == (other.span, other.depth, other.status)
        assert (node.visits, node.score) == (other.visits, other.score)
        assert node.value == pytest.approx(other.value)
        assert node.branch is None
        assert [c.id for c in node.children] == [c.id for c in other.children]
    assert tree.planned == []


def test_an_exported_tree_grows_again_with_shared_pages(make_engine, branches, engine):
    other = make_engine()
    made = trees.from_json(trees.export(engine).to_json()).grow(other)
    assert [made[i].token_ids for i in range(4)] == [b.token_ids for b in branches]
    assert [made[i].label for i in range(4)] == [b.label for b in branches]
    assert made[1].logprobs == branches[1].logprobs
    other.complete(list(made.values()), SamplingParams(max_tokens=1))
    assert other.stats().pages_live <= engine.stats().pages_live + 4


def test_a_search_tree_grows_into_branches_that_end_where_its_nodes_end(make_engine, engine):
    handle, other = searched(engine), make_engine()
    tree = trees.export(handle)
    made = tree.grow(other)
    for node in tree.nodes:
        assert made[node.id].token_ids == tree.token_ids(node)


def test_a_tree_that_does_not_fit_leaves_nothing(make_engine, engine, branches):
    small = make_engine(num_pages=3)
    with pytest.raises(Exception, match="out of pages"):
        trees.export(engine).grow(small)
    assert small.branches == []


# -- files of the engine ------------------------------------------------------------------------


def test_a_saved_search_and_saved_branches_are_read_without_an_engine(engine, tmp_path):
    handle = searched(engine)
    handle.save(tmp_path / "s")
    tree, live = trees.read(tmp_path / "s"), trees.export(handle)
    assert tree.source == live.source
    for node, other in zip(tree.nodes, live.nodes, strict=True):
        assert (node.token_ids, node.start, node.visits) == (
            other.token_ids, other.start, other.visits,
        )  # fmt: skip
    engine.save(tmp_path / "b", engine.branches)
    tree = trees.read(tmp_path / "b")
    assert [tree.token_ids(n) for n in tree.nodes] == [b.token_ids for b in engine.branches]


def test_a_file_that_is_nothing_known_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x00\x01")
    with pytest.raises(SnapshotRejected):
        trees.read(tmp_path / "x")
    (tmp_path / "y").write_text("{not json", encoding="utf-8")
    with pytest.raises(SnapshotRejected, match="format"):
        trees.read(tmp_path / "y")
    with pytest.raises(InvalidArgument, match="no file"):
        trees.read(tmp_path / "z")


# -- llm-reasoners ------------------------------------------------------------------------------


def treelog():
    """Two snapshots as `str(TreeLog)` of llm-reasoners writes them, by hand."""

    def node(number, selected, **data):
        return {"id": number, "data": data, "selected_edge": selected, "convert_images": True}

    def edge(number, source, target, **data):
        return {"id": number, "source": source, "target": target, "data": data}

    first = {"nodes": {"0": node(0, None, step="start")}, "edges": {}}
    second = {
        "nodes": {
            "0": node(0, 1, step="start"),
            "3": node(3, None, step="left", last_action="a"),
            "5": node(5, 2, step="right"),
            "9": node(9, None, step="done"),
        },
        "edges": {
            "0": edge(0, 0, 3, Q=0.25, reward=0.1, intuition=-1.5),
            "1": edge(1, 0, 5, Q=0.75, reward=0.5),
            "2": edge(2, 5, 9, Q=float("nan"), reward=1),
        },
    }
    return {"logs": [first, second]}


def test_a_treelog_becomes_a_tree_with_values_rewards_and_the_selected_path(tmp_path):
    tree = trees.from_treelog(json.dumps(treelog()))
    assert [n.text for n in tree.nodes] == [
        "step: start", "step: left\nlast_action: a", "step: right", "step: done",
    ]  # fmt: skip
    assert [n.parent for n in tree.nodes] == [-1, 0, 0, 2]
    assert [n.value for n in tree.nodes] == [None, 0.25, 0.75, None]
    assert [n.score for n in tree.nodes] == [None, 0.1, 0.5, 1.0]
    assert [n.best for n in tree.nodes] == [True, False, True, True]
    assert tree.nodes[1].extra["treelog_id"] == 3
    assert tree.nodes[1].extra["edge"]["intuition"] == -1.5
    assert trees.from_treelog(json.dumps(treelog()), text_key="step").nodes[3].text == "done"
    assert len(trees.from_treelog(json.dumps(treelog()), snapshot=0)) == 1
    (tmp_path / "log.json").write_text(json.dumps(treelog()), encoding="utf-8")
    assert len(trees.read(tmp_path / "log.json")) == 4
    assert "n2 ==> n3" in tree.to_mermaid()
    assert trees.from_json(tree.to_json()).nodes[3].text == "step: done"
    assert tree.to_tree().nodes[3].depth == 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda log: log.update(logs=3), "logs"),
        (lambda log: log["logs"][1].pop("edges"), "logs[1].edges"),
        (lambda log: log["logs"][1]["nodes"]["3"].pop("id"), "logs[1].nodes.3"),
        (lambda log: log["logs"][1]["edges"]["2"].update(target=0), "logs[1].edges"),
        (lambda log: log["logs"][1]["edges"]["2"].update(target=77), "logs[1].edges"),
        (lambda log: log["logs"][1]["edges"].pop("0"), "logs[1].edges"),
        (lambda log: log["logs"][1]["edges"]["0"].update(source=9), None),
    ],
)
def test_a_treelog_that_is_no_tree_is_refused_by_field(change, field):
    log = treelog()
    change(log)
    if field is None:  # still a tree
        assert len(trees.from_treelog(json.dumps(log))) == 4
        return
    with pytest.raises(SnapshotRejected) as caught:
        trees.from_treelog(json.dumps(log))
    assert caught.value.field == field


def test_a_snapshot_that_is_not_there_is_refused():
    with pytest.raises(InvalidArgument, match=r"snapshot must be in -2\.\.1"):
        trees.from_treelog(json.dumps(treelog()), snapshot=2)


# -- command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "start"), [("mermaid", "flowchart"), ("dot", "digraph"), ("json", "{"), ("text", "*0")]
)
def test_the_command_tree_prints_a_file_in_every_format(form, start, tmp_path, capsys):
    file = tmp_path / "t.json"
    file.write_text(sample().to_json(), encoding="utf-8")
    assert cli.main(["tree", str(file), "--format", form]) == 0
    assert capsys.readouterr().out.startswith(start)
    assert cli.main(["tree", str(file), "--format", form, "--output", str(tmp_path / "o")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "o").read_text("utf-8").startswith(start)


def test_the_command_tree_decodes_tokens_with_a_models_tokenizer(engine, tmp_path, capsys):
    searched(engine).save(tmp_path / "s")
    assert cli.main(["tree", str(tmp_path / "s")]) == 0
    assert f"({len(PROMPT)} tokens)" in capsys.readouterr().out
    assert cli.main(["tree", str(tmp_path / "s"), "--model", str(engine.model_path)]) == 0
    assert "tokens)" not in capsys.readouterr().out


def test_the_command_tree_says_what_is_wrong_with_a_file(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[1]", encoding="utf-8")
    assert cli.main(["tree", str(tmp_path / "x.json")]) == 2
    assert "snapshot rejected, schema" in capsys.readouterr().err
