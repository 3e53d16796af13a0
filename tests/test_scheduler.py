"""StreamScheduler before lanes without devices: order, back-pressure, the door, and the ways out."""

import dataclasses

from absl.testing import parameterized

from streamserve.ending import Refused
from streamserve.flowguard import FlowGuard, routers
from streamserve.lane import HAND_OFFS_AHEAD
from streamserve.lifecycle import State
from tests import doubles
from tests.doubles import make_request
from tests.fake_programs import FakeClock, FakePrograms, fake_scheduler, quiet_output
from tests.faults import Bench, Fault, FaultyPair, Kind, exhaust, restock


def _pairs(count: int = 1, **config) -> list[FaultyPair]:
    batches = tuple(size for size in (1, 2) if size < config.get("max_num_seqs", 4))
    return [FaultyPair(index, FakePrograms(decode_batches=batches, **config)) for index in range(count)]


def _requests(count: int, *, max_tokens: int = 2, **fields):
    made = (make_request(str(index), (1, 2), max_tokens=max_tokens, seed=index) for index in range(count))
    return [dataclasses.replace(request, **fields) for request in made]


def _begun(pair: FaultyPair) -> list[str]:
    """Watch in which order a lane takes requests."""
    order, begin = [], pair.begin

    def watched(job):
        task = begin(job)
        order.append(job.request.request_id)
        return task

    pair.begin = watched
    return order


class OrderTest(parameterized.TestCase):
    def test_first_come_first_served(self):
        pair = _pairs(max_num_seqs=1)[0]
        order, bench = _begun(pair), Bench([pair])
        bench.submit(*_requests(9))
        bench.drain()
        self.assertEqual(order, [str(index) for index in range(9)])

    def test_the_lowest_priority_value_is_served_first(self):
        pair = _pairs(max_num_seqs=1, max_prefills=1)[0]
        order, bench = _begun(pair), Bench([pair])
        bench.submit(*(dataclasses.replace(request, priority=-int(request.request_id) % 3) for request in _requests(9)))
        bench.drain()
        self.assertEqual(order, ["0", "3", "6", "2", "5", "8", "1", "4", "7"])

    def test_a_tenant_with_one_request_does_not_wait_behind_one_with_many(self):
        pair = _pairs(max_num_seqs=1, max_prefills=1)[0]
        order, bench = _begun(pair), Bench([pair])
        bench.submit(*_requests(12, max_tokens=9, tenant="many"))
        for _ in range(3):
            bench.step()
        bench.submit(dataclasses.replace(make_request("one", (1, 2), max_tokens=9), tenant="few"))
        bench.drain()
        self.assertLess(order.index("one"), 5)

    def test_tenants_are_served_in_turn_by_tokens_not_by_requests(self):
        pair = _pairs(max_num_seqs=1, max_prefills=1)[0]
        order, bench = _begun(pair), Bench([pair])
        long = [make_request(f"long {index}", (1, 2), max_tokens=24) for index in range(4)]
        short = [make_request(f"short {index}", (1, 2), max_tokens=4) for index in range(16)]
        bench.submit(*(dataclasses.replace(request, tenant="long") for request in long))
        bench.submit(*(dataclasses.replace(request, tenant="short") for request in short))
        bench.drain()
        self.assertGreater(order.index("long 3"), order.index("short 9"))  # one long costs as much as four short

    def test_a_tenant_is_charged_once_for_each_token(self):
        bench = Bench(_pairs(decode_pool_tokens=48))
        bench.submit(*(make_request(str(index), (1,) * 9, max_tokens=20 + index) for index in range(8)))
        bench.drain()
        self.assertGreater(bench.scheduler.counters().preemptions, 0)
        (served,) = bench.scheduler._roster.queue._served.values()
        self.assertEqual(served, sum(9 + 2 * (20 + index) for index in range(8)))

    def test_a_refused_head_of_the_queue_is_not_overtaken(self):
        pair = _pairs(prefill_pool_tokens=40)[0]
        order, bench = _begun(pair), Bench([pair])
        bench.faults.plan.append(Fault("transfer", Kind.LATE, polls=9))
        tail = [make_request("big", (1,) * 30, max_tokens=2), make_request("small", (3,), max_tokens=2)]
        bench.submit(make_request("first", (2,) * 20, max_tokens=2), *tail)
        bench.drain()
        self.assertLess(order.index("big"), order.index("small"))


class LanesTest(parameterized.TestCase):
    def _bench(self, pairs):
        bench = Bench(pairs)
        flowguard = FlowGuard(routers.round_robin, num_lanes=len(pairs), seed=0)
        bench.scheduler = fake_scheduler(pairs, clock=bench.clock, flowguard=flowguard)
        return bench

    def test_they_take_turns(self):
        pairs = _pairs(2)
        orders, bench = [_begun(pair) for pair in pairs], self._bench(pairs)
        bench.submit(*_requests(6))
        bench.drain()
        self.assertEqual(orders, [["0", "2", "4"], ["1", "3", "5"]])

    def test_one_that_is_backed_up_is_passed_over(self):
        pairs = _pairs(2, max_prefills=1)
        orders, bench = [_begun(pair) for pair in pairs], self._bench(pairs)
        bench.faults.plan.append(Fault("transfer", Kind.LATE, polls=3, count=10**9))
        bench.submit(*_requests(20))
        bench.drain()
        self.assertGreater(len(orders[1]), 2 * len(orders[0]))
        self.assertNotEmpty(orders[0])

    def test_a_lane_takes_no_more_than_may_be_before_its_slots(self):
        pairs = _pairs(2, max_prefills=3, polls=lambda what: 10**9 if what == "call" else 0)
        bench = self._bench(pairs)
        bench.submit(*_requests(10))
        for _ in range(3):
            bench.step()
        self.assertEqual([lane.num_before_slot for lane in bench.scheduler.lanes], [3, 3])
        bench.scheduler.shutdown()

    def test_few_more_hand_offs_are_under_way_than_there_are_slots_for(self):
        pairs = _pairs(max_num_seqs=1, max_prefills=9, polls=lambda what: 10**9 if what == "transfer" else 0)
        bench = self._bench(pairs)
        bench.submit(*_requests(9))
        for _ in range(9):
            bench.step()
        self.assertLen(bench.scheduler.lanes[0]._transit, 1 + HAND_OFFS_AHEAD)
        bench.scheduler.shutdown()

    def test_a_computed_prompt_that_waits_for_pages_is_overtaken_by_a_more_important_one_alone(self):
        bench = self._bench(_pairs(max_prefills=9))
        store = bench.pairs[0].decode_store
        taken = exhaust(store, leave=2)  # enough for the small one
        long, urgent = (make_request(name, tuple(range(12)), max_tokens=2) for name in ("long", "urgent"))
        for request in (long, make_request("small", (1, 2), max_tokens=2)):
            bench.submit(request)
            for _ in range(4):
                bench.step()
        self.assertEqual([bench.state(name) for name in ("long", "small")], [State.PREFILL] * 2)
        bench.submit(dataclasses.replace(urgent, priority=-1))
        for _ in range(4):
            bench.step()
        restock(store, taken[:2])
        bench.until("urgent", State.DECODE, limit=20)
        self.assertEqual([bench.state(name) for name in ("long", "small")], [State.PREFILL] * 2)
        restock(store, taken[2:])
        for name, end in bench.drain().items():
            self.assertEqual(end.completion.token_ids, quiet_output(bench.requests[name]))

    def test_one_that_fails_does_not_disturb_the_others(self):
        pairs = _pairs(2)
        bench = Bench(pairs)
        bench.faults.plan.append(Fault("step", Kind.LOST))
        requests = _requests(8, max_tokens=12)
        bench.submit(*requests)
        for name, end in bench.drain().items():
            if end.state is State.FINISHED:
                self.assertEqual(end.completion.token_ids, quiet_output(bench.requests[name]))
            else:
                self.assertEqual(int(name) % 2, 0)
        self.assertEqual([lane.counters.resets for lane in bench.scheduler.lanes], [1, 0])


class DoorTest(parameterized.TestCase):
    def test_a_full_queue_refuses_with_its_reason(self):
        bench = Bench(_pairs(), max_waiting=4)
        requests = _requests(6)
        bench.requests = {request.request_id: request for request in requests}
        refusals = [bench.scheduler.submit(request) for request in requests]
        self.assertEqual(refusals[:4], [None] * 4)
        for name, end in bench.drain().items():
            if int(name) < 4:
                self.assertEqual(end.state, State.FINISHED)
            else:
                self.assertEqual(end.state, State.REFUSED)
                self.assertEqual(end.error, refusals[int(name)].reason)
                self.assertEqual(end.error, "the waiting queue is full: 4 requests wait (scheduler.max_waiting=4)")
        self.assertEqual(bench.scheduler.ends, {State.FINISHED: 4, State.REFUSED: 2})

    def test_what_fits_no_program_is_refused_and_holds_up_nobody(self):
        bench = Bench(_pairs())
        long, greedy = (
            make_request("long", (1,) * 41, max_tokens=1),
            make_request("stops", (1,), stop_ids=tuple(range(9))),
        )
        bench.submit(long, greedy, *_requests(3))
        ends = bench.drain()
        self.assertEqual(ends["long"].error, "41 tokens do not fit into a row of 40")
        self.assertEqual(ends["stops"].error, "9 stop token ids given, the engine is configured for at most 8")
        states = [ends[name].state for name in ("long", "stops", "0", "1", "2")]
        self.assertEqual(states, [State.REFUSED] * 2 + [State.FINISHED] * 3)

    def test_an_id_is_served_once_at_a_time(self):
        bench = Bench(_pairs())
        (request,) = _requests(1, max_tokens=9)
        bench.submit(request)
        for _ in range(2):
            with self.assertRaisesRegex(ValueError, "request 0 is being served already"):
                bench.scheduler.submit(request)
            bench.step()
        self.assertEqual(bench.drain()["0"].completion.token_ids, quiet_output(request))
        bench.ends.clear()
        bench.submit(request)
        self.assertEqual(bench.drain()["0"].completion.token_ids, quiet_output(request))

    def test_cancelling_nobody_is_no_error(self):
        bench = Bench(_pairs())
        self.assertFalse(bench.scheduler.cancel("nobody"))
        bench.submit(*_requests(1))
        bench.drain()
        self.assertFalse(bench.scheduler.cancel("0"))

    def test_a_name_used_again_inherits_neither_the_deadline_nor_the_stamps_of_the_first(self):
        bench = Bench(_pairs(polls=lambda what: 8 if what == "call" else 0))
        (request,) = _requests(1, max_tokens=9)
        bench.submit(dataclasses.replace(request, timeout_s=5.0))
        bench.step()
        bench.scheduler.cancel("0")
        bench.take(bench.scheduler.step())
        bench.ends.clear()
        bench.faults.plan.append(Fault("transfer", Kind.LATE, polls=20))
        bench.submit(request)
        bench.until("0", State.TRANSFER)
        bench.clock.sleep(6.0)
        end = bench.drain()["0"]
        self.assertEqual(end.state, State.FINISHED)
        self.assertGreater(end.metrics.prefill_s, 5.0)


class RunTest(parameterized.TestCase):
    def _run(self, requests, pairs=None, **config):
        return fake_scheduler(pairs or _pairs(), clock=FakeClock(), **config).run(requests)

    @parameterized.parameters((2, 3), (6, 2), (1, 1))
    def test_the_input_is_pulled_with_a_bounded_look_ahead(self, max_waiting, max_prefills):
        pulled = []

        def endless():
            for index in range(10**6):
                pulled.append(index)
                yield make_request(str(index), (1,), max_tokens=20)

        pairs = _pairs(max_prefills=max_prefills, max_num_seqs=2)
        run = self._run(endless(), pairs, max_waiting=max_waiting)
        for done in range(1, 30):
            end = next(run)
            self.assertEqual(end.state, State.FINISHED)  # none is refused for the queue's sake
            # Who ended in the same step may not have been handed over yet.
            self.assertLessEqual(len(pulled), done + 2 * 2 + max_prefills + max_waiting)
        run.close()
        doubles.assert_empty(pairs)

    def test_ticks_go_on_between_pulls(self):
        pulled = []

        def source():
            for index in range(200):
                pulled.append(index)
                yield _requests(index + 1)[index] if index % 2 else Refused(str(index), "no")

        run = self._run(source(), max_waiting=100)
        first = next(end for end in run if end.completion is not None)
        self.assertEqual(first.request_id, "1")
        self.assertLess(len(pulled), 30)
        run.close()

    def test_every_request_of_the_input_ends_once(self):
        requests = [Refused("no", "because"), *_requests(30, max_tokens=7), Refused("neither", "so")]
        ends = list(self._run(requests, _pairs(3), max_waiting=2))
        self.assertCountEqual([end.request_id for end in ends], [request.request_id for request in requests])
        errors = {end.request_id: end.error for end in ends if end.state is not State.FINISHED}
        self.assertEqual(errors, {"no": "because", "neither": "so"})

    def test_an_error_of_the_input_leaves_the_lanes_empty(self):
        def broken():
            yield from _requests(4, max_tokens=20)
            raise OSError("the input is gone")

        pairs = _pairs(2)
        scheduler = fake_scheduler(pairs, clock=FakeClock())
        with self.assertRaisesRegex(OSError, "the input is gone"):
            list(scheduler.run(broken()))
        doubles.assert_empty(pairs)
        self.assertLen(list(scheduler.run(_requests(3))), 3)

    def test_a_run_that_is_closed_early_lets_the_next_one_begin(self):
        pairs = _pairs(2)
        scheduler = fake_scheduler(pairs, clock=FakeClock())
        run = scheduler.run(_requests(9, max_tokens=15))
        next(run)
        with self.assertRaisesRegex(RuntimeError, "already running"):
            next(scheduler.run(_requests(1)))
        run.close()
        self.assertTrue(scheduler.idle)
        doubles.assert_empty(pairs)
        self.assertLen(list(scheduler.run(_requests(9))), 9)

    def test_an_empty_input_ends_at_once(self):
        self.assertEmpty(list(self._run([])))


class WaysOutTest(parameterized.TestCase):
    def test_stamps_are_in_order(self):
        bench = Bench(_pairs(polls=lambda what: 3))
        bench.submit(*_requests(7, max_tokens=9))
        for end in bench.drain().values():
            times = end.metrics
            stamps = [times.arrival_s, times.scheduled_s, times.prefilled_s, times.transferred_s, times.first_token_s]
            self.assertEqual(stamps, sorted(stamps))
            self.assertLess(times.first_token_s, times.finished_s)
            self.assertGreater(times.prefill_s, 0)
            self.assertAlmostEqual(times.first_token_s + sum(times.itls_s), times.finished_s, places=3)

    def test_drain_serves_all_that_was_submitted(self):
        pairs = _pairs(2)
        scheduler = fake_scheduler(pairs, clock=FakeClock())
        requests = _requests(9, max_tokens=5)
        for request in requests:
            scheduler.submit(request)
        self.assertFalse(scheduler.idle)
        ends = {end.request_id: end.completion.token_ids for end in scheduler.drain()}
        self.assertEqual(ends, {request.request_id: quiet_output(request) for request in requests})
        self.assertTrue(scheduler.idle)

    @parameterized.parameters(0, 1, 2, 5)
    def test_shutdown_ends_all_whatever_they_were_doing(self, steps):
        bench = Bench(_pairs(2, max_num_seqs=2, polls=lambda what: 1))
        bench.submit(*_requests(20, max_tokens=15))
        for _ in range(steps):
            bench.step()
        bench.take(bench.scheduler.shutdown())
        self.assertLen(bench.ends, 20)
        self.assertEqual({end.error for end in bench.ends.values()} - {None}, {"the engine was shut down"})
        self.assertTrue(bench.scheduler.idle)
        doubles.assert_empty(bench.pairs)
        self.assertEmpty(bench.scheduler.shutdown())
        bench.ends.clear()
        bench.submit(*_requests(20, max_tokens=5))
        self.assertEqual({end.state for end in bench.drain().values()}, {State.FINISHED})

    def test_deadlines_hold_for_those_only_who_have_one(self):
        bench = Bench(_pairs(max_num_seqs=1, max_prefills=1))
        late, fine = make_request("late", (1, 2), max_tokens=20), make_request("fine", (3,), max_tokens=20)
        bench.submit(dataclasses.replace(late, timeout_s=1.0), fine, *_requests(2, max_tokens=5, timeout_s=1e6))
        bench.step()
        bench.clock.sleep(1.0)
        ends = bench.drain()
        self.assertEqual(ends["late"].error, "timed out after 1.0 s, while in decode")
        self.assertEqual({ends[name].state for name in ("fine", "0", "1")}, {State.FINISHED})

    def test_a_request_that_ends_takes_its_deadline_with_it(self):
        bench = Bench(_pairs())
        bench.submit(*_requests(3, timeout_s=1.0))
        ends = bench.drain()
        bench.clock.sleep(2.0)
        bench.step()
        self.assertEqual({end.state for end in ends.values()}, {State.FINISHED})
