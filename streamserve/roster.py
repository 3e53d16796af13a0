"""The requests that have not ended: who they are, which of them wait, what they were charged, and when they must end.

It knows neither lanes nor the clock, and ends nobody: the scheduler does.
"""

import heapq
from collections.abc import Iterator

from streamserve.sequence import RunningRequest
from streamserve.types import Deferred
from streamserve.waiting import Entry, WaitingQueue


class Roster:
    """Requests from submission to end, by their ids.

    Attributes:
      known: all of them.
      queue: those that wait for a lane; the others are on one.
    """

    def __init__(self, max_waiting: int):
        """Begin empty; `max_waiting` bounds the new requests that wait."""
        self.known: dict[str, RunningRequest] = {}
        self._max_waiting = max_waiting
        self._entries: dict[str, Entry] = {}  # of requests on lanes, in case they must wait again
        self._deadlines: list[tuple[float, str]] = []
        self.clear()

    def clear(self) -> None:
        """Forget who waits, for how long, and what tenants were served; all must have ended."""
        assert not self.known, "requests have not ended"
        self.queue = WaitingQueue(self._max_waiting)
        self._entries.clear()
        self._deadlines.clear()

    @property
    def room(self) -> int:
        """New requests that may still come; not positive when none may."""
        return self._max_waiting - len(self.queue)

    def enter(self, running: RunningRequest) -> Deferred | None:
        """Take a request in, and let it wait.

        Returns:
          None, or why there is no room to wait. It is known either way.
        """
        request = running.request
        self.known[request.request_id] = running
        refusal = self.queue.put(request)
        if refusal is None and request.timeout_s is not None:
            heapq.heappush(self._deadlines, (running.stamps.arrival_s + request.timeout_s, request.request_id))
        return refusal

    def first(self) -> RunningRequest | None:
        """Look at who is to go next; None if nobody waits."""
        entry = self.queue.peek()
        return None if entry is None else self.known[entry.request.request_id]

    def pop(self) -> None:
        """Let the first one go, to a lane or to its end; there must be one."""
        entry = self.queue.pop()
        assert entry is not None, "nobody waits"
        self._entries[entry.request.request_id] = entry

    def wait_again(self, running: RunningRequest) -> None:
        """Let a request that has lost its lane wait for another."""
        self.queue.put_back(self._entries.pop(running.request_id))

    def stop_waiting(self, running: RunningRequest) -> bool:
        """Take a request out of the queue; false if it is not there but on a lane."""
        return self.queue.remove(running.request_id) is not None

    def charge(self, running: RunningRequest) -> None:
        """Charge its tenant for the tokens that a request has emitted since the last time."""
        self.queue.charge(running.request, running.num_tokens - running.num_charged)
        running.num_charged = running.num_tokens

    def leave(self, running: RunningRequest) -> None:
        """Forget a request that ends."""
        del self.known[running.request_id]
        self._entries.pop(running.request_id, None)
        self.charge(running)

    def overdue(self, now_s: float) -> Iterator[RunningRequest]:
        """Give the requests whose deadline has passed, each once; they may end meanwhile."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, request_id = heapq.heappop(self._deadlines)
            running = self.known.get(request_id)
            if running is None:
                continue
            timeout_s = running.request.timeout_s
            if timeout_s is None or running.stamps.arrival_s + timeout_s > now_s:
                continue  # a later request of the same name
            yield running
