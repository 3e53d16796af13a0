"""StreamScheduler: the one loop. It alone sees all stages; no stage sees another.

The life of a request (its states and legal moves are in `lifecycle.py`):
  1. It is submitted, or pulled from the input when there is room to wait. A full queue refuses it with a reason.
  2. It waits: the lowest priority value first, then the tenant that was served least, then in order of arrival.
  3. FlowGuard picks a lane, among those with room before their slots; the lane reserves pages for its prompt.
  4. Prefill calls take its tiles, together with those of others, as many calls ahead as the config says.
  5. When its last tile is dispatched, its first token is sampled and its pages start for the decode mesh.
  6. When they have arrived and a slot is free, it is inserted. A hand-off that does not arrive is begun again.
  7. Ticks are dispatched as long as a lane has requests in slots; each is read after the next one is dispatched. When
     pages run out, the least important request loses its slot, and goes on later where it stopped.
  8. When its row has stopped, or its text holds a stop string, its slot is released and its output handed over.

Every request ends exactly once: finished, refused with a reason, cancelled, timed out, or failed with its error. A
program that fails takes down the requests that were in it; the others on its lane begin again.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import jax

from streamserve.config import SchedulerConfig
from streamserve.ending import Finished, Refused
from streamserve.flowguard import Ask, FlowGuard, RouteOutcome
from streamserve.lane import Lane
from streamserve.lane_counters import LaneCounters, total
from streamserve.lifecycle import State
from streamserve.pair_protocol import Pair
from streamserve.roster import Roster
from streamserve.sequence import RunningRequest
from streamserve.specustream import SpecuStream
from streamserve.trace import NullTracer, Tracer, Track
from streamserve.types import Deferred, LaneStats, Request, RequestMetrics

POLL_S = 0.0003  # pause of the loop while nothing decodes and nothing has changed
TICK_POLL_S = 0.001  # the same while ticks run and none is nearly due: a pass costs a tenth of that


class StreamScheduler:
    """Orchestrates requests over lanes."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        flowguard: FlowGuard,
        config: SchedulerConfig,
        *,
        specustreams: Sequence[SpecuStream],
        max_prefills: int,
        keeps_pages: bool,
        start: Callable[..., RunningRequest],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        tracer: Tracer | None = None,
    ):
        """Take over warmed-up lanes.

        Args:
          pairs: stream pairs; the scheduler owns them from here on.
          flowguard: picks one of them for each request.
          config: limits.
          specustreams: one for each stream pair; it plans the ticks there.
          max_prefills: requests between admission and a slot, a lane.
          keeps_pages: a preempted request keeps its pages in the host's memory.
          start: `(request, *, arrival_s) -> RunningRequest`.
          clock: seconds, monotonic.
          sleep: passes the time when there is nothing to do.
          tracer: is told what happened when; None for nobody.
        """
        self._tracer = NullTracer() if tracer is None else tracer
        self._specustreams, self._keeps_pages = tuple(specustreams), keeps_pages
        self.lanes: tuple[Lane, ...] = ()
        self.use_pairs(pairs)
        self.ends: dict[State, int] = {}  # requests by how they ended
        self._flowguard, self._config, self._max_prefills = flowguard, config, max_prefills
        self._start, self._clock, self._sleep = start, clock, sleep
        self._roster = Roster(config.max_waiting)
        self._ended: list[Finished] = []
        self._busy = False
        self._must_watch = len(self.lanes) > 1  # something may happen while a tick is waited for
        self._traced_waiting = 0

    def use_pairs(self, pairs: Sequence[Pair]) -> None:
        """Open a new book on each stream pair. What was counted before stays counted; nothing must be under way."""
        assert not any(lane.busy for lane in self.lanes), "requests are on the lanes"
        counters = [lane.counters for lane in self.lanes] or [LaneCounters() for _ in pairs]
        self.lanes = tuple(
            Lane(index, *book, keeps_pages=self._keeps_pages, tracer=self._tracer)
            for index, book in enumerate(zip(pairs, self._specustreams, counters, strict=True))
        )

    # --- the door

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs, or has ended without being handed over."""
        return not (self._roster.known or self._ended or any(lane.busy for lane in self.lanes))

    def submit(self, request: Request, *, arrival_s: float | None = None) -> Deferred | None:
        """Let a request wait; it ends as REFUSED when the queue is full.

        Args:
          request: unique by its id among those that have not ended.
          arrival_s: clock reading from which its times are counted; None for now.

        Returns:
          None, or why it was refused. Its end comes from `step` either way.

        Raises:
          ValueError: a request with this id has not ended.
        """
        if request.request_id in self._roster.known:
            raise ValueError(f"request {request.request_id} is being served already")
        arrival_s = self._clock() if arrival_s is None else arrival_s
        running = self._start(request, arrival_s=arrival_s)
        refusal = self._roster.enter(running)
        if refusal is not None:
            self._end(running, State.REFUSED, refusal.reason)
        return refusal

    def cancel(self, request_id: str) -> bool:
        """End a request as cancelled, wherever it is; false if it has ended or was never there."""
        running = self._roster.known.get(request_id)
        if running is None:
            return False
        self._take_out(running)
        self._end(running, State.CANCELLED, "cancelled")
        return True

    def run(self, requests: Iterable[Request | Refused]) -> Iterator[Finished]:
        """Serve requests until the input ends and every one of them has ended.

        Args:
          requests: pulled a few between passes, while there is room to wait, so that none is refused for the queue's
            sake and an endless input needs no memory. A slow one delays the loop, since it is pulled there.

        Yields:
          Each request's end, in the order of completion.

        Raises:
          RuntimeError: another run on the same scheduler has not ended.
        """
        source, open_input = iter(requests), True
        with self._running():
            while open_input or not self.idle:
                # 1. Pull as many as lanes can take, and one at least while there is room.
                room = sum(self._max_prefills - lane.num_before_slot for lane in self.lanes) - len(self._roster.queue)
                for _ in range(min(max(room, 1), self._roster.room) if open_input else 0):
                    item = next(source, None)
                    if item is None:
                        open_input = False
                        break
                    self._take_in(item)
                yield from self.step()

    def serve(self, arrivals: Iterable[tuple[float, Request | Refused]]) -> Iterator[Finished]:
        """Serve requests that come when they come, whether or not there is room: an open loop.

        Args:
          arrivals: seconds from now and the request, in the order of time. Each is pulled after the one before it has
            arrived, and its times are counted from its own, however late the loop gets round to it.

        Yields:
          Each request's end, in the order of completion. A queue that is full refuses.

        Raises:
          RuntimeError: another run on the same scheduler has not ended.
        """
        source, begin_s = iter(arrivals), self._clock()
        with self._running():
            self._must_watch = True
            arrival = next(source, None)
            while arrival is not None or not self.idle:
                while arrival is not None and begin_s + arrival[0] <= self._clock():
                    self._take_in(arrival[1], arrival_s=begin_s + arrival[0])
                    arrival = next(source, None)
                yield from self.step()

    @contextlib.contextmanager
    def _running(self) -> Generator[None]:
        """Let one run go on at a time, and leave nothing behind."""
        if self._busy:
            raise RuntimeError("this engine is already running; finish or close the other run first")
        self._busy = True
        try:
            yield
        finally:
            self._busy, self._must_watch = False, len(self.lanes) > 1
            self.shutdown()

    def _take_in(self, item: Request | Refused, *, arrival_s: float | None = None) -> None:
        if isinstance(item, Refused):
            self._hand_over(Finished(item.request_id, State.REFUSED, error=item.reason))
        else:
            self.submit(item, arrival_s=arrival_s)

    def drain(self) -> Iterator[Finished]:
        """Serve what has been submitted to its end."""
        while not self.idle:
            yield from self.step()

    def shutdown(self) -> list[Finished]:
        """Cancel what has not ended and leave the lanes empty; gives the ends that nobody has taken."""
        for running in list(self._roster.known.values()):
            self._end(running, State.CANCELLED, "the engine was shut down")
        for lane in self.lanes:
            lane.abandon()
        self._roster.clear()
        ended, self._ended = self._ended, []
        return ended

    def step(self) -> list[Finished]:
        """Do each of steps 2 to 8 once; gives the requests that have ended."""
        with jax.transfer_guard("disallow"):
            self._expire()
            self._evacuate()
            # 2. and 3. Wait, route, reserve.
            self._admit()
            self._note_queue()
            for lane in self.lanes:
                self._guarded(lane, self._advance)
            # 8. Read and hand over.
            readable = self._readable()
            for lane in readable:
                self._guarded(lane, self._collect)
            ended, self._ended = self._ended, []
            if not ended and not readable:
                self._sleep(self._pause_s())
        return ended

    def lane_stats(self) -> tuple[LaneStats, ...]:
        """Take a snapshot of each lane."""
        now_s = self._clock()
        return tuple(lane.stats(now_s) for lane in self.lanes)

    def counters(self) -> LaneCounters:
        """Sum the lanes' counters."""
        return total(lane.counters for lane in self.lanes)

    # --- parts of a pass

    def _admit(self) -> None:
        """Send waiting requests to lanes, in their order, until none has room."""
        full: set[int] = set()
        while (running := self._roster.first()) is not None:
            eligible = [
                lane.pair.is_up and lane.index not in full and lane.num_before_slot < self._max_prefills
                for lane in self.lanes
            ]
            if not any(eligible):
                return
            now_s = self._clock()
            route = self._flowguard.route(self._ask(running, now_s), self.lane_stats(), eligible)
            lane = self.lanes[route.arm]
            try:
                refusal = lane.begin(running, local=route.local)
            except ValueError as error:  # it fits no program
                self._roster.pop()
                self._end(running, State.REFUSED if not running.num_tokens else State.FAILED, str(error))
                continue
            if refusal is not None:
                full.add(lane.index)
                continue
            self._flowguard.begun(now_s)
            self._roster.pop()

    def _ask(self, running: RunningRequest, now_s: float) -> Ask:
        """Describe a request to FlowGuard."""
        return Ask(
            request_id=running.request_id,
            prompt_tokens=len(running.job().tokens),
            max_tokens=running.request.params.max_tokens - running.num_tokens,
            waited_s=0.0 if running.num_tokens else now_s - running.stamps.arrival_s,  # its first token is out
            hit_tokens=tuple(lane.cached_tokens(running) for lane in self.lanes),
            queue=len(self._roster.queue),
        )

    def _evacuate(self) -> None:
        """Take everything off lanes that are down, to begin or go on elsewhere."""
        for lane in self.lanes:
            if lane.busy and not lane.pair.is_up:
                for running in lane.evacuate():
                    self._flowguard.learn(running.request_id, RouteOutcome(answered=False), self._clock())
                    self._roster.wait_again(running)

    def _note_queue(self) -> None:
        """Trace how many wait, when that has changed."""
        if len(self._roster.queue) != self._traced_waiting:
            self._traced_waiting = len(self._roster.queue)
            self._tracer.counter(None, "queue", self._clock(), requests=self._traced_waiting)

    def _advance(self, lane: Lane) -> None:
        """Do what a lane can do without waiting."""
        now_s, config = self._clock(), self._config
        # 4. and 5. Prefill, and hand off what each call completes.
        lane.note_computed(now_s)
        while lane.prefill(now_s, config.prefill_calls):
            lane.hand_off(now_s)
        lane.hand_off(now_s)
        # 6. Retry, insert.
        for running in lane.retry(now_s, config.transfer_timeout_s, config.max_transfers):
            lane.drop(running)
            attempts = f"{config.max_transfers} attempts of {config.transfer_timeout_s} s"
            self._end(running, State.FAILED, f"its pages did not arrive on the decode mesh in {attempts}")
        lane.insert(now_s)
        # 7. Dispatch.
        for running in lane.make_room(now_s):
            self._roster.wait_again(running)
        lane.dispatch(now_s, len(self._roster.queue))

    def _readable(self) -> list[Lane]:
        """Choose the lanes whose ticks are read now: those that are done.

        If none is, that of a lane alone is waited for, unless anything else may happen meanwhile.
        """
        if self._must_watch:
            return [lane for lane in self.lanes if lane.has_output()]
        return [lane for lane in self.lanes if lane.ticking]

    def _pause_s(self) -> float:
        """How long to look away: while ticks run, longer as long as none is nearly due."""
        due_s = [lane.tick_due_s for lane in self.lanes if lane.ticking]
        return TICK_POLL_S if due_s and min(due_s) > self._clock() + TICK_POLL_S else POLL_S

    def _collect(self, lane: Lane) -> None:
        """Read a lane's ticks, charge tenants for the tokens, and end the requests that are done."""
        for running in lane.collect(self._clock):
            if running.invalid:
                what = "the model gave a number that is not finite (NaN or infinite)"
                self._end(running, State.FAILED, f"{what} after {running.num_tokens} tokens")
            else:
                self._end(running, State.FINISHED)
        for running in lane.decoding_requests():
            self._roster.charge(running)

    def _guarded(self, lane: Lane, work: Callable[[Lane], None]) -> None:
        """Do a lane's work; a program that fails costs those who were in it."""
        try:
            work(lane)
        except RuntimeError as error:
            victims = getattr(error, "request_ids", None)
            if victims is not None and not lane.pair.is_broken:
                for request_id in victims:
                    running = self._roster.known[request_id]
                    lane.drop(running)
                    self._end(running, State.FAILED, str(error))
                return
            decoding, others = lane.reset()
            for running in decoding:
                self._end(running, State.FAILED, str(error))
            for running in others:
                if victims is not None and running.request_id in victims:
                    self._end(running, State.FAILED, str(error))
                else:
                    running.life.move(State.WAITING)
                    self._roster.wait_again(running)

    def _expire(self) -> None:
        """End the requests whose deadline has passed."""
        for running in self._roster.overdue(self._clock()):
            state = running.life.state.value
            self._take_out(running)
            self._end(running, State.TIMED_OUT, f"timed out after {running.request.timeout_s} s, while in {state}")

    def _take_out(self, running: RunningRequest) -> None:
        """Remove a request from where it is."""
        if not self._roster.stop_waiting(running):
            self._guarded(self.lanes[running.lane], lambda lane: lane.drop(running))

    def _end(self, running: RunningRequest, state: State, error: str | None = None) -> None:
        """Make a request's end known."""
        running.life.move(state)
        now_s = self._clock()
        self._roster.leave(running)
        if state in (State.CANCELLED, State.REFUSED):
            self._flowguard.withdraw(running.request_id)
        if error is not None:
            self._flowguard.learn(running.request_id, RouteOutcome(answered=False), now_s)
            lane = running.lane if running.lane >= 0 else None
            track = Track.QUEUE if lane is None else Track.DECODE
            self._tracer.instant(lane, track, f"{state.value} {running.request_id}", now_s, error=error)
            self._hand_over(Finished(running.request_id, state, error=error))
            return
        times, completion = running.metrics(now_s), running.completion()
        outcome = _outcome(times, running.num_tokens)
        if not running.num_preemptions:  # else its times are not this lane's alone
            self.lanes[running.lane].note_end(outcome.ttft_s, outcome.tpot_s)
        self._flowguard.learn(running.request_id, outcome, now_s)
        self._hand_over(
            Finished(
                request_id=running.request_id,
                state=state,
                completion=completion,
                metrics=times,
                prompt_logprobs=running.prompt_logprobs,
            )
        )

    def _hand_over(self, finished: Finished) -> None:
        self.ends[finished.state] = self.ends.get(finished.state, 0) + 1
        self._ended.append(finished)


def _outcome(times: RequestMetrics, num_tokens: int) -> RouteOutcome:
    """Say what became of a request that was answered."""
    tpot_s = (times.finished_s - times.first_token_s) / (num_tokens - 1) if num_tokens > 1 else 0.0
    return RouteOutcome(
        answered=True,
        ttft_s=times.first_token_s - times.arrival_s,
        tpot_s=tpot_s,
        latency_s=times.finished_s - times.arrival_s,
        output_tokens=num_tokens,
    )
