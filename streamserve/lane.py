"""The scheduler's book on one stream pair: which request is at which stage of it, and the moves between the stages.

Each method does one stage's work without waiting for a device, but `collect`, which waits for a tick. What the lane
owes to the outside comes back as lists of requests; nothing is called back. What goes on within the first stage and
the last, prefill calls and ticks, is in `lane_prompts.py` and `lane_slots.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from streamserve.lane_counters import LaneCounters
from streamserve.lane_log import LaneLog
from streamserve.lane_meter import LaneMeter
from streamserve.lane_prompts import LanePrompts
from streamserve.lane_slots import LaneSlots
from streamserve.lifecycle import State
from streamserve.pair_protocol import Pair
from streamserve.sequence import RunningRequest
from streamserve.specustream import SpecuStream
from streamserve.trace import Tracer
from streamserve.types import Deferred, LaneStats

HAND_OFFS_AHEAD = 2  # hand-offs under way beyond the free slots: they take pages that running requests may need


class Transit(NamedTuple):
    """A hand-off under way."""

    item: Any
    begun_s: float
    attempts: int


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
        self._keeps_pages, self._log, self._meter = keeps_pages, LaneLog(index, tracer), LaneMeter()
        self._requests: dict[str, RunningRequest] = {}  # all that are on the lane
        self._prompts = LanePrompts(pair, counters, self._meter, self._log)  # PREFILL
        self._transit: dict[str, Transit] = {}  # TRANSFER
        self._slots = LaneSlots(pair, specustream, counters, self._meter, self._log)  # DECODE
        self._kept: dict[str, Any] = {}  # PREEMPTED

    # --- state

    @property
    def num_before_slot(self) -> int:
        """Requests between admission and a slot."""
        return len(self._prompts.tasks) + len(self._transit)

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return bool(self._requests or self._slots.ticks)

    def stats(self, now_s: float) -> LaneStats:
        """Take a snapshot for FlowGuard."""
        pair = self.pair
        return LaneStats(
            lane=self.index,
            is_up=pair.is_up,
            num_slots=pair.num_slots,
            free_slots=pair.free_slots,
            num_pages=pair.num_pages,
            free_pages=pair.free_pages,
            waiting=self._prompts.num_waiting,
            in_transit=self.num_before_slot,
            running=len(self._slots.holders),
            queued_prefill_tokens=self._prompts.queued_tokens(local=False),
            queued_local_tokens=self._prompts.queued_tokens(local=True),
            transfer_backlog_bytes=sum(
                transit.item.transfer_bytes
                for request_id, transit in self._transit.items()
                if self._requests[request_id].stamps.transferred_s is None  # else it has come, and waits for a slot
            ),
            local_tokens=pair.local_tokens,
            page_tokens=pair.sizes.page_size,
            pace=self._meter.pace(now_s),
        )

    def cached_tokens(self, running: RunningRequest) -> int:
        """Count the tokens of a request's prompt that the prefix cache holds."""
        return self.pair.cached_tokens(running.job().tokens)

    @property
    def tick_due_s(self) -> float:
        """When the oldest tick is expected to be done, by the loop's clock; `ticking` must hold."""
        return self._slots.due_s

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
        self._prompts.tasks[running.request_id] = task
        return None

    def note_computed(self, now_s: float) -> None:
        """See which prefill calls are done."""
        self._prompts.note_computed(now_s, self._requests)

    def prefill(self, now_s: float, max_calls: int) -> bool:
        """Dispatch a prefill call unless `max_calls` are under way on its mesh; whether it did."""
        return self._prompts.dispatch(now_s, max_calls, self._requests)

    def hand_off(self, now_s: float) -> None:
        """Send computed prompts and kept pages on their way, as far as there are pages for them."""
        room = self.pair.free_slots + HAND_OFFS_AHEAD
        self._kept = {request_id: self.pair.bring_home(kept) for request_id, kept in self._kept.items()}
        blocked = False
        for request_id in sorted([*self._kept, *self._prompts.computable], key=self._rank):
            if len(self._transit) >= room:
                return
            if request_id in self._kept:
                blocked = blocked or not self._send(request_id, self.pair.resume(self._kept[request_id]), now_s)
            elif self._prompts.has_its_pages(request_id) or not blocked:  # then it must not wait behind others
                sent = self._send(request_id, self.pair.hand_off(self._prompts.tasks[request_id]), now_s)
                blocked = blocked or not sent

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
            self._slots.hold(slot, running)

    def make_room(self, now_s: float) -> Iterator[RunningRequest]:
        """Let every slot have pages for the next tick, the most important request first.

        Yields:
          The requests that lost their slot or their way to one for it, and have left the lane.
        """
        if self._slots.is_ahead:
            return  # other lanes are read first
        holders = self._slots.holders
        for slot, running in sorted(holders.items(), key=lambda held: held[1].rank):
            if holders.get(slot) is not running:
                continue  # a more important one has just taken its place
            wanted = self._slots.wanted_positions(slot)
            while holders.get(slot) is running and self.pair.ensure(slot, wanted) is not None:
                yield from self._deprive(now_s)

    def dispatch(self, now_s: float, num_waiting: int) -> None:
        """Dispatch a tick if any slot is held, and not too many are unread; `num_waiting` requests have no lane yet."""
        self._slots.dispatch(now_s, waiting=num_waiting, in_transit=self.num_before_slot)

    def collect(self, clock: Callable[[], float]) -> Iterator[RunningRequest]:
        """Read ticks but for the last, or the last too when nothing runs behind it.

        Yields:
          The requests that have ended.
        """
        while self._slots.must_read:
            now_s, ended = self._slots.read(clock)
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
        return bool(self._slots.ticks)

    def has_output(self) -> bool:
        """Whether the oldest tick is done, so that `collect` does not wait for it."""
        ticks = self._slots.ticks
        return bool(ticks) and self.pair.is_done(ticks[0].pending)

    def note_end(self, ttft_s: float, tpot_s: float) -> None:
        """Take in the times of a request that was answered."""
        self._meter.ended(ttft_s, tpot_s)

    def decoding_requests(self) -> list[RunningRequest]:
        """List the requests that hold slots."""
        return list(self._slots.holders.values())

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
        elif request_id in self._prompts.tasks:
            self.pair.drop(self._prompts.leave(request_id))
        elif request_id in self._kept:
            del self._kept[request_id]
        else:
            self._leave_slot(self._slots.slot_of(running))

    def reset(self) -> tuple[list[RunningRequest], list[RunningRequest]]:
        """Empty the lane after a fault.

        Returns:
          The requests that were decoding, whose state is lost, and the others, which can begin again.
        """
        begun = (State.PREFILL, State.TRANSFER)
        kept = [self._requests[request_id] for request_id in self._kept]
        others = [running for running in self._requests.values() if running.life.state in begun]
        decoding = [running for running in self._requests.values() if running not in kept and running not in others]
        self._prompts.clear()
        self._transit.clear()
        self._slots.clear()
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

    def _send(self, request_id: str, item: Any, now_s: float) -> bool:
        """Note that a request is on its way to the decode mesh; false where there are no pages for it."""
        if isinstance(item, Deferred):
            return False
        if request_id in self._kept:
            del self._kept[request_id]
        else:
            self._prompts.leave(request_id)
        running = self._requests[request_id]
        running.life.move(State.TRANSFER)
        running.stamps.handed_off(now_s)
        running.transfer_pages += item.transfer_pages
        running.transfer_bytes += item.transfer_bytes
        self.counters.sent(item)
        self._transit[request_id] = Transit(item, now_s, 1)
        return True

    def _deprive(self, now_s: float) -> Iterator[RunningRequest]:
        """Take its pages from the least important request that holds some for decoding; yields it if it leaves."""
        holders = [self._requests[request_id] for request_id in self._transit]
        prompts = self._prompts
        holders += [self._requests[request_id] for request_id in prompts.tasks if prompts.has_its_pages(request_id)]
        victim = max([*holders, *self._slots.holders.values()], key=lambda running: running.rank)
        if victim in holders:
            self.drop(victim)
            victim.life.move(State.WAITING)
            yield victim
        else:
            yield from self._preempt(self._slots.slot_of(victim), now_s)

    def _preempt(self, slot: int, now_s: float) -> Iterator[RunningRequest]:
        """Take a slot away; yields its request unless the lane keeps its pages."""
        running = self._slots.holders[slot]
        self._log.preempted(running.request_id, now_s)
        self.counters.preemptions += 1
        running.num_preemptions += 1
        running.life.move(State.PREEMPTED)
        job = running.job()
        if self._keeps_pages and job.output:
            self._kept[running.request_id] = self.pair.rescue(slot, job)
            self._slots.leave(slot)
            return
        self._leave_slot(slot)
        del self._requests[running.request_id]
        yield running

    def _leave_slot(self, slot: int) -> None:
        self._slots.leave(slot)
        self.pair.release(slot)
