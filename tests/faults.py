"""Faults by plan, for lanes of any kind: what a device, a link or a host may do to an engine.

Nothing here is known to the engine: programs are wrapped, pages are taken or spoilt from outside.
"""

import collections
import dataclasses
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from streamserve.ending import Finished
from streamserve.kv.pages import PREFIX_CACHE, Owner, Stage
from streamserve.lane import Lane
from streamserve.lifecycle import State
from streamserve.pipeserve import StreamPair
from streamserve.pipeserve.prefiller import PrefillCall, PrefillTask
from streamserve.pipeserve.store import PageStore
from streamserve.scheduler import StreamScheduler
from streamserve.types import Job, Request
from tests.doubles import assert_empty
from tests.fake_programs import POISON, FakeArray, FakeClock, fake_scheduler

NOBODY = Owner(Stage.PREFILL, "nobody")  # has the pages that a test takes away
NEVER = float("inf")  # polls of a transfer that is lost

# Programs and the places of their donated arguments.
_TABLES = {
    **{"prefill": (2,), "local_prefill": (2,), "draft_prefill": (1,), "take": (), "put": (0,), "keep": ()},
    **{"restore": (0,), "step": (2, 3)},
}
_SINGLE = {"first": (), "local_first": (), "insert": (0,), "release": (0,), "read": ()}


class InjectedError(RuntimeError):
    """What a faulty program raises."""


class Kind(enum.Enum):
    """How a call goes wrong."""

    REFUSED = "it raises, and has touched nothing"
    LOST = "it raises, and what was donated to it is gone"
    LATE = "what it gives is ready only after a number of polls"


@dataclasses.dataclass(slots=True)
class Fault:
    """One line of a plan.

    Attributes:
      program: name of an attribute of `Programs`.
      kind: what happens.
      skip: calls that go well before.
      count: calls that go wrong.
      polls: of a late one.
      request_id: strikes only calls made for this request; None for any.
    """

    program: str
    kind: Kind = Kind.REFUSED
    skip: int = 0
    count: int = 1
    polls: float = NEVER
    request_id: str | None = None


class FaultyPrograms:
    """Forwards to programs, real or fake, but for the calls that the plan is about."""

    def __init__(self, programs: Any):
        self.plan: list[Fault] = []
        self.struck: list[Fault] = []
        self.working_for: str | None = None  # the request that the pair is busy with
        self._programs = programs
        self._late: dict[int, tuple[Any, float]] = {}  # by id of the leaf, which is held so that the id stays its own
        for name, donated in _TABLES.items():
            table = getattr(programs, name)
            setattr(self, name, {size: self._wrapped(name, donated, table, size) for size in table})

    def __getattr__(self, name: str) -> Any:
        if name in _SINGLE:
            return self._call(name, _SINGLE[name], lambda: getattr(self._programs, name))
        return getattr(self._programs, name)

    def transfer(self, tree: Any) -> tuple[Any, int]:
        """Start a copy that may come late, or never."""
        fault = self._next("transfer")
        if fault is not None and fault.kind is not Kind.LATE:
            raise InjectedError("the link is down")
        moved, moved_bytes = self._programs.transfer(tree)
        if fault is not None:
            leaf = jax.tree.leaves(moved)[0]
            self._late[id(leaf)] = (leaf, fault.polls)
        return moved, moved_bytes

    def is_ready(self, tree: Any) -> bool:
        """Ask all arrays of a tree; the late ones say no for a while."""
        ready = True
        for leaf in jax.tree.leaves(tree):
            if id(leaf) in self._late:
                _, polls = self._late[id(leaf)]
                self._late[id(leaf)] = (leaf, polls - 1)
                ready &= polls <= 0
        return self._programs.is_ready(tree) and ready

    def _wrapped(self, name: str, donated: Sequence[int], table: Mapping[Any, Any], size: Any) -> Callable[..., Any]:
        return self._call(name, donated, lambda: table[size])

    def _call(self, name: str, donated: Sequence[int], program: Callable[[], Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            fault = self._next(name)
            if fault is None:
                return program()(*args)
            if fault.kind is Kind.LOST:
                for leaf in jax.tree.leaves([args[place] for place in donated]):
                    leaf.delete()
            raise InjectedError(f"{name} failed on purpose")

        return call

    def _next(self, name: str) -> Fault | None:
        """Find the fault that strikes this call."""
        for fault in self.plan:
            if fault.program != name or fault.request_id not in (None, self.working_for):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            if fault.count:
                fault.count -= 1
                self.struck.append(fault)
                return fault
        return None


class FaultyPair(StreamPair):
    """A stream pair over faulty programs, which are told whom a call is made for. Its machine can be switched off."""

    def __init__(self, index: int, programs: Any):
        self.faults, self.switched_on = FaultyPrograms(programs), True
        super().__init__(index, self.faults)

    @property
    def is_up(self) -> bool:
        """Whether its machine is switched on."""
        return self.switched_on

    def prefill(self) -> PrefillCall | None:
        """Dispatch one prefill call; it counts as the oldest prompt's."""
        self.faults.working_for = self._prefiller.tasks[0].request_id if self._prefiller.tasks else None
        return super().prefill()

    def prefill_locally(self) -> PrefillCall | None:
        """Dispatch one prefill call on the decode mesh; likewise."""
        self.faults.working_for = self._local.tasks[0].request_id if self._local.tasks else None
        return super().prefill_locally()

    def hand_off(self, task: PrefillTask) -> Any:
        """Start a hand-off."""
        self.faults.working_for = task.request_id
        return super().hand_off(task)

    def resume(self, kept: Any) -> Any:
        """Start the way back of rescued pages."""
        self.faults.working_for = kept.job.request.request_id
        return super().resume(kept)

    def insert(self, item: Any) -> int:
        """Put an arrived request into a slot."""
        self.faults.working_for = item.job.request.request_id
        return super().insert(item)

    def rescue(self, slot: int, job: Job) -> Any:
        """Copy a slot's pages to the host's memory."""
        self.faults.working_for = job.request.request_id
        return super().rescue(slot, job)


# --- from outside


def exhaust(store: PageStore, *, leave: int = 0) -> tuple[int, ...]:
    """Take free pages away, as if another request had them; `restock` gives them back."""
    return store.ledger.acquire(max(store.num_free - leave, 0), NOBODY)


def restock(store: PageStore, pages: Sequence[int]) -> None:
    """Give pages back; after a reset there is nothing to give."""
    store.ledger.release([page for page in pages if store.ledger.owner(page) == NOBODY], NOBODY)


def poison(store: PageStore, page: int, place: int = 0) -> None:
    """Make one position of a page not finite, in the target's pool."""
    target = store.pools.target
    if isinstance(target, FakeArray):
        target.get(target.place)[page, place] = POISON
        return
    with jax.transfer_guard("allow"):

        def spoil(leaf: jax.Array) -> jax.Array:
            return jax.device_put(leaf.at[page, :, place].set(jnp.nan), leaf.sharding)

        store.pools = store.pools.replace(target=jax.tree.map(spoil, target))


def pages_of(store: PageStore, request_id: str) -> list[int]:
    """List the pages that a request owns, in no order."""
    return [page for page, owner in store.ledger.held().items() if owner.holder == request_id]


# --- an engine under test


class Bench:
    """Lanes, a scheduler and a clock; the books are audited after every step."""

    def __init__(self, pairs: Sequence[FaultyPair], **config: Any):
        self.pairs, self.clock = tuple(pairs), FakeClock()
        self.scheduler = fake_scheduler(self.pairs, clock=self.clock, **config)
        self.requests: dict[str, Request] = {}
        self.ends: dict[str, Finished] = {}

    @property
    def faults(self) -> FaultyPrograms:
        """The programs of the first lane."""
        return self.pairs[0].faults

    def submit(self, *requests: Request) -> None:
        """Let requests wait."""
        for request in requests:
            self.requests[request.request_id] = request
            self.scheduler.submit(request)

    def sleep(self, seconds: float) -> None:
        """Let the engine's clock go on, after what is under way on real devices: they know nothing of it."""
        for lane in self.scheduler.lanes:
            for transit in lane._transit.values():
                jax.block_until_ready((transit.item.prefix, [group.pages for group in transit.item.groups]))
        self.clock.sleep(seconds)

    def step(self) -> None:
        """Go one step, and audit."""
        self.take(self.scheduler.step())
        audit(self.scheduler)

    def take(self, ends: Iterable[Finished]) -> None:
        """Note ends; each request has one."""
        for end in ends:
            assert end.request_id not in self.ends, f"{end.request_id} ended twice"
            self.ends[end.request_id] = end

    def state(self, request_id: str) -> State:
        """Where a request is."""
        if request_id in self.ends:
            return self.ends[request_id].state
        return self.scheduler._roster.known[request_id].life.state

    def until(self, request_id: str, state: State, *, limit: int = 3000) -> None:
        """Go on until a request is in a state."""
        for _ in range(limit):
            if self.state(request_id) is state:
                return
            self.step()
        raise AssertionError(f"{request_id} is in {self.state(request_id)}, not in {state}, after {limit} steps")

    def drain(self, *, limit: int = 6000) -> dict[str, Finished]:
        """Serve all to their ends; nothing may be left behind."""
        for _ in range(limit):
            if self.scheduler.idle:
                break
            self.step()
        else:
            raise AssertionError(f"no end in sight: {vars(self.scheduler.counters())}")
        assert set(self.ends) == set(self.requests)
        assert_empty(self.pairs)
        return self.ends


def audit(scheduler: StreamScheduler) -> None:
    """Assert that each request is in one place, and that each page has the owner and readers that the books say."""
    known, waiting = scheduler._roster.known, scheduler._roster.queue._entries
    places = list(waiting)
    for lane in scheduler.lanes:
        tasks, holders = lane._prompts.tasks, lane._slots.holders
        slots = {running.request_id for running in holders.values()}
        for place, state in ((tasks, State.PREFILL), (lane._transit, State.TRANSFER), (slots, State.DECODE)):
            places += place
            wrong = {name: known[name].life.state for name in place if known[name].life.state is not state}
            assert not wrong, f"in the place of {state}: {wrong}"
        places += lane._kept
        assert set(lane._requests) == {*tasks, *lane._transit, *slots, *lane._kept}
        assert set(lane._prompts.computable) <= set(tasks)
        assert len(lane._slots.ticks) <= 2, "ticks pile up"
        assert holders.keys() == lane._slots.insertions.keys() == lane.pair._decoder._holders.keys()
        for slot, running in holders.items():
            holder = lane.pair._decoder._holders[slot]
            assert holder.request is running.request
            assert holder.holding.owner == Owner(Stage.SLOT, running.request_id)
            # A draft reads the last token of a prompt anew, and so writes to its page: nobody else may read that one.
            last = holder.holding.pages[(len(running.request.prompt_token_ids) - 1) // lane.pair.sizes.page_size]
            assert running.num_preemptions or last not in holder.holding.shared, "a page that is read is written to"
        _audit_pages(lane)
    assert sorted(places) == sorted(known), "a request is in two places, or in none"


def _audit_pages(lane: Lane) -> None:
    pair = lane.pair
    tasks = [*lane._prompts.tasks.values(), *(transit.item.task for transit in lane._transit.values())]
    before = [task.holding for task in tasks if task is not None and not task.local]
    after = [task.holding for task in lane._prompts.tasks.values() if task.local]
    after += [transit.item.holding for transit in lane._transit.values()]
    after += [holder.holding for holder in pair._decoder._holders.values()]
    sides = [(pair.prefill_store, before), (pair.decode_store, after)]
    if pair.colocated:
        sides = [(pair.decode_store, list({id(holding): holding for holding in before + after}.values()))]
    for store, holdings in sides:
        store.ledger.check()
        own = {page: holding.owner for holding in holdings for page in holding.own}
        assert len(own) == sum(len(holding.own) for holding in holdings), "a page is in two holdings"
        read = collections.defaultdict(set)
        for holding in holdings:
            for page in holding.shared:
                read[page].add(holding.owner)
        for page, owner in store.ledger.held().items():
            held = owner in (PREFIX_CACHE, NOBODY) or own.pop(page, None) == owner
            assert held, f"{owner} has left page {page} behind"
            assert store.ledger.readers(page) == read.pop(page, set()), f"page {page} of {owner}"
            assert owner != PREFIX_CACHE or page in store.tree._nodes or store.ledger.num_readers(page)
        assert not own, f"holdings without an owner in the ledger: {own}"
        assert not read, f"readings that are not in the ledger: {read}"
