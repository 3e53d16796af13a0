"""Open-loop serving over lanes without devices, and the wait for ticks when anything else may happen."""

import dataclasses

from absl.testing import parameterized

from streamserve.bandits import Policy
from streamserve.ending import Refused
from streamserve.flowguard import FlowGuard, Route, RouteOutcome
from streamserve.flowguard.routers.picking import stateless
from streamserve.lifecycle import State
from streamserve.scheduler import POLL_S, TICK_POLL_S
from tests.doubles import assert_empty, make_request
from tests.fake_programs import FakePrograms, fake_scheduler, quiet_output
from tests.faults import Bench, Fault, FaultyPair, Kind, exhaust, restock


def _pairs(count: int = 1, **config) -> list[FaultyPair]:
    return [FaultyPair(index, FakePrograms(**config)) for index in range(count)]


def _arrivals(count: int, gap_s: float, **params):
    made = (make_request(str(index), (1, 2, index % 13), seed=index, **params) for index in range(count))
    return [(index * gap_s, request) for index, request in enumerate(made)]


class OpenLoopTest(parameterized.TestCase):
    def _serve(self, arrivals, pairs=None, **config):
        bench = Bench(_pairs() if pairs is None else pairs, **config)
        bench.clock.sleep(100.0)  # a clock does not begin with a run
        began_s = bench.clock()
        ends = {end.request_id: end for end in bench.scheduler.serve(arrivals)}
        self.assertTrue(bench.scheduler.idle)
        assert_empty(bench.pairs)
        return began_s, ends, bench

    def test_every_request_ends_once_with_the_tokens_it_must_have(self):
        arrivals = _arrivals(20, 0.003, max_tokens=6)
        _, ends, _ = self._serve(arrivals, pairs=_pairs(2))
        self.assertEqual(set(ends), {request.request_id for _, request in arrivals})
        for _, request in arrivals:
            self.assertEqual(ends[request.request_id].completion.token_ids, quiet_output(request))

    def test_times_count_from_the_arrival_that_was_meant_and_nobody_comes_early(self):
        arrivals = _arrivals(6, 0.5, max_tokens=2)
        began_s, ends, _ = self._serve(arrivals)
        for at_s, request in arrivals:
            times = ends[request.request_id].metrics
            self.assertAlmostEqual(times.arrival_s, began_s + at_s, delta=1e-4)
            self.assertGreaterEqual(times.scheduled_s, times.arrival_s)

    def test_a_loop_that_is_late_is_charged_for_it(self):
        bench = Bench(_pairs())
        run = bench.scheduler.serve(_arrivals(2, 0.001, max_tokens=1))
        first = next(run)
        bench.clock.sleep(7.0)  # the consumer was busy
        (second,) = run
        self.assertLess(first.metrics.finished_s - first.metrics.arrival_s, 1.0)
        self.assertGreater(second.metrics.scheduled_s - second.metrics.arrival_s, 6.9)

    def test_arrivals_do_not_wait_for_room_and_a_full_queue_refuses(self):
        arrivals = _arrivals(30, 0.0, max_tokens=4)
        _, ends, _ = self._serve(arrivals, max_waiting=5)
        states = [end.state for end in ends.values()]
        self.assertLen(states, 30)
        self.assertGreater(states.count(State.REFUSED), 10)
        self.assertEqual(states.count(State.FINISHED) + states.count(State.REFUSED), 30)

    def test_a_line_that_is_no_request_ends_as_refused(self):
        _, ends, _ = self._serve([(0.0, Refused("x", "too long")), *_arrivals(2, 0.1, max_tokens=1)])
        self.assertEqual((ends["x"].state, ends["x"].error), (State.REFUSED, "too long"))

    def test_arrivals_are_pulled_no_earlier_than_the_one_before_has_come(self):
        bench, pulled = Bench(_pairs()), []

        def source():
            for at_s, request in _arrivals(5, 1.0, max_tokens=1):
                pulled.append((at_s, bench.clock()))
                yield at_s, request

        list(bench.scheduler.serve(source()))
        for (at_s, when_s), (before_s, _) in zip(pulled[1:], pulled, strict=False):
            self.assertGreaterEqual(when_s, before_s)
            self.assertLess(when_s, at_s)

    def test_one_run_at_a_time(self):
        bench = Bench(_pairs())
        run = bench.scheduler.serve(_arrivals(2, 0.001, max_tokens=3))
        next(run)
        with self.assertRaisesRegex(RuntimeError, "already running"):
            next(bench.scheduler.run([]))
        run.close()
        self.assertTrue(bench.scheduler.idle)


class WatchTest(parameterized.TestCase):
    """A tick that takes 50 ms is under way when a request arrives."""

    def _arrived_in_a_tick(self, pairs_count: int):
        bench = Bench(_pairs(pairs_count, depth=0))
        reads, begun = [], []
        for pair in bench.pairs:

            def step(tier, plan, pair=pair, step=pair.step):
                pending = step(tier, plan)
                held = dispatched[pair.index]
                ends[id(pending)] = 0.05 + max([bench.clock(), *(ends[id(one)] for one in held[-1:])])
                held.append(pending)
                return pending

            def read(pending, read=pair.read):
                reads.append((bench.clock(), ends[id(pending)]))
                bench.clock.sleep(max(0.0, ends[id(pending)] - bench.clock()))
                return read(pending)

            def begin(job, begin=pair.begin):
                begun.append((job.request.request_id, bench.clock()))
                return begin(job)

            pair.step, pair.read, pair.begin = step, read, begin
            pair.is_done = lambda pending: bench.clock() >= ends[id(pending)]
        ends, dispatched = {}, [[] for _ in bench.pairs]
        return bench, begun, reads

    def test_an_arrival_does_not_wait_for_the_end_of_a_tick(self):
        bench, begun, _ = self._arrived_in_a_tick(1)
        first = make_request("first", (1, 2), max_tokens=36)
        arrivals = [(0.0, first), *((0.22 + 0.213 * i, make_request(str(i), (1,), max_tokens=1)) for i in range(8))]
        began_s = bench.clock()
        list(bench.scheduler.serve(arrivals))
        self.assertEqual([name for name, _ in begun], [request.request_id for _, request in arrivals])
        lateness = [when_s - began_s - at_s for (at_s, _), (_, when_s) in zip(arrivals[1:], begun[1:], strict=True)]
        self.assertLess(max(lateness), 5 * TICK_POLL_S)

    def test_offline_a_lane_alone_waits_for_its_tick(self):
        bench, _, _ = self._arrived_in_a_tick(1)
        list(bench.scheduler.serve(_arrivals(1, 0.0, max_tokens=4)))  # and forgets that it watched before
        sleeps, sleep = [], bench.clock.sleep
        bench.scheduler._sleep = lambda seconds: sleeps.append(seconds) or sleep(seconds)
        list(bench.scheduler.run([make_request("0", (1, 2), max_tokens=20)]))
        self.assertNotIn(TICK_POLL_S, sleeps)

    def test_it_looks_seldom_while_no_tick_is_nearly_due_and_often_when_one_is(self):
        bench, _, reads = self._arrived_in_a_tick(2)
        sleeps, sleep = [], bench.clock.sleep
        bench.scheduler._sleep = lambda seconds: sleeps.append((bench.clock(), seconds)) or sleep(seconds)
        apart = [(0.0, make_request("0", (1, 2), max_tokens=36)), (0.0255, make_request("1", (1, 2), max_tokens=36))]
        list(bench.scheduler.serve(apart))
        expected = reads[6:-6]  # nobody knows how long the first ticks take
        self.assertGreater(len(expected), 20)
        self.assertLess(max(read_s - done_s for read_s, done_s in expected), 1.2 * POLL_S)
        between = [seconds for now_s, seconds in sleeps if expected[0][0] < now_s < expected[-1][0]]
        self.assertGreater(between.count(TICK_POLL_S), 3 * between.count(POLL_S))

    def test_a_tick_is_timed_from_the_end_of_the_one_before(self):
        bench, _, _ = self._arrived_in_a_tick(1)
        list(bench.scheduler.serve(_arrivals(1, 0.0, max_tokens=36)))
        self.assertAlmostEqual(bench.scheduler.lane_stats()[0].pace.tick_s, 0.05, delta=0.002)


class OutcomeTest(parameterized.TestCase):
    def test_flowguard_is_told_of_every_end_but_cancellations(self):
        told = {}

        def update(state, context, route, outcome):
            told[len(told)] = outcome
            return state

        policy = stateless(lambda context, noise: Route(0))._replace(update=update)
        pairs = _pairs()
        bench = Bench(pairs, flowguard=FlowGuard(lambda lanes: policy, num_lanes=1, seed=0))
        bench.submit(*(request for _, request in _arrivals(3, 0.0, max_tokens=5)))
        slow = make_request("slow", (1, 2), max_tokens=30)
        bench.submit(slow)
        bench.step()
        self.assertTrue(bench.scheduler.cancel("slow"))
        bench.drain()
        self.assertLen(told, 3)
        for outcome in told.values():
            self.assertIsInstance(outcome, RouteOutcome)
            self.assertTrue(outcome.answered)
            self.assertEqual(outcome.output_tokens, 5)
            self.assertGreater(outcome.latency_s, outcome.ttft_s)

    def test_lanes_measure_their_pace(self):
        bench = Bench(_pairs(2, tiers=(2,)))
        self.assertEqual(bench.scheduler.lanes[0].stats(0.0).pace.tick_s, 0.0)
        bench.submit(*(request for _, request in _arrivals(12, 0.0, max_tokens=9)))
        bench.drain()
        for lane in bench.scheduler.lanes:
            pace = lane.stats(bench.clock() + 3.0).pace
            for name in ("prefill_s_per_token", "tick_s", "decode_s", "ttft_s", "tpot_s"):
                self.assertGreater(getattr(pace, name), 0.0, name)
            self.assertTrue(1.0 <= pace.tokens_per_tick <= 6.0)  # two rounds of up to three tokens
            self.assertTrue(0.0 <= pace.accepted_per_step <= pace.drafted_per_step <= 2.0)
            self.assertGreaterEqual(pace.idle_s, 3.0)

    def test_rows_that_have_ended_do_not_slow_the_pace_that_is_seen(self):
        bench = Bench(_pairs(depth=0))  # two rounds a tick, a token a round
        bench.submit(*(request for _, request in _arrivals(40, 0.0, max_tokens=5)))
        bench.drain()
        self.assertAlmostEqual(bench.scheduler.lanes[0].stats(0.0).pace.tokens_per_tick, 2.0, delta=0.01)

    def test_a_lane_that_dies_is_told_so_and_a_first_token_is_not_waited_for_twice(self):
        told, waited = [], []

        def choose(context, noise_A2):
            waited.append(context.waited_s)
            return Route(int(context.eligible_A.argmax()))

        def update(state, context, route, outcome):
            told.append((route.arm, outcome.answered))
            return state

        policy = stateless(choose)._replace(update=update)
        bench = Bench(_pairs(2), flowguard=FlowGuard(lambda lanes: policy, num_lanes=2, seed=0))
        bench.submit(make_request("0", (1, 2), max_tokens=20))
        bench.until("0", State.DECODE)
        for _ in range(3):
            bench.step()
        self.assertGreater(bench.scheduler._roster.known["0"].num_tokens, 0)
        bench.clock.sleep(5.0)
        bench.pairs[0].switched_on = False
        (end,) = bench.drain().values()
        self.assertEqual(end.completion.token_ids, quiet_output(bench.requests["0"]))
        self.assertEqual(told, [(0, False), (1, True)])
        self.assertEqual(waited[-1], 0.0)
        self.assertEqual(bench.scheduler.lanes[1].stats(0.0).pace.ttft_s, 0.0)

    def test_only_prompts_that_had_to_move_count_as_arrivals(self):
        here = stateless(lambda context, noise_A2: Route(0, local=bool(context.local_A[0])))
        flowguard = FlowGuard(lambda lanes: here, num_lanes=1, seed=0)
        bench = Bench(_pairs(local_tokens=40, preemption="keep", decode_pool_tokens=40), flowguard=flowguard)
        bench.submit(*(request for _, request in _arrivals(6, 0.0, max_tokens=24)))
        bench.drain()
        counters = bench.scheduler.counters()
        self.assertGreater(counters.preemptions, 0)
        self.assertEqual((counters.arrivals, counters.kv_transfer_pages), (0, 0))
        self.assertGreaterEqual(counters.local_prefills, 6)

    def test_what_a_request_asks_of_the_router(self):
        seen = []

        def choose(context, noise):
            seen.append(context)
            return Route(0)

        flowguard = FlowGuard(lambda lanes: stateless(choose), num_lanes=1, seed=0)
        bench = Bench(_pairs(page_size=4), flowguard=flowguard)
        prompt = (1, 2, 3, 4, 5, 6, 7, 8, 9)
        for index in range(2):
            bench.submit(make_request(str(index), prompt, max_tokens=7))
            bench.drain()
        self.assertEqual([(one.prompt_tokens, one.max_tokens, one.queue) for one in seen], [(9, 7, 1)] * 2)
        self.assertEqual([one.hit_tokens_A.tolist() for one in seen], [[0.0], [8.0]])

    def test_another_router_begins_with_new_books_and_old_counters(self):
        bench = Bench(_pairs(2))
        bench.submit(*(request for _, request in _arrivals(4, 0.0, max_tokens=5)))
        bench.drain()
        ticks = bench.scheduler.counters().ticks
        bench.scheduler.use_pairs(bench.pairs)
        self.assertEqual(bench.scheduler.counters().ticks, ticks)
        self.assertEqual(bench.scheduler.lanes[0].stats(0.0).pace.tick_s, 0.0)
        wired = fake_scheduler(bench.pairs, clock=bench.clock)
        wired.submit(make_request("0", (1, 2), max_tokens=5))
        with self.assertRaises(AssertionError):
            wired.use_pairs(bench.pairs)
            wired.step()
            wired.use_pairs(bench.pairs)
        wired.shutdown()

    def _watched(self, count: int = 1, **config):
        """Lanes, all that is shown to a router that goes to the first of them, and all that it is told."""
        seen, states, told = [], [], []

        def choose(state, context, noise_A2):
            seen.append(context)
            states.append(state)
            return Route(int(context.eligible_A.argmax())), state + 1

        def update(state, context, route, outcome):
            told.append(outcome)
            return state

        policy = Policy(init=lambda: 0, choose=choose, update=update)
        flowguard = FlowGuard(lambda lanes: policy, num_lanes=count, seed=0)
        return Bench(_pairs(count, **config), flowguard=flowguard), seen, states, told

    def test_the_router_is_told_the_times_of_an_answer(self):
        bench, _, _, told = self._watched(max_num_seqs=1, decode_batches=(), max_prefills=1)
        bench.submit(*(request for _, request in _arrivals(6, 0.0, max_tokens=7)))
        ends = list(bench.drain().values())
        self.assertLen(told, 6)
        for outcome, end in zip(told, ends, strict=True):
            times = end.metrics
            self.assertAlmostEqual(outcome.ttft_s, times.first_token_s - times.arrival_s)
            self.assertAlmostEqual(outcome.tpot_s, (times.finished_s - times.first_token_s) / 6)
            self.assertAlmostEqual(outcome.latency_s, times.finished_s - times.arrival_s)
        self.assertGreater(ends[-1].metrics.queue_s, 0.0)

    def test_the_router_is_told_of_a_request_whose_time_ran_out(self):
        bench, _, _, told = self._watched()
        bench.submit(dataclasses.replace(make_request("0", (1, 2), max_tokens=30), timeout_s=1.0))
        bench.until("0", State.DECODE)
        bench.clock.sleep(2.0)
        bench.step()
        self.assertIs(bench.state("0"), State.TIMED_OUT)
        self.assertEqual(told, [RouteOutcome(answered=False)])

    def test_the_router_is_not_told_of_a_request_that_was_cancelled_on_its_lane(self):
        bench, seen, _, told = self._watched()
        bench.submit(make_request("0", (1, 2), max_tokens=30))
        bench.until("0", State.DECODE)
        self.assertTrue(bench.scheduler.cancel("0"))
        bench.drain()
        self.assertEqual((len(seen), told), (1, []))

    def test_the_router_sees_who_waits_and_for_how_long(self):
        bench, seen, _, _ = self._watched()
        bench.pairs[0].switched_on = False
        bench.submit(*(request for _, request in _arrivals(3, 0.0, max_tokens=2)))
        bench.step()
        bench.clock.sleep(5.0)
        bench.pairs[0].switched_on = True
        bench.drain()
        self.assertEqual([context.queue for context in seen], [3, 2, 1])
        for context in seen:
            self.assertAlmostEqual(context.waited_s, 5.0, delta=0.01)

    def test_the_router_sees_what_each_lane_knows_of_a_prompt(self):
        bench, seen, _, _ = self._watched(2)
        for _ in range(2):
            bench.ends.clear()
            bench.submit(make_request("0", tuple(range(9)), max_tokens=2))
            bench.drain()
        self.assertEqual([context.hit_tokens_A.tolist() for context in seen], [[0, 0], [8, 0]])

    def test_a_request_that_goes_on_elsewhere_asks_for_what_is_left(self):
        bench, seen, _, _ = self._watched(2)
        bench.submit(make_request("0", (1, 2), max_tokens=20))
        bench.until("0", State.DECODE)
        for _ in range(3):
            bench.step()
        emitted = bench.scheduler._roster.known["0"].num_tokens
        self.assertGreater(emitted, 0)
        bench.pairs[0].switched_on = False
        bench.drain()
        # Its latest token goes into its first tick, and is not prefilled.
        asked = [(context.prompt_tokens, context.max_tokens) for context in seen]
        self.assertEqual(asked, [(2, 20), (2 + emitted - 1, 20 - emitted)])

    def test_a_lane_that_refuses_is_passed_over_and_its_decision_does_not_stand(self):
        bench, seen, states, told = self._watched(2)
        taken = exhaust(bench.pairs[0].prefill_store)
        bench.submit(make_request("0", tuple(range(9)), max_tokens=2))
        bench.step()
        self.assertEqual(bench.scheduler._roster.known["0"].lane, 1)
        self.assertEqual([context.eligible_A.tolist() for context in seen], [[True, True], [False, True]])
        self.assertEqual(states, [0, 0])
        restock(bench.pairs[0].prefill_store, taken)
        bench.drain()
        self.assertLen(told, 1)

    def test_the_time_in_a_slot_does_not_count_the_way_to_it(self):
        bench, _, _, _ = self._watched()
        bench.faults.plan.append(Fault("transfer", Kind.LATE, polls=300))
        bench.submit(make_request("0", (1, 2), max_tokens=20))
        (end,) = bench.drain().values()
        self.assertGreater(end.metrics.transfer_s, 0.05)
        self.assertBetween(bench.scheduler.lane_stats()[0].pace.decode_s, 1e-6, 0.02)
