"""A timeline of a run, as a file of Chrome trace events that opens in Perfetto (ui.perfetto.dev).

It owns the file, its tracks and the bound on its size. It must not know the engine: lanes are numbers, times are
arguments in seconds of one monotonic clock, and what they mean is up to who calls. Memory stays flat.

A stream pair is a process with pid = lane + 1, the scheduler is process 0. Each `Track` of a process is one thread, or
several: complete events of a thread may nest but not overlap in part, so spans that overlap get rows of their own,
"transfer", "transfer 2", and so on. Format: "Trace Event Format", Google, 2016; where it leaves a question open,
src/trace_processor/importers/json of Perfetto answers it.
"""

import enum
import hashlib
import json
import os
import pathlib
from typing import Any, Protocol

MAX_EVENTS = 200_000  # some 25 MB at 110 to 130 bytes each, which a browser still opens
ROWS = 1000  # threads that a track may spread over, and so the distance between the tids of two tracks
_NS = 1_000_000_000
_HEAD = '{"displayTimeUnit": "ms", "traceEvents": [\n'
_TAIL = "\n]}\n"


class Track(enum.Enum):
    """What a span is about. The value is the tid of the track's first row."""

    QUEUE = 1 * ROWS
    PREFILL = 2 * ROWS
    TRANSFER = 3 * ROWS
    DECODE = 4 * ROWS


class FlowPhase(enum.Enum):
    """Where a request's arrow begins, goes on and ends, as the format says it."""

    START = "s"
    STEP = "t"
    FINISH = "f"


class Tracer(Protocol):
    """Who is told what happens when. Times are seconds of one monotonic clock.

    A lane is the number of a stream pair, None the scheduler, which has the track QUEUE only.
    """

    def span(self, lane: int | None, track: Track, name: str, begin_s: float, end_s: float, **args: Any) -> None:
        """Report something that has ended. In order of `end_s` it takes the fewest rows, but any order is right."""
        ...

    def counter(self, lane: int | None, name: str, at_s: float, **values: float) -> None:
        """Report values that hold from now on."""
        ...

    def flow(self, request_id: str, phase: FlowPhase, lane: int | None, track: Track, at_s: float) -> None:
        """Lead a request's arrow through the span of this track that was reported last.

        A flow event binds to the slice that encloses it: report it right after its span, with
        `begin_s <= at_s < end_s`. A span of no length cannot hold one.
        """
        ...

    def instant(self, lane: int | None, track: Track, name: str, at_s: float, **args: Any) -> None:
        """Report something that takes no time."""
        ...

    def close(self) -> None:
        """End the trace; a second call does nothing."""
        ...


class NullTracer:
    """Takes everything and does nothing."""

    def span(self, lane: int | None, track: Track, name: str, begin_s: float, end_s: float, **args: Any) -> None:
        """Do nothing."""

    def counter(self, lane: int | None, name: str, at_s: float, **values: float) -> None:
        """Do nothing."""

    def flow(self, request_id: str, phase: FlowPhase, lane: int | None, track: Track, at_s: float) -> None:
        """Do nothing."""

    def instant(self, lane: int | None, track: Track, name: str, at_s: float, **args: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TraceWriter:
    """Writes a trace as it happens.

    The file is complete after every event, since Perfetto refuses the object form without its end: an event is written
    over the closing brackets, and these again behind it. So what is left of a run that was killed opens, too.

    Past the bound events are dropped, and a span that finds no row is. How many is said at close, in an instant of the
    queue at the first of them.
    """

    def __init__(self, path: str | os.PathLike[str], *, epoch_s: float, max_events: int = MAX_EVENTS):
        """Create the file, or empty it.

        Args:
          path: a regular file.
          epoch_s: the moment that the trace shows as 0; nothing may be earlier.
          max_events: bound on the events, names of tracks left out.

        Raises:
          OSError: it cannot be written. All methods raise it.
        """
        self.path = pathlib.Path(path)
        self._file = self.path.open("wb")
        self._end = 0  # of the last event, where the closing brackets begin
        self._epoch_s = epoch_s
        self._room = max_events
        self._dropped = 0
        self._first_dropped_ns = 0
        self._row_ends: dict[tuple[int, Track], list[int]] = {}  # end of the last span of each row, ns
        self._last_row: dict[tuple[int, Track], int | None] = {}  # of the last span; None: it was dropped
        self._named: set[tuple[int, int]] = set()  # pid and tid; the process itself has tid 0
        self._append(_HEAD)

    def __enter__(self) -> "TraceWriter":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file."""
        self.close()

    def span(self, lane: int | None, track: Track, name: str, begin_s: float, end_s: float, **args: Any) -> None:
        """Write a complete event in the first row of the track that is free at its beginning."""
        begin_ns, end_ns = self._ns(begin_s), self._ns(end_s)
        assert begin_ns <= end_ns, f"{name} ends before it begins"
        pid = _pid(lane, track)
        row = self._free_row((pid, track), begin_ns) if self._room else None
        self._last_row[pid, track] = row
        if row is None:
            self._drop(begin_ns)
            return
        self._row_ends[pid, track][row : row + 1] = [end_ns]
        event = {"ph": "X", "name": name, "pid": pid, "tid": self._tid(pid, track, row)}
        self._write(begin_ns, event | {"dur": (end_ns - begin_ns) / 1000, "args": args})

    def counter(self, lane: int | None, name: str, at_s: float, **values: float) -> None:
        """Write a counter event."""
        pid = _pid(lane, None)
        self._name_process(pid)
        self._write(self._ns(at_s), {"ph": "C", "name": name, "pid": pid, "args": values})

    def flow(self, request_id: str, phase: FlowPhase, lane: int | None, track: Track, at_s: float) -> None:
        """Write a flow event in the row of the track's last span; drop it where that was dropped."""
        at_ns, pid = self._ns(at_s), _pid(lane, track)
        row = self._last_row.get((pid, track))
        if row is None:
            self._drop(at_ns)
            return
        # Perfetto joins flow events of equal id, category and name.
        event = {"ph": phase.value, "name": "request", "cat": "request", "id": _flow_id(request_id)}
        event |= {"pid": pid, "tid": self._tid(pid, track, row)}
        self._write(at_ns, event if phase is FlowPhase.START else event | {"bp": "e"})

    def instant(self, lane: int | None, track: Track, name: str, at_s: float, **args: Any) -> None:
        """Write an instant event in the first row of the track."""
        pid = _pid(lane, track)
        event = {"ph": "i", "s": "t", "name": name, "pid": pid, "tid": self._tid(pid, track, 0)}
        self._write(self._ns(at_s), event | {"args": args})

    def close(self) -> None:
        """Say how much was dropped, and close the file; a second call does nothing."""
        if self._file.closed:
            return
        try:
            if self._dropped:
                event = {"ph": "i", "s": "t", "name": "events are missing from here on", "pid": 0}
                event |= {"tid": self._tid(0, Track.QUEUE, 0), "ts": self._first_dropped_ns / 1000}
                self._append_event(event | {"args": {"dropped": self._dropped}})
        finally:
            self._file.close()

    def _ns(self, at_s: float) -> int:
        """Nanoseconds since the epoch: spans that meet in seconds still meet when rounded."""
        return round((at_s - self._epoch_s) * _NS)

    def _free_row(self, key: tuple[int, Track], begin_ns: int) -> int | None:
        """Return the first row whose last span has ended by then, a new one if need be; None when there are too many.

        Spans of a row follow each other in time, in whatever order all of them come.
        """
        ends = self._row_ends.setdefault(key, [])
        row = next((row for row, end_ns in enumerate(ends) if end_ns <= begin_ns), len(ends))
        return row if row < ROWS else None

    def _tid(self, pid: int, track: Track, row: int) -> int:
        """Thread of a row, which gets its name when it is first used."""
        tid = track.value + row
        if (pid, tid) not in self._named:
            self._name_process(pid)
            self._named.add((pid, tid))
            name = track.name.lower()
            self._metadata(pid, tid, "thread_name", name=f"{name} {row + 1}" if row else name)
            self._metadata(pid, tid, "thread_sort_index", sort_index=tid)
        return tid

    def _name_process(self, pid: int) -> None:
        if (pid, 0) not in self._named:
            self._named.add((pid, 0))
            self._metadata(pid, 0, "process_name", name=f"stream pair {pid - 1}" if pid else "scheduler")
            self._metadata(pid, 0, "process_sort_index", sort_index=pid)

    def _metadata(self, pid: int, tid: int, kind: str, **args: str | int) -> None:
        self._append_event({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": args})

    def _write(self, at_ns: int, event: dict[str, Any]) -> None:
        """Add an event if there is room."""
        if not self._room:
            self._drop(at_ns)
            return
        self._append_event(event | {"ts": at_ns / 1000})
        self._room -= 1

    def _drop(self, at_ns: int) -> None:
        self._first_dropped_ns = min(self._first_dropped_ns, at_ns) if self._dropped else at_ns
        self._dropped += 1

    def _append_event(self, event: dict[str, Any]) -> None:
        """Add an event. It is ASCII, so that a character is a byte.

        Raises:
          ValueError: a number in it is not finite, which JSON cannot hold.
        """
        if self._file.closed:
            return
        separator = ",\n" if self._end > len(_HEAD) else ""
        self._append(separator + json.dumps(event, allow_nan=False))

    def _append(self, text: str) -> None:
        self._file.seek(self._end)
        self._file.write((text + _TAIL).encode())
        self._file.flush()
        self._end += len(text)


def _pid(lane: int | None, track: Track | None) -> int:
    assert lane is not None or track in (None, Track.QUEUE), f"the scheduler has no track {track}"
    return 0 if lane is None else lane + 1


def _flow_id(request_id: str) -> int:
    """Stable number of a request, below the 2**53 that JSON readers keep exactly; 48 bits do not collide in practice.

    Request ids may hold half a surrogate pair, from JSON input.
    """
    digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest, "big")
