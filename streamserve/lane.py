"""The scheduler's book on one stream pair: which request is at which stage of it, and the moves between the stages.

Each method does one stage's work without waiting for a device, but `collect`, which waits for a tick. What the lane
owes to the outside comes back as lists of requests; nothing is called back.
"""

import collections
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from streamserve.lane_log import LaneLog
from streamserve.lane_meter import LaneMeter
from streamserve.lifecycle import State
from streamserve.pair_protocol import Pair
from streamserve.sequence import RunningRequest
from streamserve.specustream import LaneLoad, SpecuStream, Ticket
from streamserve.trace import Tracer
from streamserve.types import Deferred, LaneStats

HAND_OFFS_AHEAD = 2  # hand-offs under way beyond the free slots: they take pages that running requests may need
TICKS_AHEAD = 2  # ticks dispatched and not read: one runs while the host works on the one before


class Transit(NamedTuple):
    """A hand-off under way."""

    item: Any
    begun_s: float
    attempts: int


class Tick(NamedTuple):
    """A tick that was dispatched and not yet read, and who held which slot then."""

    pending: Any
    ticket: Ticket
    holders: dict[int, tuple[RunningRequest, int]]  # with the number of the insertion: a slot may change hands
    begun_s: float


class LaneCounters:
    """What a lane has counted since it was made."""

    def __init__(self) -> None:
        self.ticks = 0
        self.prefill_calls = 0
        self.arrivals = 0  # prompts that were sent from the prefill to the decode mesh
        self.local_prefills = 0  # requests that were computed there, though there is a prefill mesh
        self.kv_transfers = 0  # of them, those whose pages had to move
        self.kv_transfer_pages = 0
        self.kv_transfer_bytes = 0
        self.transfer_retries = 0
        self.preemptions = 0
        self.resets = 0


class Lane:
    """One stream pair and the requests on it."""

    def __init__(
        self,
        index: int,
        pair: Pair,
        specustream: SpecuStream,
        counters: LaneCounters,
        *,
        keeps_pages: bool,
        tracer: Tracer,
    ):
        """Open an empty book.

        Args:
          index: of the lane.
          pair: nobody else uses it.
          specustream: plans the ticks.
          counters: go on counting.
          keeps_pages: a request that loses its slot keeps its pages in the host's memory.
          tracer: is told what happened when.
        """
        self.index, self.pair, self.counters = index, pair, counters
        self.specustream = specustream
        self._deepest = pair.sizes.tiers[-1]
        self._keeps_pages, self._log = keeps_pages, LaneLog(index, tracer)
        self._requests: dict[str, RunningRequest] = {}  # all that are on the lane
        self._tasks: dict[str, Any] = {}  # PREFILL
        self._computable: list[str] = []  # of them, those with no tile left: they wait for their hand-off
        # Calls under way, the requests whose prompts they complete, and when they began.
        self._calls: collections.deque[tuple[Any, list[RunningRequest], float]] = collections.deque()
        self._transit: dict[str, Transit] = {}  # TRANSFER
        self._slots: dict[int, RunningRequest] = {}  # DECODE
        self._insertions: dict[int, int] = {}  # of each slot's holder
        self._num_insertions = 0
        self._kept: dict[str, Any] = {}  # PREEMPTED
        self._ticks: collections.deque[Tick] = collections.deque()
        self._last_tick_s = self._last_call_s = 0.0  # when a tick and a prefill call were last seen to end
        self._meter = LaneMeter()

    # --- state

    @property
    def num_before_slot(self) -> int:
        """Requests between admission and a slot."""
        return len(self._tasks) + len(self._transit)

    @property
    def decoding(self) -> bool:
        """Whether requests hold slots or ticks are unread."""
        return bool(self._slots or self._ticks)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._requests or self._ticks)

    def stats(self, now_s: float) -> LaneStats:
        """Take a snapshot for FlowGuard."""
        pair, page_size = self.pair, self.pair.sizes.page_size
        called_tiles = {False: 0, True: 0}
        for call, _, _ in self._calls:
            called_tiles[call.local] += sum(count for _, count in call.parts)
        return LaneStats(
            lane=self.index,
            is_up=pair.is_up,
            num_slots=pair.num_slots,
            free_slots=pair.free_slots,
            num_pages=pair.num_pages,
            free_pages=pair.free_pages,
            waiting=len(self._tasks) - len(self._computable),
            in_transit=self.num_before_slot,
            running=len(self._slots),
            queued_prefill_tokens=(pair.waiting_tiles + called_tiles[False]) * page_size,
            queued_local_tokens=(pair.waiting_local_tiles + called_tiles[True]) * page_size,
            transfer_backlog_bytes=sum(
                transit.item.transfer_bytes
                for request_id, transit in self._transit.items()
                if self._requests[request_id].stamps.transferred_s is None  # else it has come, and waits for a slot
            ),
            local_tokens=pair.local_tokens,
            page_tokens=page_size,
            pace=self._meter.pace(now_s),
        )

    def cached_tokens(self, running: RunningRequest) -> int:
        """Count the tokens of a request's prompt that the prefix cache holds."""
        return self.pair.cached_tokens(running.job().tokens)

    @property
    def tick_due_s(self) -> float:
        """When the oldest tick is expected to be done, by the loop's clock; `decoding` must hold."""
        assert self._ticks, "no tick is under way"
        return max(self._ticks[0].begun_s, self._last_tick_s) + self._meter.tick_s

    # --- stages

    def begin(self, running: RunningRequest, *, local: bool = False) -> Deferred | None:
        """Reserve the pages of a prompt; `local` computes it where it is decoded.

        Raises:
          ValueError: it can never be served.
        """
        shares = self.pair.colocated or local
        if shares and any(self._rank(request_id) < running.rank for request_id in self._kept):
            return Deferred("a preempted request waits for pages of the same pool")
        task = self.pair.begin_locally(running.job()) if local else self.pair.begin(running.job())
        if isinstance(task, Deferred):
            return task
        running.life.move(State.PREFILL)
        running.lane = self.index
        if not running.num_tokens:
            running.cached_tokens = task.cached_tokens
        self._requests[running.request_id] = running
        self._tasks[running.request_id] = task
        return None

    def note_computed(self, now_s: float) -> None:
        """See which prefill calls are done."""
        for entry in [entry for entry in self._calls if self.pair.is_computed(entry[0])]:
            self._calls.remove(entry)
            call, completed, begun_s = entry
            tokens = sum(count for _, count in call.parts) * self.pair.sizes.page_size
            if not call.local:  # what runs between ticks says nothing of the prefill mesh
                self._meter.called(tokens, now_s - max(begun_s, self._last_call_s))
                self._last_call_s = now_s
            here = [running for running in completed if self._requests.get(running.request_id) is running]
            self._log.called(tokens, len(call.parts), [running.request_id for running in here], begun_s, now_s)
            for running in here:
                running.stamps.prefilled(now_s)

    def prefill(self, now_s: float, max_calls: int) -> bool:
        """Dispatch a prefill call unless `max_calls` are under way on its mesh; whether it did.

        One at a time: what a hand-off does on the prefill mesh has to come before the next call there.
        """
        num_local = sum(call.local for call, _, _ in self._calls)
        call = self.pair.prefill() if len(self._calls) - num_local < max_calls else None
        if call is None and num_local < max_calls:
            call = self.pair.prefill_locally()
        if call is None:
            return False
        self.counters.prefill_calls += 1
        for task, _ in call.parts:
            running = self._requests[task.request_id]
            if running.stamps.scheduled_s is None:
                self._log.scheduled(running.request_id, running.stamps.arrival_s, now_s)
            running.stamps.scheduled(now_s)
        self._computable += [task.request_id for task in call.done]
        self._calls.append((call, [self._requests[task.request_id] for task in call.done], now_s))
        return True

    def hand_off(self, now_s: float) -> None:
        """Send computed prompts and kept pages on their way, as far as there are pages for them."""
        room = self.pair.free_slots + HAND_OFFS_AHEAD
        self._kept = {request_id: self.pair.bring_home(kept) for request_id, kept in self._kept.items()}
        blocked = False
        for request_id in sorted([*self._kept, *self._computable], key=self._rank):
            if len(self._transit) >= room:
                return
            if request_id in self._kept:
                blocked = blocked or not self._send(request_id, self.pair.resume, self._kept, now_s)
            elif self._has_its_pages(request_id) or not blocked:  # then it must not wait behind others
                if self._send(request_id, self.pair.hand_off, self._tasks, now_s):
                    self._computable.remove(request_id)
                else:
                    blocked = True

    def retry(self, now_s: float, timeout_s: float, max_attempts: int) -> list[RunningRequest]:
        """Begin hand-offs again that have not arrived in time; gives the requests that ran out of attempts."""
        lost = []
        for request_id, transit in list(self._transit.items()):
            if not self.pair.is_prompt_computed(transit.item):  # it is not under way yet
                self._transit[request_id] = transit._replace(begun_s=now_s)
                continue
            if now_s - transit.begun_s < timeout_s or self.pair.has_arrived(transit.item):
                continue
            if transit.attempts >= max_attempts:
                lost.append(self._requests[request_id])
                continue
            self.pair.abandon(transit.item)
            task, kept = transit.item.task, transit.item.kept
            item = self.pair.hand_off(task) if kept is None else self.pair.resume(kept)
            assert not isinstance(item, Deferred), "the pages it asks for have just been freed"
            self.counters.transfer_retries += 1
            self._transit[request_id] = Transit(item, now_s, transit.attempts + 1)
        return lost

    def insert(self, now_s: float) -> None:
        """Move what has arrived into free slots, without waiting for any."""
        for request_id in sorted(self._transit, key=self._rank):
            item, begun_s, _ = self._transit[request_id]
            if not self.pair.has_arrived(item):
                continue
            running = self._requests[request_id]
            if running.stamps.transferred_s is None:
                running.stamps.prefilled(now_s)  # a call whose end was not seen has ended by now
                running.stamps.transferred(now_s)
                if item.transfer_pages:
                    begun_s = max(begun_s, running.stamps.prefilled_s or 0.0)  # it was dispatched behind the last call
                    self._meter.arrived(len(running.job().tokens), item.transfer_bytes, now_s - begun_s)
                    self._log.arrived(running.request_id, item.transfer_pages, item.transfer_bytes, begun_s, now_s)
            if not self.pair.free_slots:
                continue
            if running.request.params.prompt_logprobs is not None and running.prompt_logprobs is None:
                running.set_prompt_logprobs(self.pair.read_prompt_logprobs(item))
            slot = self.pair.insert(item)
            del self._transit[request_id]
            running.life.move(State.DECODE)
            running.stamps.inserted_s = now_s
            self._slots[slot] = running
            self._num_insertions += 1
            self._insertions[slot] = self._num_insertions

    def make_room(self, now_s: float) -> Iterator[RunningRequest]:
        """Let every slot have pages for the next tick, the most important request first.

        Yields:
          The requests that lost their slot or their way to one for it, and have left the lane.
        """
        if len(self._ticks) >= TICKS_AHEAD:
            return  # other lanes are read first
        a_tick = self.pair.tokens_per_tick(self._deepest)
        for slot, running in sorted(self._slots.items(), key=lambda held: held[1].rank):
            if self._slots.get(slot) is not running:
                continue  # a more important one has just taken its place
            holder = (running, self._insertions[slot])
            unread = sum(tick.holders.get(slot) == holder for tick in self._ticks)
            # One more than the host knows: a first token is emitted before the first tick.
            wanted = min(running.num_positions + 1 + (unread + 1) * a_tick, running.max_positions)
            while self._slots.get(slot) is running and self.pair.ensure(slot, wanted) is not None:
                yield from self._deprive(now_s)

    def dispatch(self, now_s: float, num_waiting: int) -> None:
        """Dispatch a tick if any slot is held, and not too many are unread; `num_waiting` requests have no lane yet."""
        if self._slots and len(self._ticks) < TICKS_AHEAD:
            holders = {slot: (running, self._insertions[slot]) for slot, running in self._slots.items()}
            ticket = self.specustream.plan(self._load(num_waiting), now_s)
            self._ticks.append(Tick(self.pair.step(ticket.tier, ticket.step_plan), ticket, holders, now_s))
            self.counters.ticks += 1

    def _load(self, num_waiting: int) -> LaneLoad:
        """Say what there is to decode."""
        running = self._slots.values()
        prompts = sum(len(one.request.prompt_token_ids) for one in running)
        return LaneLoad(
            holders=self._insertions,
            waiting=num_waiting,
            in_transit=self.num_before_slot,
            free_pages=self.pair.free_pages / self.pair.num_pages,
            mean_length=sum(one.num_positions for one in running) / len(running),
            cached=sum(one.cached_tokens for one in running) / prompts,
        )

    def collect(self, clock: Callable[[], float]) -> Iterator[RunningRequest]:
        """Read ticks but for the last, or the last too when nothing runs behind it.

        Yields:
          The requests that have ended.
        """
        while len(self._ticks) > (1 if self._slots else 0):
            tick = self._ticks[0]
            output = self.pair.read(tick.pending)
            self._ticks.popleft()
            now_s = clock()
            begin_s, self._last_tick_s = max(tick.begun_s, self._last_tick_s), now_s  # they run one after the other
            self.specustream.learn(tick.ticket, output, now_s - begin_s, now_s)
            first, ended, rows, emitted = [], {}, 0, 0
            for slot, (running, insertion) in tick.holders.items():
                if self._insertions.get(slot) != insertion:
                    continue  # it left the slot in an earlier tick; this one ran before the host knew
                known = running.num_tokens
                if running.take(output, slot, now_s):
                    ended[slot] = running
                rows += 1
                emitted += running.num_tokens - known
                if running.num_tokens > known == 0:
                    emitted -= 1  # prefill has computed it
                    first.append(running.request_id)
            self._log.ticked(len(tick.holders), tick.ticket.tier, first, self.pair.free_pages, begin_s, now_s)
            self._meter.ticked(output, rows, emitted, now_s - begin_s, now_s)
            for running in ended.values():  # they are out before a slot is released: that may fail
                if running.invalid:
                    self.pair.forget(running.job())
                self._meter.held(now_s - running.stamps.inserted_s)
                del self._requests[running.request_id]
                yield running
                if not running.invalid:
                    self.pair.remember((*running.request.prompt_token_ids, *running.job().output))
            for slot in ended:
                self._leave_slot(slot)

    @property
    def ticking(self) -> bool:
        """Whether a tick is under way."""
        return bool(self._ticks)

    def has_output(self) -> bool:
        """Whether the oldest tick is done, so that `collect` does not wait for it."""
        return bool(self._ticks) and self.pair.is_done(self._ticks[0].pending)

    def note_end(self, ttft_s: float, tpot_s: float) -> None:
        """Take in the times of a request that was answered."""
        self._meter.ended(ttft_s, tpot_s)

    def decoding_requests(self) -> list[RunningRequest]:
        """List the requests that hold slots."""
        return list(self._slots.values())

    # --- ways out

    def drop(self, running: RunningRequest) -> None:
        """Take a request off the lane, wherever it is, and free what it holds."""
        request_id = running.request_id
        del self._requests[request_id]
        if request_id in self._transit:
            transit = self._transit.pop(request_id)
            self.pair.abandon(transit.item)
            if transit.item.task is not None:
                self.pair.drop(transit.item.task)
        elif request_id in self._tasks:
            self.pair.drop(self._tasks.pop(request_id))
            if request_id in self._computable:
                self._computable.remove(request_id)
        elif request_id in self._kept:
            del self._kept[request_id]
        else:
            self._leave_slot(next(slot for slot, holder in self._slots.items() if holder is running))

    def reset(self) -> tuple[list[RunningRequest], list[RunningRequest]]:
        """Empty the lane after a fault.

        Returns:
          The requests that were decoding, whose state is lost, and the others, which can begin again.
        """
        begun = (State.PREFILL, State.TRANSFER)
        kept = [self._requests[request_id] for request_id in self._kept]
        others = [running for running in self._requests.values() if running.life.state in begun]
        decoding = [running for running in self._requests.values() if running not in kept and running not in others]
        self._tasks.clear()
        self._computable.clear()
        self._calls.clear()
        self._transit.clear()
        self._slots.clear()
        self._insertions.clear()
        self._ticks.clear()
        self._requests = {running.request_id: running for running in kept}
        self.counters.resets += 1
        self.pair.reset()
        return decoding, others

    def evacuate(self) -> list[RunningRequest]:
        """Empty the lane when its machine is gone; gives all requests, which can begin or go on elsewhere."""
        decoding, others = self.reset()
        for running in decoding:
            running.life.move(State.PREEMPTED)
            running.num_preemptions += 1
        for running in others:
            running.life.move(State.WAITING)
        kept = list(self._requests.values())
        self._kept.clear()
        self._requests.clear()
        return [*decoding, *kept, *others]

    def abandon(self) -> None:
        """Drop everything under way, whatever the loop was doing."""
        if self.busy:
            self.reset()
        self._kept.clear()
        self._requests.clear()

    # --- parts of stages

    def _rank(self, request_id: str) -> tuple[int, float]:
        return self._requests[request_id].rank

    def _has_its_pages(self, request_id: str) -> bool:
        """Whether a request that is being computed holds pages of the decode mesh already."""
        return self.pair.colocated or self._tasks[request_id].local

    def _send(self, request_id: str, begin: Callable[[Any], Any], waiting: dict[str, Any], now_s: float) -> bool:
        """Start the way to the decode mesh; false while there are no pages for it."""
        item = begin(waiting[request_id])
        if isinstance(item, Deferred):
            return False
        del waiting[request_id]
        running = self._requests[request_id]
        running.life.move(State.TRANSFER)
        running.stamps.handed_off(now_s)
        running.transfer_pages += item.transfer_pages
        running.transfer_bytes += item.transfer_bytes
        local = item.task is not None and item.task.local
        self.counters.arrivals += item.task is not None and not local
        self.counters.local_prefills += local
        self.counters.kv_transfers += bool(item.transfer_pages)
        self.counters.kv_transfer_pages += item.transfer_pages
        self.counters.kv_transfer_bytes += item.transfer_bytes
        self._transit[request_id] = Transit(item, now_s, 1)
        return True

    def _deprive(self, now_s: float) -> Iterator[RunningRequest]:
        """Take its pages from the least important request that holds some for decoding; yields it if it leaves."""
        holders = [self._requests[request_id] for request_id in self._transit]
        holders += [self._requests[request_id] for request_id in self._tasks if self._has_its_pages(request_id)]
        victim = max([*holders, *self._slots.values()], key=lambda running: running.rank)
        if victim in holders:
            self.drop(victim)
            victim.life.move(State.WAITING)
            yield victim
        else:
            yield from self._preempt(next(slot for slot, held in self._slots.items() if held is victim), now_s)

    def _preempt(self, slot: int, now_s: float) -> Iterator[RunningRequest]:
        """Take a slot away; yields its request unless the lane keeps its pages."""
        running = self._slots[slot]
        self._log.preempted(running.request_id, now_s)
        self.counters.preemptions += 1
        running.num_preemptions += 1
        running.life.move(State.PREEMPTED)
        job = running.job()
        if self._keeps_pages and job.output:
            self._kept[running.request_id] = self.pair.rescue(slot, job)
            del self._slots[slot], self._insertions[slot]
            return
        self._leave_slot(slot)
        del self._requests[running.request_id]
        yield running

    def _leave_slot(self, slot: int) -> None:
        del self._slots[slot], self._insertions[slot]
        self.pair.release(slot)
