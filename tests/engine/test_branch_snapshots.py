"""Branches saved to a file and made again: same tokens, same pages shared, same draws."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest

from dendrite_engine import SamplingParams
from dendrite_engine.errors import InvalidArgument, OutOfPages, SnapshotRejected, StaleBranch
from dendrite_engine.snapshots import container
from dendrite_engine.snapshots.container import read_snapshot, write_snapshot

PROMPT = list(range(5, 45))
DRAWN = SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True)


def grown(engine):
    """A small tree: a root with generated tokens, two forks, a fork inside one, a rollback."""
    root = engine.prompt(PROMPT)
    engine.complete(root, DRAWN)
    a, b = root.fork(2)
    engine.complete([a, b], DRAWN)
    c = a.fork(at=44)[0]
    c.extend([7, 8, 9])
    engine.complete(c, DRAWN)
    b.rollback(4)
    a.label = "left"
    return root, a, b, c


def picture(branch):
    return branch.token_ids, branch.logprobs, branch.label, branch.path_key


def test_branches_come_back_with_tokens_logprobs_labels_and_order(make_engine, tmp_path):
    engine, other = make_engine(), make_engine()
    root, a, b, c = grown(engine)
    path = tmp_path / "tree.safetensors"
    written = engine.save(path, [c, root, b, a])
    found = other.load(path)
    assert [picture(x) for x in found] == [picture(x) for x in (c, root, b, a)]
    assert written["bytes"] == path.stat().st_size
    assert written["tokens"] < 49 + 30  # shared prefixes once, not 4 paths of 50 and more


def test_loaded_branches_share_pages_as_the_saved_ones_did(make_engine, tmp_path):
    engine, other = make_engine(), make_engine()
    branches = grown(engine)
    engine.save(tmp_path / "t", branches)
    other.load(tmp_path / "t")
    assert other.stats().pages_live <= engine.stats().pages_live
    alone = -(-branches[0].num_tokens // 16)
    assert other.stats().pages_live < 4 * alone
    assert [b.num_tokens for b in other.branches] == [b.num_tokens for b in engine.branches]


def test_a_loaded_branch_goes_on_and_forks_on_with_the_draws_of_the_saved_one(
    make_engine, tmp_path
):
    engine, other = make_engine(), make_engine()
    branches = grown(engine)
    engine.save(tmp_path / "t", branches)
    loaded = other.load(tmp_path / "t")

    def futures(host, all_branches):
        forks = [branch.fork()[0] for branch in all_branches]
        done = host.complete([*all_branches, *forks], DRAWN)
        return [(d.token_ids, np.round(d.logprobs, 4).tolist()) for d in done]

    assert futures(engine, branches) == futures(other, loaded)


def test_branches_without_their_common_root_still_share_it(make_engine, tmp_path):
    engine, other = make_engine(), make_engine()
    root = engine.prompt(PROMPT)
    a, b = root.fork(2)
    engine.complete([a, b], DRAWN)
    root.prune()
    engine.save(tmp_path / "t", [a, b])
    other.load(tmp_path / "t")
    assert other.stats().pages_shared >= 40 // 16
    assert other.stats().pages_live <= engine.stats().pages_live


def test_a_single_branch_and_branches_of_several_prompts_can_be_saved(make_engine, tmp_path):
    engine, other = make_engine(), make_engine()
    one, two = engine.prompt([3, 4, 5]), engine.prompt([9, 8])
    engine.save(tmp_path / "t", two)
    assert [b.token_ids for b in other.load(tmp_path / "t")] == [[9, 8]]
    engine.save(tmp_path / "t", [two, one])
    assert [b.token_ids for b in other.load(tmp_path / "t")] == [[9, 8], [3, 4, 5]]


def test_what_can_not_be_saved_is_refused(make_engine, tmp_path):
    engine, other = make_engine(), make_engine()
    branch = engine.prompt([1, 2])
    gone = branch.fork()[0]
    gone.prune()
    with pytest.raises(InvalidArgument, match="at least one"):
        engine.save(tmp_path / "t", [])
    with pytest.raises(InvalidArgument, match="twice"):
        engine.save(tmp_path / "t", [branch, branch])
    with pytest.raises(StaleBranch):
        engine.save(tmp_path / "t", [gone])
    with pytest.raises(StaleBranch):
        other.save(tmp_path / "t", [branch])
    assert list(tmp_path.iterdir()) == []


def untouched(engine, path, field):
    """Loading is refused, the error names the field, and no page was touched."""
    before = engine.core.stats()
    with pytest.raises(SnapshotRejected) as caught:
        engine.load(path)
    assert caught.value.field == field
    assert field in str(caught.value)
    assert engine.core.stats() == before


def test_a_truncated_file_is_refused_wherever_it_ends(make_engine, tmp_path):
    engine = make_engine()
    engine.save(tmp_path / "t", grown(engine))
    data = (tmp_path / "t").read_bytes()
    for size in [*range(0, len(data), 97), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:size])
        untouched(engine, tmp_path / "cut", "length")
    (tmp_path / "cut").write_bytes(data + b"x")
    untouched(engine, tmp_path / "cut", "length")


def test_a_flipped_bit_is_noticed_wherever_it_is(make_engine, tmp_path):
    engine = make_engine()
    engine.save(tmp_path / "t", grown(engine))
    data = (tmp_path / "t").read_bytes()
    before = engine.core.stats()
    for index in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[index] ^= 1 << (index % 8)
        (tmp_path / "flip").write_bytes(flipped)
        with pytest.raises(SnapshotRejected):
            engine.load(tmp_path / "flip")
    assert engine.core.stats() == before


def rewritten(path, change, kind="branches"):
    """The file with its body changed and a checksum that fits."""
    snapshot = read_snapshot(path, kind)
    change(snapshot.body, snapshot.arrays)
    write_snapshot(path, kind, snapshot.body, snapshot.arrays)


def test_another_model_seed_version_or_kind_is_refused_by_name(make_engine, tmp_path, monkeypatch):
    engine = make_engine()
    path = tmp_path / "t"
    engine.save(path, grown(engine))
    untouched(make_engine("qwen3"), path, "model")
    untouched(make_engine(seed=5), path, "engine.seed")
    write_snapshot(tmp_path / "k", "search", {}, {})
    untouched(engine, tmp_path / "k", "kind")
    monkeypatch.setattr(container, "SCHEMA", 2)
    engine.save(path, engine.branches)
    monkeypatch.undo()
    untouched(engine, path, "schema")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda body, arrays: body.pop("engine"), "engine"),
        (lambda body, arrays: body.update(branches=[]), "branches"),
        (lambda body, arrays: body["branches"][1].update(source=1), "branches[1]"),
        (lambda body, arrays: body["branches"][1].update(shared=1000), "branches[1]"),
        (lambda body, arrays: body["branches"][2].update(label=None), "branches[2]"),
        (lambda body, arrays: body["branches"][0].update(added=3), "branches[1]"),
        (lambda body, arrays: body.update(order=[0, 0, 1, 2]), "order"),
        (lambda body, arrays: arrays.pop("tokens"), "tokens"),
        (lambda body, arrays: arrays.update(tokens=arrays["tokens"] + 10**6), "tokens"),
        (lambda body, arrays: arrays.update(logprobs=arrays["logprobs"][1:]), "logprobs"),
        (lambda body, arrays: arrays.update(tokens=arrays["tokens"].astype("int64")), "tokens"),
    ],
)
def test_a_body_that_does_not_add_up_is_refused_by_field(make_engine, tmp_path, change, field):
    engine = make_engine()
    path = tmp_path / "t"
    engine.save(path, grown(engine))
    rewritten(path, change)
    untouched(engine, path, field)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "length"),
        (b"\xff" * 40, "length"),
        (struct.pack("<Q", 4) + b"nope", "format"),
        (struct.pack("<Q", 2) + b"{}", "format"),
        (struct.pack("<Q", 22) + b'{"__metadata__":{"a":1}}'[:22], "format"),
    ],
)
def test_a_file_of_another_format_is_refused(make_engine, tmp_path, data, field):
    (tmp_path / "x").write_bytes(data)
    untouched(make_engine(), tmp_path / "x", field)


def test_a_model_file_is_no_snapshot(make_engine):
    engine = make_engine()
    untouched(engine, engine.model_path / "model.safetensors", "format")


def test_a_missing_file_is_named(make_engine, tmp_path):
    with pytest.raises(InvalidArgument, match="no file"):
        make_engine().load(tmp_path / "none")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_file_whole(make_engine, tmp_path, monkeypatch, call):
    engine = make_engine()
    a, b = engine.prompt([1, 2, 3]).fork(2)
    path = tmp_path / "t"
    engine.save(path, a)
    before = path.read_bytes()
    b.extend([5])

    def crash(*args):
        raise OSError(28, "no space left")

    if call == "write":
        monkeypatch.setattr(os, "fdopen", crash)
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", crash)
    else:
        monkeypatch.setattr(container.Path, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        engine.save(path, b)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_tree_that_does_not_fit_leaves_nothing(make_engine, tmp_path):
    engine = make_engine()
    engine.save(tmp_path / "t", grown(engine))
    small = make_engine(num_pages=5)
    with pytest.raises(OutOfPages):
        small.load(tmp_path / "t")
    assert small.branches == []
    assert small.stats().pages_live == 0


def test_the_body_is_plain_json_that_other_tools_can_read(make_engine, tmp_path):
    from safetensors.numpy import load_file

    engine = make_engine()
    engine.save(tmp_path / "t.safetensors", engine.prompt([1, 2, 3]))
    tensors = load_file(tmp_path / "t.safetensors")
    assert json.loads(tensors["body"].tobytes())["branches"][0]["added"] == 3
    assert tensors["tokens"].tolist() == [1, 2, 3]
