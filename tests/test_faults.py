"""Faults by plan: each costs those who were in it and nobody else, nothing stays behind, and the lane serves on.

On lanes without devices every fault is tried; on the tiny model those that touch arrays.
"""

import dataclasses
import functools

from absl.testing import parameterized

from streamserve.lifecycle import State
from tests import doubles
from tests.doubles import plain_greedy, tiny_params
from tests.fake_programs import FakePrograms, quiet_output
from tests.faults import NEVER, Bench, Fault, FaultyPair, Kind, exhaust, pages_of, poison, restock

TARGET = tiny_params(0)
# What is handed over and what becomes of the preempted, on meshes apart; and one mesh for both.
LAYOUTS = (
    {"draft_kv": "transfer", "preemption": "recompute"},
    {"draft_kv": "recompute", "preemption": "keep"},
    {"colocated": True, "preemption": "recompute"},
    {"colocated": True, "preemption": "keep"},
)
REAL = LAYOUTS[:2]
STATES = (State.WAITING, State.PREFILL, State.TRANSFER, State.DECODE, State.PREEMPTED)


@functools.cache
def _real_programs(draft_kv: str, preemption: str):
    return doubles.tiny_pairs(3, num_pairs=1, draft_kv=draft_kv, preemption=preemption)[0].programs


@functools.cache
def _real_output(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    return tuple(plain_greedy(TARGET, prompt, max_tokens))


class FaultCase(parameterized.TestCase):
    """What is asserted of every bench."""

    def bench(self, layout, *, real=False, config=None, **sizes) -> Bench:
        programs = _real_programs(**layout) if real else FakePrograms(**layout, **sizes)
        self.real = real
        return Bench([FaultyPair(0, programs)], **(config or {}))

    def request(self, name, length=5, max_tokens=None, **fields):
        max_tokens = (48 if self.real else 20) if max_tokens is None else max_tokens
        prompt = tuple((ord(name[0]) + 3 * place + place * place) % 13 for place in range(length))
        return doubles.make_request(name, prompt, max_tokens=max_tokens, **fields)

    def assert_all_well(self, bench, *, but=(), state=State.FAILED, saying=""):
        """Serve to the end: all but some are answered as in a quiet run, and so is one who comes later."""
        bench.drain()
        bench.submit(self.request("late", 11))
        for name, end in bench.drain().items():
            if name in but:
                self.assertEqual(end.state, state, end)
                self.assertRegex(end.error, saying)
                self.assertIsNone(end.completion)
            else:
                self.assertEqual(end.state, State.FINISHED, end)
                request = bench.requests[name]
                whole = (request.prompt_token_ids, request.params.max_tokens)
                self.assertEqual(end.completion.token_ids, _real_output(*whole) if self.real else quiet_output(request))


class ProgramsFailTest(FaultCase):
    """One call of one program raises, with what was donated to it or without."""

    def broken(self, layout, program, kind, real=False, **fault):
        """Break a program while `a` decodes and `b` comes."""
        bench = self.bench(layout, real=real)
        bench.submit(self.request("a"))
        bench.until("a", State.DECODE)
        bench.faults.plan.append(Fault(program, kind, **fault))
        bench.submit(self.request("b", 9))
        bench.submit(self.request("c", 14))
        return bench

    @parameterized.product(layout=LAYOUTS, program=("prefill", "draft_prefill", "first", "take", "put", "insert"))
    def test_who_was_in_a_call_that_is_refused_fails_alone(self, layout, program):
        bench = self.broken(layout, program, Kind.REFUSED, request_id="b")
        if not self.has(bench, program):
            return
        self.assert_all_well(bench, but=("b",), saying="on purpose")
        self.assertEqual(bench.scheduler.counters().resets, 0)

    @parameterized.product(layout=LAYOUTS, program=("prefill", "draft_prefill", "put", "insert"))
    def test_a_call_that_takes_pages_with_it_costs_those_who_decode_too(self, layout, program):
        bench = self.broken(layout, program, Kind.LOST, request_id="b")
        if not self.has(bench, program):
            return
        self.assert_all_well(bench, but=("a", "b"), saying="on purpose")
        self.assertEqual(bench.scheduler.counters().resets, 1)

    @parameterized.product(layout=LAYOUTS, program=("step", "read"), kind=(Kind.REFUSED, Kind.LOST))
    def test_a_tick_that_fails_costs_those_who_decode(self, layout, program, kind):
        bench = self.bench(layout)
        bench.submit(self.request("a"))
        bench.until("a", State.DECODE)
        bench.faults.plan += [Fault("transfer", Kind.LATE, polls=9), Fault(program, kind)]
        bench.submit(self.request("b", 9))
        self.assert_all_well(bench, but=("a",), saying="on purpose")
        self.assertEqual(bench.scheduler.counters().resets, 1)

    @parameterized.product(layout=LAYOUTS, kind=(Kind.REFUSED, Kind.LOST))
    def test_a_release_that_fails_takes_no_output_with_it(self, layout, kind):
        bench = self.bench(layout)
        bench.submit(self.request("a", max_tokens=3), self.request("b", max_tokens=3), self.request("c", 9))
        bench.faults.plan.append(Fault("release", kind))
        bench.until("a", State.FINISHED)
        self.assertEqual(bench.state("b"), State.FINISHED)  # in the same tick
        self.assert_all_well(bench, but=("c",), saying="on purpose")

    @parameterized.product(layout=LAYOUTS, kind=(Kind.REFUSED, Kind.LOST))
    def test_a_release_that_fails_does_not_hold_up_who_is_cancelled(self, layout, kind):
        bench = self.bench(layout)
        bench.submit(self.request("a"), self.request("b"))
        bench.until("b", State.DECODE)
        bench.faults.plan.append(Fault("release", kind))
        self.assertTrue(bench.scheduler.cancel("a"))
        bench.step()
        self.assertEqual(bench.state("a"), State.CANCELLED)
        self.assertEqual(bench.ends.pop("b").error, "release failed on purpose")
        del bench.requests["a"], bench.requests["b"], bench.ends["a"]
        self.assert_all_well(bench)

    @parameterized.product(program=("first", "take", "put", "insert"), layout=LAYOUTS)
    def test_a_request_that_always_fails_does_not_come_back(self, program, layout):
        bench = self.broken(layout, program, Kind.REFUSED, request_id="b", count=10**9)
        if self.has(bench, program):
            self.assert_all_well(bench, but=("b",), saying=f"{program} failed on purpose")
            self.assertLen(bench.faults.struck, 1)

    @parameterized.product(layout=LAYOUTS)
    def test_a_link_that_is_down_costs_who_needs_it(self, layout):
        bench = self.broken(layout, "transfer", Kind.REFUSED, request_id="b")
        self.assert_all_well(bench, but=("b",), saying="the link is down")

    @parameterized.product(layout=(LAYOUTS[1], LAYOUTS[3]), program=("keep", "restore"), kind=(Kind.REFUSED, Kind.LOST))
    def test_a_rescue_that_fails_costs_who_is_rescued(self, layout, program, kind):
        bench = self.bench(layout)
        bench.submit(self.request("a"))
        bench.until("a", State.DECODE)
        bench.step()
        bench.faults.plan.append(Fault(program, kind))
        taken = exhaust(bench.pairs[0].decode_store)
        for _ in range(4):
            bench.step()
        restock(bench.pairs[0].decode_store, taken)
        bench.submit(self.request("b", 9))
        self.assert_all_well(bench, but=("a",), saying=f"{program} failed on purpose")
        self.assertLen(bench.faults.struck, 1)

    @parameterized.product(
        layout=REAL, fault=(("prefill", Kind.REFUSED), ("prefill", Kind.LOST), ("step", Kind.LOST), ("put", Kind.LOST))
    )
    def test_the_tiny_model_survives_them(self, layout, fault):
        program, kind = fault
        bench = self.bench(layout, real=True)
        bench.submit(self.request("a"))
        bench.until("a", State.DECODE)
        bench.faults.plan.append(Fault(program, kind))
        if program == "step":
            bench.faults.plan.append(Fault("transfer", Kind.LATE, polls=9))  # `b` is on its way then
        bench.submit(self.request("b", 9))
        lost = (() if program == "step" else ("b",)) + (("a",) if kind is Kind.LOST else ())
        self.assert_all_well(bench, but=lost, saying="on purpose")

    def has(self, bench, program):
        return bool(getattr(bench.faults, program))


class HandOffTest(FaultCase):
    """Pages that come late, or never."""

    @parameterized.product(layout=LAYOUTS[:3], polls=(1, 7, 60))
    def test_a_late_transfer_is_waited_for(self, layout, polls):
        bench = self.bench(layout)
        bench.faults.plan.append(Fault("transfer", Kind.LATE, polls=polls, request_id="b"))
        bench.submit(self.request("a"), self.request("b", 13), self.request("c", 9))
        self.assert_all_well(bench)
        self.assertEqual(bench.scheduler.counters().transfer_retries, 0)

    @parameterized.product(layout=LAYOUTS, real=(False, True))
    def test_a_lost_transfer_is_begun_again_and_fails_after_the_last_attempt(self, layout, real):
        if real and layout not in REAL:
            return
        for count, but in ((1, ()), (2, ()), (3, ("b",))):
            bench = self.bench(layout, real=real, config={"max_transfers": 3, "transfer_timeout_s": 2.0})
            bench.submit(self.request("a"), self.request("b", 13), self.request("c", 9))
            for attempt in range(count):  # the first transfer of each is lost: that of the first token
                bench.faults.plan.append(Fault("transfer", Kind.LATE, request_id="b"))
                while len(bench.faults.struck) == attempt:
                    bench.step()
                    bench.sleep(0.2)
                self.assertEqual(bench.state("b"), State.TRANSFER)
            for _ in range(20):
                bench.sleep(0.5)
                bench.step()
            self.assert_all_well(bench, but=but, saying=r"did not arrive on the decode mesh in 3 attempts of 2.0 s")

    @parameterized.product(layout=(LAYOUTS[1], LAYOUTS[3]), real=(False, True))
    def test_rescued_pages_that_are_lost_on_the_way_back_are_sent_again(self, layout, real):
        if real and layout not in REAL:
            return
        bench = self.bench(layout, real=real, config={"transfer_timeout_s": 2.0})
        bench.submit(self.request("a", 9))
        bench.until("a", State.DECODE)
        bench.step()
        bench.faults.plan.append(Fault("transfer", Kind.LATE))
        taken = exhaust(bench.pairs[0].decode_store)
        bench.until("a", State.PREEMPTED)
        restock(bench.pairs[0].decode_store, taken)
        bench.until("a", State.TRANSFER)
        bench.sleep(3.0)
        self.assert_all_well(bench)
        self.assertEqual(bench.scheduler.counters().transfer_retries, 1)

    @parameterized.product(layout=LAYOUTS)
    def test_the_time_of_a_prompt_is_not_counted_as_that_of_its_transfer(self, layout):
        polls = lambda what: 40 if what == "call" else 2  # noqa: E731
        bench = self.bench(layout, config={"transfer_timeout_s": 1.0}, polls=polls)
        bench.submit(self.request("a"), self.request("b", 13))
        for _ in range(60):
            bench.sleep(0.2)
            bench.step()
        self.assert_all_well(bench)
        self.assertEqual(bench.scheduler.counters().transfer_retries, 0)

    @parameterized.product(layout=LAYOUTS)
    def test_a_host_that_stalls_breaks_nothing(self, layout):
        bench = self.bench(layout)
        bench.submit(*(self.request(name, 7) for name in "abcdef"))
        for _ in range(6):
            bench.step()
            bench.sleep(1000.0)
        self.assert_all_well(bench)
        self.assertEqual(bench.scheduler.counters().transfer_retries, 0)


class NumbersThatAreNotFiniteTest(FaultCase):
    @parameterized.product(layout=LAYOUTS, real=(False, True))
    def test_they_end_their_request_and_no_other(self, layout, real):
        if real and layout not in REAL:
            return
        bench = self.bench(layout, real=real)
        bench.submit(*(self.request(name, 9) for name in "abc"))
        for name in "abc":
            bench.until(name, State.DECODE)
        store = bench.pairs[0].decode_store
        poison(store, min(pages_of(store, "b")))
        taken = store.num_free
        bench.until("b", State.FAILED)
        self.assertGreater(store.num_free, taken)
        # Those who get its pages write over them, and mind nothing beyond their own length.
        bench.submit(*(self.request(name, 9, 17) for name in "defg"))
        self.assert_all_well(bench, but=("b",), saying=r"not finite \(NaN or infinite\) after \d+ tokens")

    @parameterized.product(layout=LAYOUTS, real=(False, True))
    def test_a_cached_prefix_with_them_fails_one_request_and_is_forgotten(self, layout, real):
        if real and layout not in REAL:
            return
        bench = self.bench(layout, real=real)
        bench.submit(self.request("a1", 26, 4))
        bench.drain()
        store = bench.pairs[0].prefill_store
        self.assertGreater(store.tree.num_pages, 1)
        poison(store, max(store.ledger.held()))
        bench.submit(self.request("a2", 26, 4))
        bench.until("a2", State.FAILED)
        self.assertEqual(store.tree.num_pages, 0)
        bench.submit(self.request("a3", 26, 4))
        self.assert_all_well(bench, but=("a2",), saying="not finite")
        self.assertEqual(bench.ends["a3"].metrics.cached_tokens, 0)


class EveryStateTest(FaultCase):
    """A request is cancelled, or its time runs out, wherever it is."""

    def brought(self, layout, state, real, timeout_s=None):
        """Bring `x` to a state, among others."""
        bench = self.bench(layout, real=real, config={"transfer_timeout_s": 1e6})
        length = {True: 70, False: 25}[real] if state is State.PREFILL else 9  # longer than two calls
        one = dataclasses.replace(
            self.request("x", length, 14 if state is State.PREFILL else None), timeout_s=timeout_s
        )
        if state is State.WAITING:
            bench.submit(*(self.request(name, 9, 14) for name in "abcdefgh"), one)
            bench.step()
        elif state is State.TRANSFER:
            bench.faults.plan.append(Fault("transfer", Kind.LATE, polls=NEVER, request_id="x"))
            bench.submit(one, self.request("a", 9))
        else:
            bench.submit(self.request("a", 9), one)
        self.taken = ()
        if state is State.PREEMPTED:
            bench.until("x", State.DECODE)
            bench.step()
            self.taken = exhaust(bench.pairs[0].decode_store)
        bench.until("x", state)
        self.assertEqual(bench.state("x"), state)
        return bench

    @parameterized.product(layout=LAYOUTS, state=STATES, real=(False, True))
    def test_it_is_cancelled(self, layout, state, real):
        if real and layout not in REAL:
            return
        bench = self.brought(layout, state, real)
        self.assertTrue(bench.scheduler.cancel("x"))
        self.assertFalse(bench.scheduler.cancel("x"))
        self.assert_nothing_of_it(bench)
        self.assert_all_well(bench, but=("x",), state=State.CANCELLED, saying="^cancelled$")

    @parameterized.product(layout=LAYOUTS, state=STATES, real=(False, True))
    def test_it_times_out(self, layout, state, real):
        if real and layout not in REAL:
            return
        bench = self.brought(layout, state, real, timeout_s=5.0)
        bench.sleep(6.0)
        bench.step()
        self.assertEqual(bench.state("x"), State.TIMED_OUT)
        self.assert_nothing_of_it(bench)
        saying = f"^timed out after 5.0 s, while in {state.value}$"
        self.assert_all_well(bench, but=("x",), state=State.TIMED_OUT, saying=saying)

    def assert_nothing_of_it(self, bench):
        pair = bench.pairs[0]
        for store in (pair.prefill_store, pair.decode_store):
            self.assertEqual(pages_of(store, "x"), [])
            self.assertNotIn(
                "x", {reader.holder for page in store.ledger.held() for reader in store.ledger.readers(page)}
            )
        restock(pair.decode_store, self.taken)


class PagesRunOutTest(FaultCase):
    @parameterized.product(layout=LAYOUTS, real=(False, True))
    def test_the_preempted_go_on_where_they_stopped(self, layout, real):
        if real and layout not in REAL:
            return
        bench = self.bench(layout, real=real)
        names = "abc"
        bench.submit(*(self.request(name, 9) for name in names))
        for name in names:
            bench.until(name, State.DECODE)
        bench.step()
        store = bench.pairs[0].decode_store
        for leave in (1, 0):
            taken = exhaust(store, leave=leave)
            for _ in range(4):
                bench.step()
            restock(store, taken)
            bench.step()
        self.assert_all_well(bench)
        self.assertGreater(bench.scheduler.counters().preemptions, 0)
        lost = [bench.ends[name].metrics.num_preemptions for name in names]
        self.assertEqual(lost[2], max(lost))  # the last to come is the first to go
        self.assertEqual(sum(lost), bench.scheduler.counters().preemptions)

    @parameterized.product(preemption=("recompute", "keep"), colocated=(False, True), polls=(0, 3, 10))
    def test_two_who_do_not_fit_together_both_come_to_an_end(self, preemption, colocated, polls):
        sizes = {"decode_pool_tokens": 40, "prefill_pool_tokens": 40, "polls": lambda what: polls}
        bench = self.bench({"preemption": preemption, "colocated": colocated}, **sizes)
        bench.submit(*(self.request(name, 18, 20) for name in "abcde"))
        self.assert_all_well(bench)

    @parameterized.parameters(*LAYOUTS)
    def test_who_is_on_the_way_gives_its_pages_to_who_decodes_and_is_more_important(self, **layout):
        bench = self.bench(layout)
        bench.submit(self.request("a", 5, 34))
        bench.until("a", State.DECODE)
        bench.faults.plan.append(Fault("transfer", Kind.LATE))
        bench.submit(self.request("b", 9))
        bench.until("b", State.TRANSFER)
        taken = exhaust(bench.pairs[0].decode_store)
        bench.until("b", State.WAITING)
        restock(bench.pairs[0].decode_store, taken)
        self.assert_all_well(bench)
        self.assertEqual([bench.ends[name].metrics.num_preemptions for name in "ab"], [0, 0])

    @parameterized.parameters(*LAYOUTS)
    def test_the_preempted_come_back_before_those_who_came_later(self, **layout):
        bench = self.bench(layout, config={"max_waiting": 99}, prefill_pool_tokens=40, decode_pool_tokens=40)
        bench.submit(self.request("a", 5, 34))
        bench.until("a", State.DECODE)
        taken = exhaust(bench.pairs[0].decode_store)
        bench.until("a", State.PREEMPTED)
        bench.submit(*(self.request(f"z{index}", 9) for index in range(40)))
        bench.step()
        restock(bench.pairs[0].decode_store, taken)
        bench.until("a", State.FINISHED)
        self.assertLess(len(bench.ends), 8)
        self.assert_all_well(bench)

    def test_of_those_who_wait_for_pages_the_less_important_do_not_overtake(self):
        bench = self.bench({"preemption": "keep"})
        bench.submit(self.request("a", 5, 34))
        bench.until("a", State.DECODE)
        bench.submit(self.request("b"))
        bench.until("b", State.DECODE)
        bench.step()  # both have emitted tokens, and so something to keep
        store = bench.pairs[0].decode_store
        taken = exhaust(store)
        bench.until("b", State.PREEMPTED)
        taken += exhaust(store)
        bench.until("a", State.PREEMPTED)
        taken += exhaust(store)
        some, rest = taken[:7], taken[7:]
        restock(store, some)  # enough for b, and too few for a
        for _ in range(12):
            bench.step()
        self.assertEqual([bench.state(name) for name in "ab"], [State.PREEMPTED] * 2)
        restock(store, rest)
        self.assert_all_well(bench)

    @parameterized.product(ticks=(0, 2, 6), preemption=("recompute", "keep"))
    def test_a_tick_from_before_a_preemption_says_nothing_about_the_slot_after_it(self, ticks, preemption):
        # Lane 1 is always read first, so that ticks of lane 0 stay unread while its request comes back to its slot.
        self.real = False
        waits = ({"tick": ticks}, {})
        programs = [
            FakePrograms(preemption=preemption, polls=lambda what, lane=lane: lane.get(what, 0)) for lane in waits
        ]
        bench = Bench([FaultyPair(index, each) for index, each in enumerate(programs)])
        bench.submit(self.request("a", 5, 34), *(self.request(name, 5, 30) for name in "bc"))
        store = bench.pairs[0].decode_store
        while bench.state("a") is not State.FINISHED:
            taken = exhaust(store) if bench.state("a") is State.DECODE else ()
            bench.step()
            if taken and bench.state("a") is State.DECODE:
                bench.step()
            restock(store, taken)
            if len(bench.requests) < 60:
                bench.submit(self.request(f"z{len(bench.requests)}", 3, 9))
        self.assert_all_well(bench)
        self.assertGreater(bench.ends["a"].metrics.num_preemptions, 0)

    @parameterized.parameters(*LAYOUTS)
    def test_the_less_important_goes_first(self, **layout):
        bench = self.bench(layout)
        important = doubles.make_request("late but important", (1, 2, 3), max_tokens=30)
        bench.submit(self.request("a", 3, 30), dataclasses.replace(important, priority=-1))
        bench.until(important.request_id, State.DECODE)
        bench.step()
        taken = exhaust(bench.pairs[0].decode_store)
        bench.until("a", State.PREEMPTED)
        self.assertEqual(bench.state(important.request_id), State.DECODE)
        restock(bench.pairs[0].decode_store, taken)
        self.assert_all_well(bench)


class SlowLaneTest(FaultCase):
    def test_a_lane_whose_tick_is_done_does_not_wait_for_one_whose_tick_is_not(self):
        self.real = False
        programs = [FakePrograms(polls=lambda what: 300 if what == "tick" else 0), FakePrograms()]
        bench = Bench([FaultyPair(index, each) for index, each in enumerate(programs)])
        bench.submit(self.request("a"), self.request("b"))
        bench.until("a", State.DECODE)
        running = bench.scheduler._roster.known["a"]
        self.assertEqual(running.lane, 0)
        bench.until("b", State.FINISHED)
        self.assertEqual(running.num_tokens, 0)
        self.assert_all_well(bench)
