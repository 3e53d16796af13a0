"""Pairs that are slower, held up or dead for a while: what shows, and when."""

from absl.testing import parameterized

from streamserve.flowguard import FlowGuard, Route
from streamserve.flowguard.routers.picking import stateless
from streamserve.lifecycle import State
from streamserve.pipeserve import Handicap, HandicappedPair
from tests.doubles import assert_empty, make_request
from tests.fake_programs import FakeClock, FakePrograms, fake_scheduler, quiet_output
from tests.faults import FaultyPair

WORK_S = 0.1  # what a call and a tick really take


class _TimedPair(FaultyPair):
    """A lane without devices whose calls and ticks take a time each, one after the other on their mesh."""

    def __init__(self, index: int, clock: FakeClock, **config):
        super().__init__(index, FakePrograms(depth=0, **config))
        self._clock, self._ends, self._free_s, self._held = clock, {}, {"prefill": 0.0, "decode": 0.0}, []

    def _timed(self, mesh, work):
        if work is not None:
            self._free_s[mesh] = max(self._free_s[mesh], self._clock()) + WORK_S
            self._ends[id(work)] = self._free_s[mesh]
            self._held.append(work)
        return work

    def _called(self, mesh, call):
        if self._timed(mesh, call) is not None:
            self._ends.update((id(task), self._ends[id(call)]) for task in call.done)
        return call

    def prefill(self):
        return self._called("prefill", super().prefill())

    def prefill_locally(self):
        return self._called("decode", super().prefill_locally())

    def has_arrived(self, item):
        return self._clock() >= self._ends.get(id(item.task), 0.0) and super().has_arrived(item)

    def is_computed(self, call):
        return self._clock() >= self._ends[id(call)]

    def step(self, tier, plan):
        return self._timed("decode", super().step(tier, plan))

    def is_done(self, pending):
        return self._clock() >= self._ends[id(pending)]

    def read(self, pending):
        self._clock.sleep(max(0.0, self._ends[id(pending)] - self._clock()))
        return super().read(pending)


class HandicapTest(parameterized.TestCase):
    def _served(self, handicap: Handicap | None, *, count: int = 1, max_tokens: int = 9, local: bool = False, **config):
        """Serve requests one after the other; gives their metrics."""
        clock = FakeClock()
        inner = _TimedPair(0, clock, local_tokens=8 if local else 0, **config)
        pair = inner
        if handicap is not None:
            pair = HandicappedPair(inner, handicap, clock=clock, sleep=clock.sleep)
        router = stateless(lambda context, noise_A2: Route(0, local=local))
        flowguard = FlowGuard(lambda lanes: router, num_lanes=1, seed=0)
        wired = fake_scheduler([inner], clock=clock, flowguard=flowguard)
        wired.use_pairs([pair])
        ends = {}
        for index in range(count):
            request = make_request(str(index), (1, 2, index), max_tokens=max_tokens, seed=index)
            wired.submit(request)
            for end in wired.drain():
                self.assertEqual(end.completion.token_ids, quiet_output(request))
                ends[end.request_id] = end
        assert_empty([inner])
        self.assertLen(ends, count)
        return [ends[str(index)].metrics for index in range(count)]

    def test_without_a_handicap_nothing_changes(self):
        plain, wrapped = self._served(None, count=3), self._served(Handicap(), count=3)
        for one, other in zip(plain, wrapped, strict=True):
            self.assertAlmostEqual(one.finished_s - one.arrival_s, other.finished_s - other.arrival_s, delta=0.01)

    def test_calls_and_ticks_take_so_many_times_longer(self):
        plain, slow = self._served(Handicap())[0], self._served(Handicap(slowdown=3.0))[0]
        # One prefill call; two rounds a tick and one token a round: eight tokens after the first are four ticks.
        self.assertAlmostEqual(plain.prefill_s, WORK_S, delta=0.01)
        self.assertAlmostEqual(slow.prefill_s, 3 * WORK_S, delta=0.01)
        self.assertAlmostEqual(plain.decode_s, 4 * WORK_S, delta=0.02)
        self.assertAlmostEqual(slow.decode_s, 12 * WORK_S, delta=0.02)

    def test_a_stalled_transfer_delays_the_first_token_and_nothing_else(self):
        plain, stalled = self._served(Handicap())[0], self._served(Handicap(transfer_delay_s=2.0))[0]
        self.assertAlmostEqual(stalled.transfer_s - plain.transfer_s, 2.0, delta=0.01)
        self.assertAlmostEqual(stalled.prefill_s, plain.prefill_s, delta=0.01)
        self.assertAlmostEqual(stalled.decode_s, plain.decode_s, delta=0.01)

    def test_pages_that_do_not_travel_are_not_held_up(self):
        stalled = Handicap(transfer_delay_s=2.0)
        for local, held_up_s in ((True, 0.0), (False, 2.0)):
            times = self._served(stalled, local=local)[0]
            self.assertAlmostEqual(times.page_wait_s + times.transfer_s, held_up_s, delta=0.1)

    def test_a_prompt_that_is_dropped_while_it_is_computed_is_forgotten(self):
        clock = FakeClock()
        inner = _TimedPair(0, clock)
        pair = HandicappedPair(inner, Handicap(slowdown=3.0), clock=clock, sleep=clock.sleep)
        wired = fake_scheduler([inner], clock=clock)
        wired.use_pairs([pair])
        for index in range(3):
            wired.submit(make_request(str(index), (1, index), max_tokens=5))
        wired.step()
        self.assertTrue(wired.cancel("1"))
        self.assertLen(pair._dropped, 1)
        self.assertLen(list(wired.drain()), 3)
        self.assertEqual((pair._dropped, pair._computed), ({}, {}))

    def test_it_forgets_what_it_has_seen_through(self):
        clock = FakeClock()
        inner = _TimedPair(0, clock)
        pair = HandicappedPair(inner, Handicap(slowdown=2.0), clock=clock, sleep=clock.sleep)
        wired = fake_scheduler([inner], clock=clock)
        wired.use_pairs([pair])
        for index in range(8):
            wired.submit(make_request(str(index), (1, index), max_tokens=5))
        self.assertTrue(wired.cancel("7"))
        self.assertLen(list(wired.drain()), 8)
        meshes = (pair._calls, pair._local_calls, pair._ticks)
        self.assertEqual([mesh._works for mesh in meshes] + [pair._computed], [{}] * 4)

    def test_a_prompt_that_is_computed_where_it_is_decoded_is_slowed_down_too(self):
        queue = Handicap(slowdown=3.0)
        metrics = self._served(queue, local=True)[0]
        self.assertAlmostEqual(metrics.prefill_s, 3 * WORK_S, delta=0.01)
        self.assertEqual(metrics.transfer_pages, 0)

    def test_a_prompt_on_the_decode_mesh_does_not_seem_to_wait_for_one_on_the_prefill_mesh(self):
        clock = FakeClock()
        inner = _TimedPair(0, clock, local_tokens=8)
        pair = HandicappedPair(inner, Handicap(slowdown=3.0), clock=clock, sleep=clock.sleep)
        where_it_fits = stateless(lambda context, noise_A2: Route(0, local=bool(context.local_A[0])))
        flowguard = FlowGuard(lambda lanes: where_it_fits, num_lanes=1, seed=0)
        wired = fake_scheduler([inner], clock=clock, flowguard=flowguard)
        wired.use_pairs([pair])
        long, short = make_request("long", tuple(range(9)), max_tokens=2), make_request("short", (1, 2), max_tokens=2)
        ends = wired.serve([(0.0, long), (WORK_S / 2, short)])  # one comes while the other is computed
        prefill_s = {end.request_id: end.metrics.prefill_s for end in ends}
        self.assertEqual(wired.counters().local_prefills, 1)
        self.assertAlmostEqual(prefill_s["long"], 3 * WORK_S, delta=0.01)
        self.assertAlmostEqual(prefill_s["short"], 3 * WORK_S, delta=0.01)


class DeathTest(parameterized.TestCase):
    def _bench(self, handicap: Handicap, **config):
        clock = FakeClock()
        inner = [_TimedPair(index, clock, **config) for index in range(2)]
        pairs = [HandicappedPair(inner[0], handicap, clock=clock, sleep=clock.sleep), inner[1]]
        wired = fake_scheduler(inner, clock=clock)
        wired.use_pairs(pairs)
        return clock, inner, pairs, wired

    @parameterized.parameters("recompute", "keep")
    def test_what_was_on_it_goes_on_elsewhere_and_loses_no_token(self, preemption):
        clock, inner, pairs, wired = self._bench(
            Handicap(down_from_s=0.45, down_until_s=3.0), preemption=preemption, max_num_seqs=2
        )
        requests = [make_request(str(index), (1, 2, index), max_tokens=20, seed=index) for index in range(8)]
        for request in requests:
            wired.submit(request)
        ends, moved, lanes_down = {}, 0, set()
        while not wired.idle:
            self.assertLess(clock(), 30.0, "somebody waits for ever")
            was_up = pairs[0].is_up
            for end in wired.step():
                ends[end.request_id] = end
            if not was_up and not pairs[0].is_up:
                self.assertFalse(wired.lanes[0].busy)
                self.assertEqual((pairs[0]._ticks._works, pairs[0]._calls._works, pairs[0]._computed), ({}, {}, {}))
                lanes_down.add(clock() > 0.45)
        self.assertEqual(lanes_down, {True})
        for request in requests:
            end = ends[request.request_id]
            self.assertIs(end.state, State.FINISHED)
            self.assertEqual(end.completion.token_ids, quiet_output(request))
            moved += end.metrics.num_preemptions
        self.assertGreater(moved, 0)
        assert_empty(inner)

    def test_its_time_begins_with_a_prompt_of_any_kind(self):
        clock = FakeClock()
        inner = _TimedPair(0, clock, local_tokens=8)
        pair = HandicappedPair(inner, Handicap(down_from_s=0.2, down_until_s=1.0), clock=clock, sleep=clock.sleep)
        here = stateless(lambda context, noise_A2: Route(0, local=True))
        wired = fake_scheduler([inner], clock=clock, flowguard=FlowGuard(lambda lanes: here, num_lanes=1, seed=0))
        wired.use_pairs([pair])
        clock.sleep(5.0)
        wired.submit(make_request("0", (1, 2), max_tokens=20))
        (end,) = wired.drain()
        self.assertGreater(clock(), 6.0)
        self.assertEqual((end.metrics.num_preemptions, wired.counters().resets), (1, 1))

    def test_what_was_kept_for_it_goes_on_elsewhere_too(self):
        handicap = Handicap(down_from_s=1.0, down_until_s=9.0)
        clock, inner, pairs, wired = self._bench(handicap, preemption="keep", decode_pool_tokens=40)
        requests = [make_request(str(index), (1, 2, index), max_tokens=24, seed=index) for index in range(8)]
        for request in requests:
            wired.submit(request)
        ends, kept = {}, 0
        while not wired.idle:
            self.assertLess(clock(), 30.0, "somebody waits for ever")
            if pairs[0].is_up:
                kept = len(wired.lanes[0]._kept)
            for end in wired.step():
                ends[end.request_id] = end
        self.assertGreater(clock(), 1.0)
        self.assertGreater(kept, 0)
        for request in requests:
            self.assertEqual(ends[request.request_id].completion.token_ids, quiet_output(request))
        assert_empty(inner)

    def test_it_comes_back_and_is_used_again(self):
        clock, _, pairs, wired = self._bench(Handicap(down_from_s=0.2, down_until_s=1.0))
        lanes = []
        for index in range(30):
            wired.submit(make_request(str(index), (1, index % 13), max_tokens=3))
            lanes += [(clock(), end.metrics.lane) for end in wired.drain()]
        self.assertTrue(pairs[0].is_up)
        self.assertEqual({lane for now_s, lane in lanes if 0.4 < now_s < 1.0}, {1})
        self.assertEqual({lane for now_s, lane in lanes if now_s > 1.5}, {0, 1})

    def test_requests_wait_while_every_lane_is_dead(self):
        clock = FakeClock()
        inner = _TimedPair(0, clock)
        pair = HandicappedPair(inner, Handicap(down_from_s=0.15, down_until_s=2.0), clock=clock, sleep=clock.sleep)
        wired = fake_scheduler([inner], clock=clock)
        wired.use_pairs([pair])
        request = make_request("0", (1, 2), max_tokens=9)
        wired.submit(request)
        (end,) = wired.drain()
        self.assertEqual(end.completion.token_ids, quiet_output(request))
        self.assertGreater(clock(), 2.0)
