"""The wire format: packing, frames, and what a command may look like."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dendrite_engine.errors import InvalidArgument
from dendrite_lab import protocol
from dendrite_lab.protocol import NodeRow

ROW = NodeRow(3, 1, -2, 5, 9, 7, 2, 4, 1, 3, 12, -1.5, -0.25, 0.5, math.nan)


def test_rows_survive_packing():
    (back,) = protocol.unpack(1, protocol.pack([ROW]))
    assert back[:-1] == ROW[:-1]
    assert math.isnan(back.uct)


def test_no_rows_pack_to_nothing():
    assert protocol.pack([]) == b""
    assert protocol.unpack(0, b"") == []


def test_a_frame_is_a_json_header_and_four_bytes_a_value():
    frame = protocol.frame(7, [ROW, ROW], ["a", "b"], removed=[4], extra={"totals": {"x": 1}})
    header = json.loads(json.dumps(frame.header))
    assert (header["seq"], header["count"], header["removed"]) == (7, 2, [4])
    assert len(frame.columns) == 2 * len(protocol.COLUMNS) * 4
    assert len(header["texts"]) == 2


def test_the_front_end_knows_every_column_and_flag():
    source = (Path(__file__).parents[2] / "widgets/src/protocol.ts").read_text(encoding="utf-8")
    for name, _ in protocol.COLUMNS:
        assert f"{name}: [" in source
    for name in ("ALIVE", "STREAMING", "TIP", "ROOT", "ERROR", "BEST"):
        assert f"{name} = {getattr(protocol, name)};" in source
    for reason in protocol.FINISH_REASONS:
        assert f'"{reason}",' in source


def test_a_good_command_is_taken():
    command = protocol.parse_command({"id": "a-1", "op": "fork", "node": 3, "args": {"count": 2}})
    assert (command.id, command.op, command.node) == ("a-1", "fork", 3)
    assert command.args == {"count": 2}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"id": "", "op": "fork"},
        {"id": "x" * 65, "op": "fork"},
        {"id": 5, "op": "fork"},
        {"id": "a", "op": "__class__"},
        {"id": "a", "op": ["fork"]},
        {"id": "a", "op": "fork", "node": "1"},
        {"id": "a", "op": "fork", "node": -1},
        {"id": "a", "op": "fork", "node": True},
        {"id": "a", "op": "fork", "args": [1]},
    ],
)
def test_a_malformed_command_is_refused(content):
    with pytest.raises(InvalidArgument):
        protocol.parse_command(content)


@pytest.mark.parametrize("value", ["3", 0, 10, None, True, 1.5, float("nan"), [1]])
def test_integers_are_checked(value):
    with pytest.raises(InvalidArgument, match="count must be"):
        protocol.integer({"count": value}, "count", 1, 1, 9)


def test_javascript_integers_may_come_as_floats():
    assert protocol.integer({"count": 3.0}, "count", 1, 1, 9) == 3


@pytest.mark.parametrize("value", ["1", -0.1, float("inf"), float("nan"), None, False])
def test_numbers_are_checked(value):
    with pytest.raises(InvalidArgument, match="temperature must be"):
        protocol.number({"temperature": value}, "temperature", 1.0, 0.0)


def test_text_must_be_text_of_bounded_length():
    with pytest.raises(InvalidArgument, match="must be a string"):
        protocol.text({"text": 5})
    with pytest.raises(InvalidArgument, match="characters"):
        protocol.text({"text": "x" * (protocol.MAX_TEXT + 1)})


def test_every_operation_of_the_protocol_exists():
    from dendrite_lab.operations import SLOW, Operations

    assert all(hasattr(Operations, f"_op_{op}") for op in protocol.OPS)
    assert SLOW <= protocol.OPS
