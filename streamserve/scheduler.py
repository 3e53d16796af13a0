"""StreamScheduler: the one loop. It alone sees all stages; no stage sees another.

The life of a request:
  1. It is pulled from the input when there is room to wait, and keeps its place in line.
  2. FlowGuard picks a lane for the first in line, among those whose prefill mesh is not backed up.
  3. The lane's prefill is dispatched, and the transfer of its prefix behind it; nothing waits.
  4. When the prefix has arrived and a slot is free, it is inserted into the decode state.
  5. Ticks are dispatched as long as a lane has requests in slots; each is read after the next one is dispatched.
  6. When its row has stopped, or its text holds a stop string, its slot is released and its output handed over.

Every request ends exactly once: answered, refused with a reason, or failed with its error. When the loop itself fails
or is closed, the lanes are left empty and the error goes to the caller.
"""

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax

from streamserve.config import SchedulerConfig
from streamserve.flowguard import FlowGuard
from streamserve.sequence import RunningRequest
from streamserve.types import (
    CompletionOutput,
    LaneStats,
    Logprob,
    Request,
    RequestMetrics,
    StepOutput,
    TokenLogprobs,
)


class Refused(NamedTuple):
    """A request that cannot be served, and why."""

    request_id: str
    reason: str


class Finished(NamedTuple):
    """The one end of a request: an output with its metrics, or an error."""

    request_id: str
    completion: CompletionOutput | None = None
    metrics: RequestMetrics | None = None
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None = None
    error: str | None = None


class Pair(Protocol):
    """What the scheduler needs of a stream pair: `pipeserve.StreamPair`, or a fake that stands in.

    What `prefill` and `step` return is opaque but for an item's `request` and `transfer_bytes`.
    """

    num_slots: int
    free_slots: int
    prefill: Callable[[Request], Any]
    has_arrived: Callable[[Any], bool]
    wait: Callable[[Any], None]
    insert: Callable[[Any], int]
    step: Callable[[int], Any]
    read: Callable[[Any], StepOutput]
    read_prompt_logprobs: Callable[[Any], TokenLogprobs]
    release: Callable[[int, str], None]
    reset: Callable[[], None]


class Counters:
    """What the loop has counted since it was made."""

    def __init__(self) -> None:
        self.ticks = 0
        self.kv_transfers = 0
        self.kv_transfer_bytes = 0


class StreamScheduler:
    """First come, first served over all lanes."""

    def __init__(
        self,
        lanes: Sequence[Pair],
        flowguard: FlowGuard,
        config: SchedulerConfig,
        *,
        tier: int,
        start: Callable[..., RunningRequest],
        clock: Callable[[], float] = time.monotonic,
    ):
        """Take over warmed-up lanes.

        Args:
          lanes: stream pairs; the scheduler owns them from here on.
          flowguard: picks one of them for each request.
          config: limits.
          tier: draft depth of every tick.
          start: `(request, *, lane, arrival_s, scheduled_s) -> RunningRequest`.
          clock: seconds, monotonic.
        """
        self.counters = Counters()
        self._lanes = [_Lane(index, pair) for index, pair in enumerate(lanes)]
        self._flowguard, self._config, self._tier, self._start, self._clock = flowguard, config, tier, start, clock
        self._busy = False

    def run(self, requests: Iterable[Request | Refused]) -> Iterator[Finished]:
        """Serve requests until the input ends and every one of them has ended.

        Args:
          requests: pulled a few between ticks, as many as lanes can take and at least one while there is room to
            wait. So an endless input needs no memory; a slow one delays the ticks, since it is pulled in this loop.

        Yields:
          Each request's end, in the order of completion.

        Raises:
          RuntimeError: another run on the same scheduler has not ended.
        """
        if self._busy:
            raise RuntimeError("this engine is already running; finish or close the other run first")
        self._busy = True
        source, waiting = iter(requests), collections.deque[tuple[Request, float]]()
        open_input = True
        try:
            while open_input or waiting or any(lane.busy for lane in self._lanes):
                # 1. Pull.
                room = sum(self._config.max_prefills - lane.num_transit for lane in self._lanes) - len(waiting)
                for _ in range(min(max(room, 1), self._config.max_waiting - len(waiting)) if open_input else 0):
                    item = next(source, None)
                    if item is None:
                        open_input = False
                        break
                    if isinstance(item, Refused):
                        yield Finished(item.request_id, error=item.reason)
                    else:
                        waiting.append((item, self._clock()))
                yield from self._tick(waiting)
        finally:
            self._busy = False
            for lane in self._lanes:
                lane.abandon()

    def _tick(self, waiting: collections.deque[tuple[Request, float]]) -> list[Finished]:
        """Do each of steps 2 to 6 once."""
        ended: list[Finished] = []
        with jax.transfer_guard("disallow"):
            # 2. and 3. Route and prefill.
            while waiting and any(eligible := [lane.num_transit < self._config.max_prefills for lane in self._lanes]):
                request, arrival_s = waiting.popleft()
                ended += self._admit(request, arrival_s, eligible)
            # 4. Insert what has arrived.
            for lane in self._lanes:
                lane.insert_arrived()
            # 5. Dispatch every lane's tick, then read every lane's previous one.
            for lane in self._lanes:
                self.counters.ticks += lane.dispatch(self._tier)
            # 6. Release and hand over.
            for lane in self._lanes:
                ended += lane.collect(self._clock)
            if not ended and not any(lane.decoding for lane in self._lanes):
                self._wait_for_arrival()
        return ended

    def _admit(self, request: Request, arrival_s: float, eligible: list[bool]) -> list[Finished]:
        """Send one request to a lane; a request that fits no program is refused."""
        lane = self._lanes[self._flowguard.route([lane.stats() for lane in self._lanes], eligible)]
        running = self._start(request, lane=lane.index, arrival_s=arrival_s, scheduled_s=self._clock())
        try:
            item = lane.pair.prefill(request)
        except (ValueError, RuntimeError) as error:  # it fits no program; or the device refused it, out of memory say
            return [Finished(request.request_id, error=str(error))]
        running.transfer_bytes = item.transfer_bytes
        self.counters.kv_transfers += 1
        self.counters.kv_transfer_bytes += item.transfer_bytes
        lane.transit.append((item, running))
        return []

    def _wait_for_arrival(self) -> None:
        """Nothing decodes: sleep until the oldest prefix of some lane has arrived, rather than spin."""
        lane = next((lane for lane in self._lanes if lane.transit), None)
        if lane is not None:
            lane.pair.wait(lane.transit[0][0])


class _Lane:
    """The scheduler's book on one stream pair."""

    def __init__(self, index: int, pair: Pair):
        self.index, self.pair = index, pair
        self.transit: collections.deque[tuple[Any, RunningRequest]] = collections.deque()
        self._slots: dict[int, RunningRequest] = {}
        self._pending: collections.deque[tuple[Any, dict[int, RunningRequest]]] = collections.deque()
        self._accepted_per_step = 0.0

    @property
    def num_transit(self) -> int:
        """Requests between prefill and slot."""
        return len(self.transit)

    @property
    def decoding(self) -> bool:
        """Whether requests hold slots or ticks are unread."""
        return bool(self._slots or self._pending)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return self.decoding or bool(self.transit)

    def stats(self) -> LaneStats:
        """Take a snapshot for FlowGuard."""
        return LaneStats(
            lane=self.index,
            free_slots=self.pair.free_slots,
            num_slots=self.pair.num_slots,
            running=len(self._slots),
            in_transit=len(self.transit),
            queued_prefill_tokens=sum(len(running.request.prompt_token_ids) for _, running in self.transit),
            accepted_per_step=self._accepted_per_step,
        )

    def insert_arrived(self) -> None:
        """Move prefixes into free slots, in order, without waiting for any."""
        while self.transit and self.pair.free_slots and self.pair.has_arrived(self.transit[0][0]):
            item, running = self.transit.popleft()
            if running.request.params.prompt_logprobs is not None:
                running.set_prompt_logprobs(self.pair.read_prompt_logprobs(item))
            self._slots[self.pair.insert(item)] = running

    def dispatch(self, tier: int) -> int:
        """Dispatch a tick if any slot is taken; returns how many were dispatched."""
        if not self._slots:
            return 0
        # Who holds which slot is noted now: by the time of reading a slot may have changed hands.
        self._pending.append((self.pair.step(tier), dict(self._slots)))
        return 1

    def collect(self, clock: Callable[[], float]) -> list[Finished]:
        """Read ticks but for the last, or the last too when nothing runs behind it."""
        ended: list[Finished] = []
        while len(self._pending) > (1 if self._slots else 0):
            pending, holders = self._pending.popleft()
            output = self.pair.read(pending)
            now_s = clock()
            for slot, running in holders.items():
                if self._slots.get(slot) is not running:
                    continue  # it ended in an earlier tick; this one ran before the host knew
                if running.take(output, slot, now_s):
                    del self._slots[slot]
                    self.pair.release(slot, running.request.request_id)
                    ended.append(_finish(running, now_s))
            self._note_acceptance(output)
        return ended

    def abandon(self) -> None:
        """Drop everything under way and free the slots, whatever the loop was doing."""
        if self.busy:
            self.pair.reset()
        self._slots.clear()
        self._pending.clear()
        self.transit.clear()

    def _note_acceptance(self, output: StepOutput) -> None:
        """Follow the mean accepted tokens a step by an exponential average over about ten ticks."""
        ran = output.drafted > 0
        if ran.any():
            self._accepted_per_step += 0.1 * (float(output.accepted[ran].mean()) - self._accepted_per_step)


def _finish(running: RunningRequest, now_s: float) -> Finished:
    return Finished(
        request_id=running.request.request_id,
        completion=running.completion(),
        metrics=running.metrics(now_s),
        prompt_logprobs=running.prompt_logprobs,
    )
