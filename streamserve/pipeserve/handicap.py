"""A stream pair that is slower, held up, or dead for a while, on purpose: what routing is tested against.

It stands before a real pair and only makes things seem to take longer: what a mesh has done is not shown before its
time. So a slow pair computes what it always computes, and its cores are free while it pretends.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from streamserve.types import Job, StepOutput, StepPlan


class Handicap(NamedTuple):
    """What is wrong with a pair.

    Attributes:
      slowdown: times, at least 1, that prefill calls and ticks seem to take.
      transfer_delay_s: seconds that a hand-off is held up.
      down_from_s: seconds from the pair's first request at which it dies; negative for never.
      down_until_s: seconds from its first request at which it is back.
    """

    slowdown: float = 1.0
    transfer_delay_s: float = 0.0
    down_from_s: float = -1.0
    down_until_s: float = -1.0


class _SlowedMesh:
    """When the work of a mesh, which runs in order, seems to be done."""

    def __init__(self, slowdown: float):
        self._slowdown = slowdown
        self._real_end_s = self._end_s = 0.0

    def due_s(self, begin_s: float, real_end_s: float) -> float:
        """Place the next piece of work, dispatched at `begin_s` and really done at `real_end_s`."""
        took_s = real_end_s - max(begin_s, self._real_end_s)
        self._real_end_s = real_end_s
        self._end_s = max(begin_s, self._end_s) + self._slowdown * took_s
        return self._end_s


class _Work:
    """Something dispatched: by identity, since what a pair gives out is opaque."""

    __slots__ = ("begin_s", "due_s", "thing")

    def __init__(self, thing: Any, begin_s: float):
        self.thing, self.begin_s = thing, begin_s
        self.due_s: float | None = None  # unknown before it is really done


class HandicappedPair:
    """A `pair_protocol.Pair` with a handicap. Times are seconds of `clock`, the loop's."""

    def __init__(
        self,
        pair: Any,
        handicap: Handicap,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Stand before a pair, with nothing on it.

        Args:
          pair: a `StreamPair`.
          handicap: what is wrong with it.
          clock: seconds, monotonic.
          sleep: waits for a tick that is really done.
        """
        self._pair, self._handicap, self._clock, self._sleep = pair, handicap, clock, sleep
        self._first_s: float | None = None
        self._forget()
        self.sizes = pair.sizes
        self.cached_tokens, self.resume = pair.cached_tokens, pair.resume
        self.begin_locally, self.read_prompt_logprobs = pair.begin_locally, pair.read_prompt_logprobs
        self.tokens_per_tick, self.ensure, self.release = pair.tokens_per_tick, pair.ensure, pair.release
        self.rescue, self.bring_home = pair.rescue, pair.bring_home
        self.forget, self.remember = pair.forget, pair.remember
        self.hand_off, self.abandon = pair.hand_off, pair.abandon

    # --- what it looks like

    @property
    def num_slots(self) -> int:
        """Decode slots."""
        return self._pair.num_slots

    @property
    def free_slots(self) -> int:
        """Decode slots that nobody holds."""
        return self._pair.free_slots

    @property
    def free_pages(self) -> int:
        """Pages of the decode mesh that nobody owns."""
        return self._pair.free_pages

    @property
    def num_pages(self) -> int:
        """Pages of the decode mesh that can be owned."""
        return self._pair.num_pages

    @property
    def waiting_tiles(self) -> int:
        """Tiles that no prefill call has taken."""
        return self._pair.waiting_tiles

    @property
    def is_broken(self) -> bool:
        """Whether nothing but `reset` helps."""
        return self._pair.is_broken

    @property
    def colocated(self) -> bool:
        """Whether prefill and decode share one mesh."""
        return self._pair.colocated

    @property
    def local_tokens(self) -> int:
        """Longest prompt that can be computed where it is decoded."""
        return self._pair.local_tokens

    @property
    def is_up(self) -> bool:
        """Whether it is not dead at the moment."""
        if self._first_s is None or self._handicap.down_from_s < 0:
            return True
        age_s = self._clock() - self._first_s
        return not self._handicap.down_from_s <= age_s < self._handicap.down_until_s

    # --- what takes longer

    def begin(self, job: Job) -> Any:
        """Reserve the pages of a prompt; the first one starts the pair's clock."""
        self._first_s = self._clock() if self._first_s is None else self._first_s
        return self._pair.begin(job)

    def prefill(self) -> Any:
        """Dispatch a prefill call."""
        return self._called(self._pair.prefill())

    def prefill_locally(self) -> Any:
        """Dispatch a prefill call on the decode mesh."""
        return self._called(self._pair.prefill_locally())

    def is_computed(self, call: Any) -> bool:
        """Whether a prefill call seems to be done."""
        work = self._calls.get(id(call))
        if work is None:
            return self._pair.is_computed(call)
        now_s = self._clock()
        if work.due_s is None and self._pair.is_computed(call):
            mesh = self._decode_mesh if call.local else self._prefill_mesh
            work.due_s = mesh.due_s(work.begin_s, now_s)
        if work.due_s is None or now_s < work.due_s:
            return False
        del self._calls[id(call)]
        for task in call.done:
            self._computed[id(task)] = _Work(task, work.due_s)  # it holds the task, whose id so stays its own
        return True

    def is_prompt_computed(self, item: Any) -> bool:
        """Whether the prefill of what travels seems to be done."""
        return self._pair.is_prompt_computed(item) and (item.task is None or id(item.task) in self._computed)

    def has_arrived(self, item: Any) -> bool:
        """Whether a hand-off seems to have arrived."""
        if not (self.is_prompt_computed(item) and self._pair.has_arrived(item)):
            return False
        if item.task is None:
            return True
        return self._clock() >= self._computed[id(item.task)].begin_s + self._handicap.transfer_delay_s

    def insert(self, item: Any) -> int:
        """Put an arrived request into a free slot."""
        self._computed.pop(id(item.task), None)
        return self._pair.insert(item)

    def drop(self, task: Any) -> None:
        """Forget a prompt that has begun."""
        self._computed.pop(id(task), None)
        self._pair.drop(task)

    def step(self, tier: int, plan: StepPlan) -> Any:
        """Dispatch a tick."""
        pending = self._pair.step(tier, plan)
        self._ticks[id(pending)] = _Work(pending, self._clock())
        return pending

    def is_done(self, pending: Any) -> bool:
        """Whether a tick seems to be done."""
        work = self._ticks.get(id(pending))
        if work is None:
            return self._pair.is_done(pending)
        if work.due_s is None and self._pair.is_done(pending):
            work.due_s = self._decode_mesh.due_s(work.begin_s, self._clock())
        return work.due_s is not None and self._clock() >= work.due_s

    def read(self, pending: Any) -> StepOutput:
        """Wait until a tick seems to be done, and bring its output to the host."""
        output = self._pair.read(pending)
        work = self._ticks.pop(id(pending), None)
        if work is not None:
            if work.due_s is None:
                work.due_s = self._decode_mesh.due_s(work.begin_s, self._clock())
            self._sleep(max(0.0, work.due_s - self._clock()))
        return output

    def reset(self) -> None:
        """Forget all requests."""
        self._forget()
        self._pair.reset()

    def _forget(self) -> None:
        self._prefill_mesh, self._decode_mesh = (_SlowedMesh(self._handicap.slowdown) for _ in range(2))
        self._calls: dict[int, _Work] = {}
        self._ticks: dict[int, _Work] = {}
        self._computed: dict[int, _Work] = {}  # prompts, since when they seem to be

    def _called(self, call: Any) -> Any:
        if call is not None:
            self._calls[id(call)] = _Work(call, self._clock())
        return call
