"""Who holds which decode slot of one stream pair, and the ticks dispatched over them: the last stage of a lane.

A slot may change hands while a tick that its former holder was in has not been read. So insertions are numbered, and a
tick's output goes to those who still hold their slot by the same insertion.
"""

import collections
from collections.abc import Callable
from typing import Any, NamedTuple

from streamserve.lane_counters import LaneCounters
from streamserve.lane_log import LaneLog
from streamserve.lane_meter import LaneMeter
from streamserve.pair_protocol import Pair
from streamserve.sequence import RunningRequest
from streamserve.specustream import LaneLoad, SpecuStream, Ticket

TICKS_AHEAD = 2  # ticks dispatched and not read: one runs while the host works on the one before


class Tick(NamedTuple):
    """A tick that was dispatched and not yet read, and who held which slot then."""

    pending: Any
    ticket: Ticket
    holders: dict[int, tuple[RunningRequest, int]]  # with the number of the insertion: a slot may change hands
    begun_s: float


class LaneSlots:
    """Requests in the state DECODE, by their slots.

    Attributes:
      holders: request in each slot that is held.
      insertions: number of the insertion by which it came there.
      ticks: dispatched and not read, the oldest first.
    """

    def __init__(self, pair: Pair, specustream: SpecuStream, counters: LaneCounters, meter: LaneMeter, log: LaneLog):
        """Begin with free slots; `specustream` plans the ticks, and the lane's counters, meter and log are told."""
        self.holders: dict[int, RunningRequest] = {}
        self.insertions: dict[int, int] = {}
        self.ticks: collections.deque[Tick] = collections.deque()
        self._pair, self._specustream, self._counters, self._meter, self._log = pair, specustream, counters, meter, log
        self._deepest = pair.sizes.tiers[-1]
        self._num_insertions = 0
        self._last_tick_s = 0.0  # when a tick was last seen to end

    # --- slots

    def hold(self, slot: int, running: RunningRequest) -> None:
        """Note that a request was inserted."""
        self.holders[slot] = running
        self._num_insertions += 1
        self.insertions[slot] = self._num_insertions

    def slot_of(self, running: RunningRequest) -> int:
        """Find a request's slot; it must hold one."""
        return next(slot for slot, holder in self.holders.items() if holder is running)

    def leave(self, slot: int) -> None:
        """Note that a slot was given up."""
        del self.holders[slot], self.insertions[slot]

    def clear(self) -> None:
        """Forget all slots and ticks; the pair is reset."""
        self.holders.clear()
        self.insertions.clear()
        self.ticks.clear()

    # --- ticks

    @property
    def is_ahead(self) -> bool:
        """Whether as many ticks are unread as may be."""
        return len(self.ticks) >= TICKS_AHEAD

    @property
    def must_read(self) -> bool:
        """Whether a tick is to be read: all but the last, or the last too when nothing runs behind it."""
        return len(self.ticks) > (1 if self.holders else 0)

    @property
    def due_s(self) -> float:
        """When the oldest tick is expected to be done, by the loop's clock; there must be one."""
        assert self.ticks, "no tick is under way"
        return max(self.ticks[0].begun_s, self._last_tick_s) + self._meter.tick_s

    def wanted_positions(self, slot: int) -> int:
        """Positions that a slot must have pages for before the next tick is dispatched."""
        running = self.holders[slot]
        holder = (running, self.insertions[slot])
        unread = sum(tick.holders.get(slot) == holder for tick in self.ticks)
        a_tick = self._pair.tokens_per_tick(self._deepest)
        # One more than the host knows: a first token is emitted before the first tick.
        return min(running.num_positions + 1 + (unread + 1) * a_tick, running.max_positions)

    def dispatch(self, now_s: float, *, waiting: int, in_transit: int) -> None:
        """Dispatch a tick if any slot is held, and not too many are unread.

        Args:
          now_s: clock reading.
          waiting: requests that have no lane yet.
          in_transit: requests on the lane that have no slot yet.
        """
        if self.holders and not self.is_ahead:
            holders = {slot: (running, self.insertions[slot]) for slot, running in self.holders.items()}
            ticket = self._specustream.plan(self._load(waiting, in_transit), now_s)
            self.ticks.append(Tick(self._pair.step(ticket.tier, ticket.step_plan), ticket, holders, now_s))
            self._counters.ticks += 1

    def _load(self, waiting: int, in_transit: int) -> LaneLoad:
        """Say what there is to decode."""
        running = self.holders.values()
        prompts = sum(len(one.request.prompt_token_ids) for one in running)
        return LaneLoad(
            holders=self.insertions,
            waiting=waiting,
            in_transit=in_transit,
            free_pages=self._pair.free_pages / self._pair.num_pages,
            mean_length=sum(one.num_positions for one in running) / len(running),
            cached=sum(one.cached_tokens for one in running) / prompts,
        )

    def read(self, clock: Callable[[], float]) -> tuple[float, dict[int, RunningRequest]]:
        """Wait for the oldest tick, and let the requests that were in it take over what it emitted.

        Returns:
          When it was seen to be done, and the requests that have ended, by their slots. They hold them still.
        """
        tick = self.ticks[0]
        output = self._pair.read(tick.pending)
        self.ticks.popleft()
        now_s = clock()
        begin_s, self._last_tick_s = max(tick.begun_s, self._last_tick_s), now_s  # they run one after the other
        self._specustream.learn(tick.ticket, output, now_s - begin_s, now_s)
        first, ended, rows, emitted = [], {}, 0, 0
        for slot, (running, insertion) in tick.holders.items():
            if self.insertions.get(slot) != insertion:
                continue  # it left the slot in an earlier tick; this one ran before the host knew
            known = running.num_tokens
            if running.take(output, slot, now_s):
                ended[slot] = running
            rows += 1
            emitted += running.num_tokens - known
            if running.num_tokens > known == 0:
                emitted -= 1  # prefill has computed it
                first.append(running.request_id)
        self._log.ticked(len(tick.holders), tick.ticket.tier, first, self._pair.free_pages, begin_s, now_s)
        self._meter.ticked(output, rows, emitted, now_s - begin_s, now_s)
        return now_s, ended
