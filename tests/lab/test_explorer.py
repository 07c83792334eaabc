"""The Explorer through the path that clicks take, without a browser."""

from __future__ import annotations

import ast
import math
import re
import threading
from pathlib import Path

import pytest

from dendrite_engine.errors import InvalidArgument, StaleBranch
from dendrite_lab import Explorer
from dendrite_lab.commands import CommandDesk, CommandTimeout

REPOSITORY = Path(__file__).parents[2]


def ok(reply):
    assert reply["ok"], reply
    return reply["result"]


def failed(reply, kind):
    assert not reply["ok"]
    assert reply["error"]["type"] == kind
    return reply["error"]["message"]


def forked(explorer, count=2, **args):
    return ok(explorer.simulate("fork", node=1, count=count, **args))


def test_fork_makes_children_and_says_what_it_cost(explorer, engine):
    made = forked(explorer, 3)
    assert len(engine.branches) == 4
    assert made["cost"]["pages_taken"] == 0
    assert made["cost"]["bytes_copied"] == 0
    assert made["cost"]["us"] > 0
    assert [explorer.tree.node(n).branch_id for n in made["nodes"]] == made["branches"]


def test_fork_inside_a_node_keeps_the_tokens_before(explorer, engine):
    made = ok(explorer.simulate("fork", node=1, at=3))
    child = engine.branches[-1]
    assert child.text == "Once upon a"
    assert explorer.tree.node(made["nodes"][0]).start == 3
    assert [(n.start, n.end) for n in explorer.tree] == [(0, 3), (3, 6), (3, 3)]


def test_several_nodes_stream_in_one_job(explorer, engine):
    nodes = forked(explorer, 3)["nodes"]
    result = ok(explorer.simulate("generate", nodes=nodes, max_tokens=5))
    assert result["job"] == {"branches": 3, "max_tokens": 5}
    assert len(engine.jobs) == 1
    assert all(explorer.tree.node(n).streaming for n in nodes)
    engine.finish()
    views = [explorer.tree.node(n) for n in nodes]
    assert [v.end - v.start for v in views] == [5, 5, 5]
    assert {v.finish_reason for v in views} == {"length"}
    assert all(not v.streaming and v.mean_logprob < 0 for v in views)


def test_continue_all_leaves_skips_inner_nodes_and_those_that_stream_already(explorer, engine):
    nodes = forked(explorer, 2)["nodes"]
    ok(explorer.simulate("generate", node=nodes[0], max_tokens=4))
    ok(explorer.simulate("generate", leaves=True, max_tokens=4))
    assert [len(job.branches) for job in engine.jobs] == [1, 1]
    message = failed(explorer.simulate("generate", nodes=nodes), "InvalidArgument")
    assert "is generating" in message


def test_continuing_an_inner_node_whose_branch_went_on_forks_there(explorer, engine):
    made = ok(explorer.simulate("fork", node=1, at=3))
    ok(explorer.simulate("generate", node=1, max_tokens=2))
    engine.finish()
    new = engine.branches[-1]
    assert new.text.startswith("Once upon a")
    assert new.id not in made["branches"]


def test_fork_and_go_streams_into_the_new_children(explorer, engine):
    made = forked(explorer, 2, go=True, max_tokens=3)
    assert made["job"]["branches"] == 2
    engine.finish()
    assert all(explorer.tree.node(n).end == 9 for n in made["nodes"])


def test_stop_cancels_what_streams(explorer, engine):
    nodes = forked(explorer, 2)["nodes"]
    ok(explorer.simulate("generate", nodes=nodes, max_tokens=50))
    assert ok(explorer.simulate("stop"))["jobs"] == 1
    engine.finish()
    assert explorer.tree.node(nodes[0]).finish_reason == "cancelled"


def test_edit_forks_at_the_longest_common_token_prefix_and_keeps_the_old_text(explorer, engine):
    node = forked(explorer, 1)["nodes"][0]
    engine.branches[-1].extend(" sat a red fox down")
    reply = ok(explorer.simulate("edit", node=node, text=" sat a blue whale"))
    texts = [branch.text for branch in engine.branches]
    assert "Once upon a time there was sat a red fox down" in texts[1].replace("  ", " ")
    assert engine.branches[-1].text.replace("  ", " ").endswith("sat a blue whale")
    assert reply["tokens_reused"] + reply["tokens_new"] == engine.branches[-1].num_tokens
    assert reply["tokens_reused"] > 6


def test_edit_of_the_first_token_starts_a_new_tree(explorer, engine):
    ok(explorer.simulate("edit", node=1, text="Twice upon a time"))
    assert len(explorer.tree.roots) == 2
    assert engine.branches[0].text == "Once upon a time there was"


def test_edit_without_a_change_is_refused(explorer):
    failed(explorer.simulate("edit", node=1, text="Once upon a time there was"), "InvalidArgument")


def test_extend_appends_at_the_tip_and_forks_elsewhere(explorer, engine):
    ok(explorer.simulate("extend", node=1, text=" a king"))
    assert engine.branches[0].text == "Once upon a time there was a king"
    ok(explorer.simulate("fork", node=1, at=2))
    ok(explorer.simulate("extend", node=1, text=" my word"))
    assert engine.branches[-1].text == "Once upon my word"
    failed(explorer.simulate("extend", node=1, text=""), "InvalidArgument")


def test_prune_takes_the_whole_subtree_and_says_what_it_freed(explorer, engine):
    node = forked(explorer, 2)["nodes"][0]
    ok(explorer.simulate("generate", leaves=True, max_tokens=9))
    engine.finish()
    ok(explorer.simulate("fork", node=node, count=2))
    promised = ok(explorer.simulate("cost", node=node))
    done = ok(explorer.simulate("prune", node=node))
    assert promised["branches"] == done["cost"]["branches"] == 3
    assert promised["pages"] == done["cost"]["pages_freed"] > 0
    assert [branch.id for branch in engine.branches] == [1, 3]
    failed(explorer.simulate("prune", node=node), "StaleBranch")


def test_pruning_the_second_half_of_a_node_takes_back_only_that_half(explorer, engine):
    ok(explorer.simulate("fork", node=1, at=3))
    tail = next(n for n in explorer.tree if n.branch_id == 1 and n.start == 3)
    ok(explorer.simulate("prune", node=tail.id))
    assert [branch.text for branch in engine.branches] == ["Once upon a", "Once upon a"]


def test_alternatives_leave_no_trace_in_the_tree(explorer, engine):
    before = str(explorer.tree)
    found = ok(explorer.simulate("top", node=1, k=3))
    assert [a["logprob"] for a in found["alternatives"]] == [-0.5, -1.5, -2.5]
    assert found["at"] == 6
    assert ok(explorer.simulate("top", node=1, at=2))["at"] == 2
    assert str(explorer.tree) == before
    assert len(engine.branches) == 1


def test_forcing_an_alternative_forks_with_that_token(explorer, engine):
    token = ok(explorer.simulate("top", node=1, k=1, at=2))["alternatives"][0]["token_id"]
    ok(explorer.simulate("force", node=1, token_id=token, at=2))
    assert engine.branches[-1].token_ids == [*engine.branches[0].token_ids[:2], token]


def test_tokens_come_in_parts_with_logprobs_only_where_they_were_generated(explorer, engine):
    node = forked(explorer, 1)["nodes"][0]
    ok(explorer.simulate("generate", node=node, max_tokens=3))
    engine.finish()
    parts = ok(
        explorer.simulate("tokens", parts=[{"node": 1, "from": 4}, {"node": node}, {"node": 77}])
    )["parts"]
    assert [(p["node"], p["from"], len(p["ids"])) for p in parts] == [(1, 4, 2), (node, 0, 3)]
    assert parts[0]["logprobs"] == [None, None]
    assert all(x < 0 for x in parts[1]["logprobs"])


def test_a_typed_prompt_starts_a_second_tree(engine):
    explorer = Explorer(engine)
    assert len(explorer.tree) == 0
    ok(explorer.simulate("prompt", text="Hello there"))
    assert [n.text for n in explorer.tree] == ["Hello there"]
    explorer.close()


@pytest.mark.parametrize(
    ("op", "args", "kind"),
    [
        ("fork", {"node": 99}, "StaleBranch"),
        ("fork", {"node": 1, "count": 0}, "InvalidArgument"),
        ("fork", {"node": 1, "count": 65}, "InvalidArgument"),
        ("fork", {"node": 1, "at": 0}, "InvalidArgument"),
        ("fork", {"node": 1, "at": 7}, "InvalidArgument"),
        ("generate", {}, "InvalidArgument"),
        ("generate", {"node": 1, "temperature": -1}, "InvalidArgument"),
        ("generate", {"node": 1, "max_tokens": 0}, "InvalidArgument"),
        ("generate", {"nodes": "all"}, "InvalidArgument"),
        ("force", {"node": 1}, "InvalidArgument"),
        ("search", {"action": "pause"}, "InvalidArgument"),
        ("top", {"node": 1, "k": 0}, "InvalidArgument"),
        ("no such op", {}, "InvalidArgument"),
    ],
)
def test_errors_come_back_by_name_and_change_nothing(explorer, op, args, kind):
    before = str(explorer.tree)
    message = failed(explorer.simulate(op, **args), kind)
    assert message
    assert str(explorer.tree) == before


def test_the_same_command_id_is_carried_out_once(explorer, engine):
    replies = []
    explorer.send = lambda message, buffers=None: replies.append(message)
    for _ in range(3):
        message = {"t": "cmd", "id": "same", "op": "fork", "node": 1, "args": {}}
        explorer._receive(explorer, message, [])
    explorer.simulate("select", node=1)  # same queue: the fork is done when this is
    assert len(engine.branches) == 2
    assert {r["result"]["branches"][0] for r in replies if r.get("id") == "same"} == {2}


def test_messages_that_are_no_messages_are_ignored(explorer):
    for content in (None, 5, "x", [], {}, {"t": "ack"}, {"t": "ack", "seq": "1"}, {"t": "eval"}):
        explorer._receive(explorer, content, [])
    assert len(explorer.tree) == 1


def test_handlers_only_enqueue(explorer, engine):
    """A handler returns although the engine is stuck, so a busy cell can't block a click."""
    gate = threading.Event()
    engine.top_tokens = lambda branches, k: gate.wait(10) and []
    explorer._receive(explorer, {"t": "cmd", "id": "slow", "op": "top", "node": 1, "args": {}}, [])
    assert forked(explorer, 2)["branches"]  # a quick command does not wait behind the slow one
    gate.set()


def test_selection_is_shared_with_python(explorer, engine):
    assert explorer.selected is None
    node = forked(explorer, 2)["nodes"][1]
    ok(explorer.simulate("select", node=node))
    assert explorer.selected is engine.branches[2]
    explorer.selected = engine.branches[0]
    assert explorer.selected is engine.branches[0]
    ok(explorer.simulate("select", node=node))
    engine.branches[2].prune()
    assert explorer.selected is None
    explorer.selected = None
    with pytest.raises(StaleBranch, match="another engine"):
        explorer.selected = type(engine)().prompt("other")


def test_only_the_chosen_root_is_shown(engine):
    first = engine.prompt("a b c d")
    engine.prompt("e f")
    (child,) = first.fork(at=2)
    child.extend(" x y", [-1.0, -2.0])
    (grandchild,) = child.fork()
    explorer = Explorer(engine, root=child)
    assert [(n.branch_id, n.text) for n in explorer.tree] == [(3, "a b x y"), (grandchild.id, "")]
    assert explorer.tree.of(child).mean_logprob == pytest.approx(-1.5)
    explorer.close()


def test_bad_arguments_are_refused(engine):
    other = type(engine)().prompt("x")
    with pytest.raises(InvalidArgument, match="not both"):
        Explorer(engine, "a", root=other)
    with pytest.raises(StaleBranch, match="another engine"):
        Explorer(engine, root=other)
    with pytest.raises(InvalidArgument, match="height"):
        Explorer(engine, height=10)
    with pytest.raises(InvalidArgument, match="max_tokens"):
        Explorer(engine, max_tokens=0)


def test_frames_reach_the_front_end_and_wait_for_its_answers(explorer, engine):
    sent, frame = [], threading.Event()

    def send(message, buffers=None):
        sent.append((message, buffers))
        if message["t"] == "frame":
            frame.set()

    explorer.send = send
    explorer._receive(explorer, {"t": "hello"}, [])
    assert frame.wait(5)
    header, buffers = next(pair for pair in sent if pair[0]["t"] == "frame")
    assert header["snapshot"]
    assert header["texts"] == ["Once upon a time there was"]
    assert len(buffers[0]) == header["count"] * len(header["cols"]) * 4
    assert header["totals"]["pages_total"] == engine.core.num_pages
    assert header["totals"]["kv_format"] == "fp32"
    assert header["totals"]["bytes_total"] == 1024 * 64


def test_without_a_front_end_there_is_a_text_tree_and_no_publisher_thread(explorer):
    forked(explorer, 2)
    data, _ = explorer._repr_mimebundle_()
    assert data["text/plain"].splitlines()[0].startswith('#1  [0:6] "Once upon')
    assert explorer._publisher._thread is None
    assert explorer._fallback.count("\n") == 2


def test_close_ends_the_threads(engine):
    explorer = Explorer(engine, "a b")
    explorer.simulate("fork", node=1)
    threads = explorer._desk._threads
    explorer.close()
    explorer.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_command_without_an_answer_times_out():
    gate = threading.Event()
    desk = CommandDesk(lambda command: gate.wait(10) and {}, frozenset(), lambda reply: None)
    with pytest.raises(CommandTimeout, match="not answered"):
        desk.call({"id": "a", "op": "fork"}, timeout=0.01)
    gate.set()
    desk.close()


def test_tree_views_read_and_refuse(explorer):
    forked(explorer, 2)
    tree = explorer.tree
    assert [node.id for node in tree.roots] == [1]
    assert len(tree.leaves) == 2
    assert tree.node(1).children == [n.id for n in tree.leaves]
    assert math.isnan(tree.node(1).mean_logprob)
    with pytest.raises(StaleBranch):
        tree.node(99)


SOURCES = [
    *sorted((REPOSITORY / "widgets/src").glob("*.ts")),
    REPOSITORY / "dendrite_lab/static/explorer.js",
]
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser"
    r"|\beval\s*\(|new Function|\bimport\s*\(|setHTML|srcdoc"
)
URL = re.compile(r"https?://(?!www\.w3\.org/2000/svg)")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_model_text_never_becomes_markup_and_nothing_is_fetched(path):
    text = path.read_text(encoding="utf-8")
    assert not FORBIDDEN.search(text)
    assert not URL.search(text)


QUIET = [
    "commands",
    "comm_guard",
    "explorer",
    "live_figure",
    "operations",
    "page_map",
    "panel",
    "plots",
    "protocol",
    "publisher",
    "runs",
    "search_view",
    "session",
    "text_tree",
    "tree_model",
    "tree_view",
]


def test_widgets_print_nothing():
    for name in QUIET:
        path = REPOSITORY / "dendrite_lab" / f"{name}.py"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "print" not in names, path.name
