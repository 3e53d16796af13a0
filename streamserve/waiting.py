"""The waiting queue: bounded, by priority, fair between tenants.

It owns who waits, in which order they go, and what each tenant has been served. It knows requests as records only; it
must not know lanes, devices, clocks or deadlines.

Fairness is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024
(arXiv 2401.00588). A counter adds up a tenant's prompt and output tokens, weighted; the tenant with the
least goes next. One who comes back is lifted to the least counter among those who wait, so idling earns no credit.
For two tenants with requests waiting all the time, and without preemption, the service over any interval differs by
at most 2 max(w_in * longest prompt, w_out * tokens that running requests can hold), the paper's theorem.

Counters are kept for each priority apart, as if it were a queue of its own. With one counter for all of them, a
tenant starved at a low priority would hold down the least, and whoever comes new to a higher one would be lifted to
that and get ahead of everybody who has been served there.
"""

import bisect
import dataclasses
from typing import NamedTuple

from streamserve.types import Deferred, Request

INPUT_WEIGHT = 1  # w_in, service in a prompt token; both weights as in the paper's experiments
OUTPUT_WEIGHT = 2  # w_out, service in an output token
# Counters of tenants that do not wait, about 200 bytes each: the paper keeps all of them for ever. Who is forgotten
# comes back at the least counter like anyone new, which gives away what it was ahead by.
MAX_IDLE_COUNTERS = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request with its place in line.

    Attributes:
      request: what waits.
      sequence: counts arrivals; a tenant's lower ones go first.
    """

    request: Request
    sequence: int


class _Line(NamedTuple):
    """Name of a line: requests of one tenant at one priority."""

    priority: int
    tenant: str


class WaitingQueue:
    """Requests that wait, in the order in which they are to be served.

    Lowest priority first; then the tenant with the least service; then, and within a tenant, first come first served.
    Lists are kept sorted rather than heaps with dead rows, so memory is that of what waits. `put`, `peek` and `pop`
    look at each tenant that waits, no more than `max_waiting` and those put back.
    """

    def __init__(self, max_waiting: int):
        """Start empty; `max_waiting` bounds the new requests that wait, see `put_back` for the others."""
        self._max_waiting, self._arrivals = max_waiting, 0
        self._entries: dict[str, Entry] = {}
        self._put_back: set[str] = set()  # ids of the entries that have been popped before
        self._lines: dict[_Line, list[Entry]] = {}  # none is empty; each by sequence, so those put back are in front
        self._served: dict[_Line, int] = {}  # the counters
        self._idle: dict[_Line, None] = {}  # those counters without a line, the first to have left in front

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return bool(self._entries)

    def put(self, request: Request) -> Deferred | None:
        """Let a new request wait.

        Returns:
          None, or why there is no room; the queue is then as before.
        """
        new = len(self._entries) - len(self._put_back)
        if new >= self._max_waiting:
            limit = f"scheduler.max_waiting={self._max_waiting}"
            return Deferred(f"the waiting queue is full: {new} requests wait ({limit})")
        name = _name(request)
        line = self._lines.get(name)
        # What was put back did not arrive: a tenant with nothing else in line has been idle, as far as arrivals go.
        if line is None or line[-1].request.request_id in self._put_back:
            self._served[name] = max(self._served.get(name, 0), self._least(name))
        self._insert(Entry(request=request, sequence=self._arrivals))
        self._arrivals += 1
        return None

    def put_back(self, entry: Entry) -> None:
        """Undo a pop: the request could not be placed, or has lost its place.

        It keeps its sequence, hence goes before all that its tenant has waiting and that were not popped before. It
        is never refused and not counted against the bound, since it was admitted once: its number is bounded by the
        places it can have been popped for, and others are not refused for its sake. Its prompt is refunded and
        charged by the next pop, so a tenant pays for a prompt once, however often it is computed.
        """
        name = _name(entry.request)
        if name in self._served:
            self._served[name] -= INPUT_WEIGHT * len(entry.request.prompt_token_ids)
        else:  # forgotten since, and what was charged with it
            self._served[name] = self._least(name)
        self._insert(entry)
        self._put_back.add(entry.request.request_id)

    def peek(self) -> Entry | None:
        """Look at the next one; None if nothing waits."""
        if not self._lines:
            return None
        return self._lines[min(self._lines, key=self._turn)][0]

    def pop(self) -> Entry | None:
        """Take the next one and charge its tenant for the prompt; None if nothing waits."""
        entry = self.peek()
        if entry is not None:
            self._served[_name(entry.request)] += INPUT_WEIGHT * len(entry.request.prompt_token_ids)
            self._take(entry)
        return entry

    def charge(self, request: Request, output_tokens: int) -> None:
        """Charge the tenant of a popped request for tokens that have come out; nothing if it is forgotten."""
        name = _name(request)
        if name in self._served:
            self._served[name] += OUTPUT_WEIGHT * output_tokens

    def remove(self, request_id: str) -> Entry | None:
        """Take out a request wherever it is in line; None if it does not wait."""
        entry = self._entries.get(request_id)
        if entry is not None:
            self._take(entry)
        return entry

    def _turn(self, name: _Line) -> tuple[int, int, int]:
        """What lines are ordered by."""
        return name.priority, self._served[name], self._lines[name][0].sequence

    def _least(self, name: _Line) -> int:
        """Return the counter to which a line that comes back is lifted, from others of its priority.

        That is the least of those who wait; if none does, that of the last to have left; if none is known, zero.
        """
        waiting = [self._served[other] for other in self._lines if other.priority == name.priority and other != name]
        if waiting:
            return min(waiting)
        return next((self._served[other] for other in reversed(self._idle) if other.priority == name.priority), 0)

    def _insert(self, entry: Entry) -> None:
        request_id, name = entry.request.request_id, _name(entry.request)
        assert request_id not in self._entries, f"request {request_id} waits already"
        self._entries[request_id] = entry
        self._idle.pop(name, None)
        bisect.insort(self._lines.setdefault(name, []), entry, key=_sequence)

    def _take(self, entry: Entry) -> None:
        """Take an entry out of everything; its line's counter stays, until too many others have become idle since."""
        del self._entries[entry.request.request_id]
        self._put_back.discard(entry.request.request_id)
        name = _name(entry.request)
        line = self._lines[name]
        del line[bisect.bisect_left(line, entry.sequence, key=_sequence)]
        if not line:
            del self._lines[name]
            self._idle[name] = None
            if len(self._idle) > MAX_IDLE_COUNTERS:
                oldest = next(iter(self._idle))
                del self._idle[oldest], self._served[oldest]


def _name(request: Request) -> _Line:
    return _Line(request.priority, request.tenant)


def _sequence(entry: Entry) -> int:
    return entry.sequence
