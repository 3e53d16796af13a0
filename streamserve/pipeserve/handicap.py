"""A stream pair that is slower, held up, or dead for a while, on purpose: what routing is tested against.

It stands before a real pair and only makes things seem to take longer: what a mesh has done is not shown before its
time. So a slow pair computes what it always computes, and its cores are free while it pretends.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from streamserve.types import Job, StepOutput, StepPlan

_POLL_S = 0.0005  # how often a tick that is waited for is asked


class Handicap(NamedTuple):
    """What is wrong with a pair.

    Attributes:
      slowdown: times, at least 1, that prefill calls and ticks seem to take.
      transfer_delay_s: seconds that pages are held up on their way from the prefill to the decode mesh.
      down_from_s: seconds from the pair's first request at which it dies; negative for never.
      down_until_s: seconds from its first request at which it is back.
    """

    slowdown: float = 1.0
    transfer_delay_s: float = 0.0
    down_from_s: float = -1.0
    down_until_s: float = -1.0


class _Work:
    """Something dispatched."""

    __slots__ = ("begin_s", "due_s", "thing")

    def __init__(self, thing: Any, begin_s: float):
        self.thing, self.begin_s = thing, begin_s
        self.due_s: float | None = None  # unknown before it is really done


class _SlowedMesh:
    """When the work of a mesh, which runs in order, seems to be done.

    What was dispatched is known by its identity, since what a pair gives out is opaque; it is held so that this stays
    its own. How long it took is seen by asking often: all that is under way, not only what is waited for.
    """

    def __init__(self, slowdown: float, is_done: Callable[[Any], bool]):
        self._slowdown, self._is_done = slowdown, is_done
        self._real_end_s = self._end_s = 0.0
        self._works: dict[int, _Work] = {}  # in the order of dispatch

    def __contains__(self, thing: Any) -> bool:
        return id(thing) in self._works

    def add(self, thing: Any, now_s: float) -> None:
        """Note what was dispatched."""
        self._works[id(thing)] = _Work(thing, now_s)

    def watch(self, now_s: float) -> None:
        """See what is really done."""
        for work in self._works.values():
            if work.due_s is None:
                if not self._is_done(work.thing):
                    return
                took_s = now_s - max(work.begin_s, self._real_end_s)
                self._real_end_s = now_s
                self._end_s = work.due_s = max(work.begin_s, self._end_s) + self._slowdown * took_s

    def due_s(self, thing: Any) -> float | None:
        """When it seems to be done; None as long as it is not really done."""
        return self._works[id(thing)].due_s

    def things(self) -> list[Any]:
        """List what was dispatched and not forgotten."""
        return [work.thing for work in self._works.values()]

    def take(self, thing: Any) -> None:
        """Forget it."""
        del self._works[id(thing)]


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
          sleep: passes the time while a tick is waited for.
        """
        self._pair, self._handicap, self._clock, self._sleep = pair, handicap, clock, sleep
        self._first_s: float | None = None
        self._forget()
        self.sizes = pair.sizes
        self.cached_tokens, self.resume = pair.cached_tokens, pair.resume
        self.read_prompt_logprobs = pair.read_prompt_logprobs
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
    def waiting_local_tiles(self) -> int:
        """Tiles that no prefill call on the decode mesh has taken."""
        return self._pair.waiting_local_tiles

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
        self._start()
        return self._pair.begin(job)

    def begin_locally(self, job: Job) -> Any:
        """Reserve pages for a prompt on the decode mesh, likewise."""
        self._start()
        return self._pair.begin_locally(job)

    def _start(self) -> None:
        self._first_s = self._clock() if self._first_s is None else self._first_s

    def prefill(self) -> Any:
        """Dispatch a prefill call."""
        return self._called(self._pair.prefill())

    def prefill_locally(self) -> Any:
        """Dispatch a prefill call on the decode mesh."""
        return self._called(self._pair.prefill_locally())

    def is_computed(self, call: Any) -> bool:
        """Whether a prefill call seems to be done."""
        self._watch()
        mesh = self._local_calls if call.local else self._calls
        due_s = mesh.due_s(call)
        if due_s is None or self._clock() < due_s:
            return False
        mesh.take(call)
        for task in call.done:
            if self._dropped.pop(id(task), None) is not None:
                continue
            self._computed[id(task)] = (task, due_s)  # it holds the task, whose id so stays its own
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
        delay_s = self._handicap.transfer_delay_s if item.transfer_pages else 0.0
        return self._clock() >= self._computed[id(item.task)][1] + delay_s

    def insert(self, item: Any) -> int:
        """Put an arrived request into a free slot."""
        self._computed.pop(id(item.task), None)
        return self._pair.insert(item)

    def drop(self, task: Any) -> None:
        """Forget a prompt that has begun."""
        if self._computed.pop(id(task), None) is None and self._is_being_computed(task):
            self._dropped[id(task)] = task
        self._pair.drop(task)

    def step(self, tier: int, plan: StepPlan) -> Any:
        """Dispatch a tick."""
        self._watch()
        pending = self._pair.step(tier, plan)
        self._ticks.add(pending, self._clock())
        return pending

    def is_done(self, pending: Any) -> bool:
        """Whether a tick seems to be done."""
        self._watch()
        due_s = self._ticks.due_s(pending)
        return due_s is not None and self._clock() >= due_s

    def read(self, pending: Any) -> StepOutput:
        """Wait until a tick seems to be done, and bring its output to the host."""
        while not self.is_done(pending):
            self._sleep(_POLL_S)
        self._ticks.take(pending)
        return self._pair.read(pending)

    def reset(self) -> None:
        """Forget all requests."""
        self._forget()
        self._pair.reset()

    def _forget(self) -> None:
        slowdown, pair = self._handicap.slowdown, self._pair
        self._calls, self._local_calls = (_SlowedMesh(slowdown, pair.is_computed) for _ in range(2))
        self._ticks = _SlowedMesh(slowdown, pair.is_done)
        self._computed: dict[int, tuple[Any, float]] = {}  # prompts, and since when they seem to be
        self._dropped: dict[int, Any] = {}  # prompts that were dropped while their last call was under way

    def _is_being_computed(self, task: Any) -> bool:
        calls = [*self._calls.things(), *self._local_calls.things()]
        return any(task is one for call in calls for one in call.done)

    def _watch(self) -> None:
        now_s = self._clock()
        for mesh in (self._calls, self._local_calls, self._ticks):
            mesh.watch(now_s)

    def _called(self, call: Any) -> Any:
        self._watch()
        if call is not None:
            (self._local_calls if call.local else self._calls).add(call, self._clock())
        return call
