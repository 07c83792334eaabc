"""Publishing: coalescing, sequence numbers, back-pressure, snapshots, failures."""

from __future__ import annotations

import queue
import threading

import pytest

from dendrite_lab.protocol import NodeRow
from dendrite_lab.publisher import FRAMES_IN_FLIGHT, Publisher


def row(node, end):
    return NodeRow(node, 0, node, 0, end, 5, 0, 1, 1, 1, 0, -1.0, -1.0, 0.0, 0.0)


class Source:
    """Marks changes the way a session does: one entry a node, newest value wins."""

    def __init__(self):
        self.totals = {}
        self.all = {}
        self.marked = {}
        self.collected = 0

    def write(self, node, end):
        self.all[node] = self.marked[node] = row(node, end)

    def collect(self, *, snapshot):
        self.collected += 1
        rows = list((self.all if snapshot else self.marked).values())
        self.marked = {}
        return rows, ["" for _ in rows], []


@pytest.fixture
def sent():
    return []


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def publisher(source, sent):
    made = Publisher(source, sent.append, lambda error: None)
    made._start = lambda: None  # ticked by hand
    return made


def test_nothing_is_sent_or_collected_before_a_front_end_says_hello(publisher, source, sent):
    source.write(1, 1)
    assert not publisher.tick()
    assert (sent, source.collected) == ([], 0)


def test_hello_is_answered_with_everything(publisher, source, sent):
    source.write(1, 1)
    source.write(2, 1)
    publisher.hello()
    assert publisher.tick()
    assert sent[0].header["snapshot"]
    assert sent[0].header["count"] == 2


def test_many_changes_of_a_node_become_one_row_with_the_newest_value(publisher, source, sent):
    publisher.hello()
    publisher.tick()
    for end in range(1, 1000):
        source.write(1, end)
    publisher.tick()
    assert sent[-1].header["count"] == 1
    assert sent[-1].columns[16:20] == (999).to_bytes(4, "little")


def test_sequence_numbers_have_no_gaps(publisher, source, sent):
    publisher.hello()
    for end in range(5):
        source.write(1, end)
        publisher.tick()
        publisher.ack(sent[-1].header["seq"])
    assert [frame.header["seq"] for frame in sent] == [1, 2, 3, 4, 5]


def test_a_front_end_that_never_answers_gets_two_frames_and_costs_nothing_more(
    publisher, source, sent
):
    publisher.hello()
    for end in range(10_000):
        source.write(end % 7, end)
        publisher.tick()
    assert len(sent) == FRAMES_IN_FLIGHT
    assert publisher.in_flight == FRAMES_IN_FLIGHT
    assert len(source.marked) <= 7
    assert source.collected == FRAMES_IN_FLIGHT


def test_an_answer_lets_the_next_frame_go_with_all_that_was_missed(publisher, source, sent):
    publisher.hello()
    for end in range(20):
        source.write(end, end)
        publisher.tick()
    publisher.ack(sent[-1].header["seq"])
    assert publisher.tick()
    assert sent[-1].header["count"] == 18


def test_an_answer_to_a_frame_never_sent_is_no_credit(publisher, source, sent):
    publisher.hello()
    publisher.ack(10**9)
    for end in range(20):
        source.write(1, end)
        publisher.tick()
    assert len(sent) == FRAMES_IN_FLIGHT


def test_a_gap_is_answered_with_a_snapshot_at_once(publisher, source, sent):
    publisher.hello()
    for end in range(5):
        source.write(end, end)
        publisher.tick()
    publisher.want_snapshot()
    assert publisher.tick()
    assert sent[-1].header["snapshot"]
    assert sent[-1].header["count"] == 5


def test_nothing_new_sends_nothing_but_new_totals_do(publisher, source, sent):
    publisher.hello()
    publisher.tick()
    publisher.ack(1)
    assert not publisher.tick()
    source.totals = {"pages_live": 3}
    assert publisher.tick()
    assert sent[-1].header["totals"] == {"pages_live": 3}


def test_the_thread_publishes_and_stops(source):
    frames = queue.SimpleQueue()
    publisher = Publisher(source, frames.put, lambda error: None)
    source.write(1, 1)
    publisher.hello()
    assert frames.get(timeout=5).header["seq"] == 1
    publisher.ack(1)
    source.write(1, 2)
    publisher.kick()
    assert frames.get(timeout=5).header["seq"] == 2
    publisher.close()
    assert not any(t.name == "dendrite-lab publisher" for t in threading.enumerate())


def test_quiet_moments_are_told(source):
    quiet = threading.Event()
    publisher = Publisher(source, lambda frame: None, lambda error: None, idle=quiet.set)
    publisher.hello()
    assert quiet.wait(5)
    publisher.close()


def test_an_error_stops_publishing_and_is_told():
    class Broken(Source):
        def collect(self, *, snapshot):
            raise RuntimeError("describe failed")

    told = queue.SimpleQueue()
    publisher = Publisher(Broken(), lambda frame: None, told.put)
    publisher.hello()
    assert "describe failed" in str(told.get(timeout=5))
    assert isinstance(publisher.error, RuntimeError)
    publisher.close()
