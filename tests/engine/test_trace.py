"""The event log: one record a step for all its tokens, and still one event a token for readers."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from dendrite_engine.trace import Trace


def log_tokens(trace: Trace, ids: list[int], tokens: list[int]) -> None:
    trace.append_tokens(
        np.array(ids, np.int64), np.array(tokens, np.int32), np.full(len(ids), -0.5, np.float32)
    )


@pytest.fixture
def trace() -> Trace:
    """prompt, tokens of 1 and 2, fork, no token, tokens of 1, 2 and 3."""
    trace = Trace()
    trace.append("prompt", 1, {"tokens": [7]})
    log_tokens(trace, [1, 2], [10, 20])
    trace.append("fork", 3, {"parent": 1, "position": 2})
    log_tokens(trace, [], [])
    log_tokens(trace, [1, 2, 3], [11, 21, 31])
    return trace


def test_a_step_reads_as_one_extend_event_per_token(trace):
    events = trace.since(0)
    assert len(events) == len(trace) == 7
    assert [(e.kind, e.branch_id) for e in events] == [
        ("prompt", 1), ("extend", 1), ("extend", 2), ("fork", 3),
        ("extend", 1), ("extend", 2), ("extend", 3),
    ]  # fmt: skip
    assert events[2].data == {"tokens": [20], "logprobs": [-0.5], "forced": False}
    assert [e.t_ns for e in events] == sorted(e.t_ns for e in events)


@pytest.mark.parametrize("seq", range(-8, 10))
def test_reading_may_begin_at_any_number(trace, seq):
    events = trace.since(0)
    assert trace.since(seq) == events[seq:]
    assert list(trace) == events


def test_numbers_stay_the_same_while_the_log_grows(trace):
    seen = trace.since(0)
    for step in range(20):
        log_tokens(trace, [1, 2], [step, step])
        trace.append("job", 0, {"state": "finish"})
        new = trace.since(len(seen))
        assert len(new) == 3
        seen += new
    assert trace.since(0) == seen


def test_json_lines_number_every_token(trace):
    header, *lines = [json.loads(line) for line in trace.to_jsonl().splitlines()]
    assert header == {"schema": "dendrite-trace", "version": 1}
    assert [line["seq"] for line in lines] == list(range(7))
    assert lines[1]["tokens"] == [10]
    assert lines[6]["branch"] == 3


def test_threads_may_append_while_others_read():
    trace = Trace()
    done = threading.Event()
    lengths: list[int] = []

    def write(branch: int) -> None:
        for i in range(300):
            log_tokens(trace, [branch] * (i % 4), list(range(i % 4)))
            trace.append("fork", branch, {"i": i})

    def read() -> None:
        seen: list = []
        while not (done.is_set() and len(seen) == len(trace)):
            seen += trace.since(len(seen))
        lengths.append(len(seen))
        assert seen == trace.since(0)

    writers = [threading.Thread(target=write, args=(branch,)) for branch in (1, 2, 3)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert lengths == [3 * (300 + 75 * 6)] * 2
    for branch in (1, 2, 3):
        forks = [e.data["i"] for e in trace if e.branch_id == branch and e.kind == "fork"]
        assert forks == list(range(300))
