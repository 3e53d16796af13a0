"""What one stream pair tells the trace: spans of its calls, hand-offs and ticks, counters, and arrows of requests.

What runs in order on a device begins when the one before it has ended: a span begins at its dispatch or there.
"""

from collections.abc import Iterable

from streamserve.trace import FlowPhase, Tracer, Track


class LaneLog:
    """Reports on one lane. Times are seconds of the loop's clock."""

    def __init__(self, lane: int, tracer: Tracer):
        self._lane, self._tracer = lane, tracer
        self._last_call_s = 0.0

    def scheduled(self, request_id: str, arrival_s: float, now_s: float) -> None:
        """Report that a request's first prefill call was dispatched."""
        self._tracer.span(None, Track.QUEUE, request_id, arrival_s, now_s)
        self._lead(request_id, FlowPhase.START, Track.QUEUE, arrival_s, now_s)

    def called(self, tokens: int, prompts: int, done: Iterable[str], begun_s: float, now_s: float) -> None:
        """Report that a prefill call is done, and which prompts with it."""
        begin_s, self._last_call_s = max(begun_s, self._last_call_s), now_s
        self._tracer.span(self._lane, Track.PREFILL, f"{tokens} tokens", begin_s, now_s, prompts=prompts)
        for request_id in done:
            self._lead(request_id, FlowPhase.STEP, Track.PREFILL, begin_s, now_s)

    def arrived(self, request_id: str, pages: int, num_bytes: int, begun_s: float, now_s: float) -> None:
        """Report that a request's pages are on the decode mesh."""
        self._tracer.span(self._lane, Track.TRANSFER, request_id, begun_s, now_s, pages=pages, bytes=num_bytes)
        self._lead(request_id, FlowPhase.STEP, Track.TRANSFER, begun_s, now_s)

    def ticked(
        self, slots: int, depth: int, first: Iterable[str], free_pages: int, begin_s: float, now_s: float
    ) -> None:
        """Report that a tick was read, and which requests' first tokens came with it."""
        self._tracer.span(self._lane, Track.DECODE, f"{slots} slots", begin_s, now_s, depth=depth)
        for request_id in first:
            self._lead(request_id, FlowPhase.FINISH, Track.DECODE, begin_s, now_s)
        self._tracer.counter(self._lane, "depth", now_s, tokens=depth)
        self._tracer.counter(self._lane, "free pages", now_s, pages=free_pages)

    def preempted(self, request_id: str, now_s: float) -> None:
        """Report that a request lost its slot."""
        self._tracer.instant(self._lane, Track.DECODE, f"preempt {request_id}", now_s)

    def _lead(self, request_id: str, phase: FlowPhase, track: Track, begin_s: float, end_s: float) -> None:
        """Lead a request's arrow through the middle of the span that was reported last."""
        lane = None if track is Track.QUEUE else self._lane
        self._tracer.flow(request_id, phase, lane, track, (begin_s + end_s) / 2)
