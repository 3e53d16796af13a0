"""The prompts that one stream pair is computing, and the prefill calls under way: the first stage of a lane.

It knows which tiles are dispatched and when a call is seen to end, and neither order nor slots. A prompt leaves it when
its hand-off begins, which may be before its last call has ended.
"""

import collections
from collections.abc import Mapping
from typing import Any

from streamserve.lane_counters import LaneCounters
from streamserve.lane_log import LaneLog
from streamserve.lane_meter import LaneMeter
from streamserve.pair_protocol import Pair
from streamserve.sequence import RunningRequest


class LanePrompts:
    """Requests in the state PREFILL, by their ids.

    Attributes:
      tasks: what the pair gave for each.
      computable: of them, those with no tile left: they wait for their hand-off.
    """

    def __init__(self, pair: Pair, counters: LaneCounters, meter: LaneMeter, log: LaneLog):
        """Begin without prompts; the lane's counters, meter and log are told of calls."""
        self.tasks: dict[str, Any] = {}
        self.computable: list[str] = []
        self._pair, self._counters, self._meter, self._log = pair, counters, meter, log
        # Calls under way, the requests whose prompts they complete, and when they began.
        self._calls: collections.deque[tuple[Any, list[RunningRequest], float]] = collections.deque()
        self._last_call_s = 0.0  # when a call on the prefill mesh was last seen to end

    @property
    def num_waiting(self) -> int:
        """Requests whose prompt no call has taken wholly."""
        return len(self.tasks) - len(self.computable)

    def queued_tokens(self, *, local: bool) -> int:
        """Prompt tokens, in whole tiles, that no call has taken or whose call has not ended.

        Args:
          local: those of prompts that are computed where they are decoded, or the others.
        """
        tiles = self._pair.waiting_local_tiles if local else self._pair.waiting_tiles
        tiles += sum(count for call, _, _ in self._calls if call.local == local for _, count in call.parts)
        return tiles * self._pair.sizes.page_size

    def has_its_pages(self, request_id: str) -> bool:
        """Whether a request that is being computed holds pages of the decode mesh already."""
        return self._pair.colocated or self.tasks[request_id].local

    def dispatch(self, now_s: float, max_calls: int, on_lane: Mapping[str, RunningRequest]) -> bool:
        """Dispatch a prefill call unless `max_calls` are under way on its mesh; whether it did.

        One at a time: what a hand-off does on the prefill mesh has to come before the next call there.
        """
        num_local = sum(call.local for call, _, _ in self._calls)
        call = self._pair.prefill() if len(self._calls) - num_local < max_calls else None
        if call is None and num_local < max_calls:
            call = self._pair.prefill_locally()
        if call is None:
            return False
        self._counters.prefill_calls += 1
        for task, _ in call.parts:
            running = on_lane[task.request_id]
            if running.stamps.scheduled_s is None:
                self._log.scheduled(running.request_id, running.stamps.arrival_s, now_s)
            running.stamps.scheduled(now_s)
        self.computable += [task.request_id for task in call.done]
        self._calls.append((call, [on_lane[task.request_id] for task in call.done], now_s))
        return True

    def note_computed(self, now_s: float, on_lane: Mapping[str, RunningRequest]) -> None:
        """See which calls are done.

        Requests that are not `on_lane` have left it since, and hear nothing of it; nor do those that have left and come
        back, whose prompts are computed anew under another task.
        """
        for entry in [entry for entry in self._calls if self._pair.is_computed(entry[0])]:
            self._calls.remove(entry)
            call, completed, begun_s = entry
            tokens = sum(count for _, count in call.parts) * self._pair.sizes.page_size
            if not call.local:  # what runs between ticks says nothing of the prefill mesh
                self._meter.called(tokens, now_s - max(begun_s, self._last_call_s))
                self._last_call_s = now_s
            here = [
                running
                for task, running in zip(call.done, completed, strict=True)
                if on_lane.get(running.request_id) is running and self.tasks.get(running.request_id, task) is task
            ]
            self._log.called(tokens, len(call.parts), [running.request_id for running in here], begun_s, now_s)
            for running in here:
                running.stamps.prefilled(now_s)

    def leave(self, request_id: str) -> Any:
        """Take a request out; gives its task."""
        if request_id in self.computable:
            self.computable.remove(request_id)
        return self.tasks.pop(request_id)

    def clear(self) -> None:
        """Forget all prompts and calls; the pair is reset."""
        self.tasks.clear()
        self.computable.clear()
        self._calls.clear()
