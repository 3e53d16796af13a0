"""The trace as Perfetto reads it: structure, rows without overlap, arrows, the bound, and a run that was killed."""

import collections
import contextlib
import inspect
import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve import trace
from streamserve.trace import FlowPhase, NullTracer, Tracer, TraceWriter, Track

EPOCH_S = 100.0
METHODS = ("span", "counter", "flow", "instant", "close")


def read(path) -> list[dict]:
    """Load a trace, and check what holds of each: one JSON object, and events of known phases."""
    value = json.loads(pathlib.Path(path).read_text())
    assert set(value) == {"traceEvents", "displayTimeUnit"}
    assert value["displayTimeUnit"] == "ms"
    assert {event["ph"] for event in value["traceEvents"]} <= set("XCistfM")
    return value["traceEvents"]


def of_phase(events, phases):
    return [event for event in events if event["ph"] in phases]


def names(events, kind):
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in of_phase(events, "M") if e["name"] == kind}


def write_request(writer, request_id="a", lane=0, begin_s=EPOCH_S):
    writer.span(None, Track.QUEUE, request_id, begin_s, begin_s + 1)
    writer.flow(request_id, FlowPhase.START, None, Track.QUEUE, begin_s)
    writer.span(lane, Track.PREFILL, "prefill", begin_s + 1, begin_s + 2, tokens=7)
    writer.flow(request_id, FlowPhase.STEP, lane, Track.PREFILL, begin_s + 1)
    writer.span(lane, Track.TRANSFER, request_id, begin_s + 2, begin_s + 3)
    writer.flow(request_id, FlowPhase.STEP, lane, Track.TRANSFER, begin_s + 2)
    writer.span(lane, Track.DECODE, "tick", begin_s + 3, begin_s + 4)
    writer.flow(request_id, FlowPhase.FINISH, lane, Track.DECODE, begin_s + 3)


def test_times_are_microseconds_since_the_epoch(tmp_path):
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S) as writer:
        writer.span(1, Track.PREFILL, "prefill", 100.5, 100.7500012346, tokens=7, prompts=["a", "b"])
        writer.counter(1, "pages", 101.0, free=3, used=1.5)
        writer.counter(None, "waiting", 101.0, requests=2)
        writer.instant(None, Track.QUEUE, "cancelled", 102.0, request="a")
    span, pages, waiting, instant = of_phase(read(tmp_path / "t.json"), "XCi")
    assert span == {
        "ph": "X", "name": "prefill", "pid": 2, "tid": Track.PREFILL.value, "ts": 500_000.0, "dur": 250_001.235,
        "args": {"tokens": 7, "prompts": ["a", "b"]},
    }  # fmt: skip
    assert pages == {"ph": "C", "name": "pages", "pid": 2, "ts": 1_000_000.0, "args": {"free": 3, "used": 1.5}}
    assert waiting["pid"] == 0
    assert instant == {
        "ph": "i", "s": "t", "name": "cancelled", "pid": 0, "tid": Track.QUEUE.value, "ts": 2_000_000.0,
        "args": {"request": "a"},
    }  # fmt: skip


def test_processes_and_threads_have_names_before_their_events(tmp_path):
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S) as writer:
        write_request(writer, lane=2)
        writer.counter(5, "pages", EPOCH_S, free=1)
        write_request(writer, lane=2, begin_s=EPOCH_S + 9)
    events = read(tmp_path / "t.json")
    assert names(events, "process_name") == {(0, 0): "scheduler", (3, 0): "stream pair 2", (6, 0): "stream pair 5"}
    assert names(events, "thread_name") == {
        (0, 1000): "queue", (3, 2000): "prefill", (3, 3000): "transfer", (3, 4000): "decode",
    }  # fmt: skip
    assert len(of_phase(events, "M")) == 2 * (3 + 4), "each is named once, with its place in the order"
    order = {(e["pid"], e["tid"]): e["args"]["sort_index"] for e in events if e["name"].endswith("sort_index")}
    assert order == {key: key[1] or key[0] for key in order}
    seen = set()
    for event in events:
        if event["ph"] == "M":
            seen |= {event["pid"], (event["pid"], event["tid"])}
        else:
            assert event["pid"] in seen
            assert "tid" not in event or (event["pid"], event["tid"]) in seen


def test_spans_that_overlap_get_rows_and_rows_are_used_again(tmp_path):
    with TraceWriter(tmp_path / "t.json", epoch_s=0.0) as writer:
        for name, begin_s, end_s in (("a", 0, 2), ("b", 1, 3), ("c", 1, 4), ("d", 2, 5), ("e", 3, 3), ("f", 5, 6)):
            writer.span(0, Track.TRANSFER, name, begin_s, end_s)
        writer.span(1, Track.TRANSFER, "elsewhere", 0, 9)
        writer.span(0, Track.PREFILL, "another track", 0, 9)
    events = read(tmp_path / "t.json")
    rows = {event["name"]: event["tid"] for event in of_phase(events, "X")}
    assert rows == {
        "a": 3000, "b": 3001, "c": 3002, "d": 3000, "e": 3001, "f": 3000, "elsewhere": 3000, "another track": 2000,
    }  # fmt: skip
    assert [names(events, "thread_name")[1, 3000 + row] for row in range(3)] == ["transfer", "transfer 2", "transfer 3"]


moments = st.floats(min_value=0, max_value=1e5, allow_subnormal=False) | st.integers(0, 12).map(float)
spans = st.tuples(
    st.sampled_from([(None, Track.QUEUE), *((lane, track) for lane in (0, 1) for track in Track)]),
    st.tuples(moments, moments).map(sorted),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(spans, max_size=40))
def test_spans_of_a_thread_never_overlap_whatever_their_order(reported):
    with tempfile.TemporaryDirectory() as folder:
        with TraceWriter(f"{folder}/t.json", epoch_s=0.0) as writer:
            for (lane, track), (begin_s, end_s) in reported:
                writer.span(lane, track, "x", begin_s, end_s)
        written = of_phase(read(f"{folder}/t.json"), "X")
    assert len(written) == len(reported)
    threads = collections.defaultdict(list)
    for event in written:
        begin_ns = round(1000 * event["ts"])
        threads[event["pid"], event["tid"]].append((begin_ns, begin_ns + round(1000 * event["dur"])))
    for thread in threads.values():
        thread.sort()
        for (_, end_ns), (begin_ns, _) in itertools.pairwise(thread):
            assert end_ns <= begin_ns


def test_arrows_lead_through_the_spans_of_their_request(tmp_path):
    ids = ("a", "b", "half a pair \ud83d")
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S) as writer:
        for number, request_id in enumerate(ids):
            write_request(writer, request_id, begin_s=EPOCH_S + number / 4)
    events = read(tmp_path / "t.json")
    arrows = collections.defaultdict(list)
    for event in of_phase(events, "stf"):
        assert (event["name"], event["cat"]) == ("request", "request"), "Perfetto joins by id, category and name"
        assert event.get("bp") == (None if event["ph"] == "s" else "e")
        arrows[event["id"]].append(event)
    assert len(arrows) == len(ids)
    assert all(isinstance(number, int) and 0 <= number < 2**53 for number in arrows)
    for arrow in arrows.values():
        assert [event["ph"] for event in arrow] == ["s", "t", "t", "f"]
    for index, event in enumerate(events):
        if event["ph"] in "stf":
            span = events[index - 1] if events[index - 1]["ph"] == "X" else None
            assert span is not None, "the span comes first, since Perfetto reads events of one time in file order"
            assert (event["pid"], event["tid"]) == (span["pid"], span["tid"])
            assert span["ts"] <= event["ts"] < span["ts"] + span["dur"]


def test_a_request_has_the_same_number_in_every_run():
    assert trace._flow_id("request 7") == 30_157_934_736_294


def test_beyond_the_bound_events_are_dropped_and_counted(tmp_path):
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S, max_events=4) as writer:
        for number in range(3):
            write_request(writer, str(number), begin_s=EPOCH_S + 10 * number)
        writer.counter(7, "pages", EPOCH_S + 30, free=1)
        writer.instant(0, Track.DECODE, "failed", EPOCH_S + 30)
    events = read(tmp_path / "t.json")
    assert len(of_phase(events, "XCistf")) == 4 + 1
    note = events[-1]
    assert (note["ph"], note["pid"], note["tid"]) == ("i", 0, Track.QUEUE.value)
    assert note["args"] == {"dropped": 3 * 8 + 2 - 4}
    assert note["ts"] == 2_000_000.0, "at the first event that is missing"


def test_a_trace_with_nothing_dropped_says_nothing(tmp_path):
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S, max_events=8) as writer:
        write_request(writer)
    assert not of_phase(read(tmp_path / "t.json"), "i")


def test_a_span_without_a_row_is_dropped_and_so_is_its_arrow(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "ROWS", 2)
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S) as writer:
        for number in range(3):
            writer.span(None, Track.QUEUE, str(number), EPOCH_S, EPOCH_S + 5)
            writer.flow(str(number), FlowPhase.START, None, Track.QUEUE, EPOCH_S)
        writer.span(None, Track.QUEUE, "later", EPOCH_S + 5, EPOCH_S + 6)
        writer.flow("x", FlowPhase.STEP, 0, Track.DECODE, EPOCH_S)
    events = read(tmp_path / "t.json")
    assert [event["name"] for event in of_phase(events, "X")] == ["0", "1", "later"]
    assert [event["tid"] for event in of_phase(events, "s")] == [1000, 1001]
    assert events[-1]["args"] == {"dropped": 3}, "a span, its arrow, and an arrow without a span"


def test_a_file_that_was_never_closed_is_complete(tmp_path):
    """Perfetto refuses an object without its end; Chrome's array form, which it takes, has no place for the unit."""
    writer = TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S)
    assert read(tmp_path / "t.json") == []
    for number in range(5):
        write_request(writer, str(number), begin_s=EPOCH_S + number)
        assert len(of_phase(read(tmp_path / "t.json"), "Xstf")) == 8 * (number + 1)
    before = (tmp_path / "t.json").read_bytes()
    writer.close()
    assert (tmp_path / "t.json").read_bytes() == before


def test_a_killed_run_leaves_a_trace_that_loads(tmp_path):
    code = (
        "import os, runpy, sys; names = runpy.run_path(sys.argv[1])\n"  # the file alone: importing JAX takes seconds
        "writer = names['TraceWriter'](sys.argv[2], epoch_s=0.0)\n"
        "[writer.span(0, names['Track'].DECODE, 'tick', t, t + 1) for t in range(100)]\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, trace.__file__, str(tmp_path / "t.json")], check=False)
    assert killed.returncode == -9
    assert len(of_phase(read(tmp_path / "t.json"), "X")) == 100


def test_a_number_that_json_cannot_hold_is_refused_and_the_file_stays_good(tmp_path):
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S) as writer:
        with pytest.raises(ValueError, match="not JSON compliant"):
            writer.counter(0, "pages", EPOCH_S, free=float("nan"))
        write_request(writer)
    assert len(of_phase(read(tmp_path / "t.json"), "XCstf")) == 8


def test_closing_twice_is_once_and_an_exception_closes(tmp_path):
    writer = TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S, max_events=0)
    writer.instant(None, Track.QUEUE, "cancelled", EPOCH_S)
    writer.close()
    writer.close()
    assert len(of_phase(read(tmp_path / "t.json"), "i")) == 1
    path = tmp_path / "u.json"
    with contextlib.suppress(KeyboardInterrupt), TraceWriter(path, epoch_s=EPOCH_S, max_events=1) as writer:
        write_request(writer)
        raise KeyboardInterrupt
    assert read(path)[-1]["args"] == {"dropped": 7}


def test_only_the_queue_belongs_to_no_pair_and_time_runs_forward(tmp_path):
    with TraceWriter(tmp_path / "t.json", epoch_s=EPOCH_S) as writer:
        for track in set(Track) - {Track.QUEUE}:
            with pytest.raises(AssertionError, match="the scheduler has no track"):
                writer.span(None, track, "x", EPOCH_S, EPOCH_S)
        with pytest.raises(AssertionError, match="ends before it begins"):
            writer.span(0, Track.DECODE, "x", EPOCH_S + 1, EPOCH_S)


def test_all_tracers_have_the_same_methods():
    for method in METHODS:
        signatures = [inspect.signature(getattr(kind, method)) for kind in (Tracer, NullTracer, TraceWriter)]
        assert signatures[0] == signatures[1] == signatures[2], method
    assert {name for name in vars(NullTracer) if not name.startswith("_")} == set(METHODS)
    nothing = NullTracer()
    write_request(nothing)
    nothing.close()
