"""A lane's book on prompts that are computed where they are decoded, beside those that have to move."""

import collections
import dataclasses

from absl.testing import parameterized

from streamserve.flowguard import FlowGuard, Route
from streamserve.flowguard.routers.picking import stateless
from streamserve.lifecycle import State
from tests.doubles import make_request
from tests.fake_programs import FakePrograms, quiet_output
from tests.faults import NEVER, Bench, Fault, FaultyPair, exhaust, restock
from tests.faults import Kind as FaultKind

PAGE = 4
NEAR, FAR = (1, 2, 3, 4, 5), tuple(range(12))  # two tiles, computed where they are decoded, and three that are not


def _never(what: str) -> float:
    return NEVER if what == "call" else 0


class LocalPrefillTest(parameterized.TestCase):
    def _bench(self, *, local_tokens: int = 2 * PAGE, prefill_calls: int = 1, **config) -> Bench:
        """One lane; prompts are computed where they are decoded if they are short enough."""
        where_it_fits = stateless(lambda context, noise_A2: Route(0, local=bool(context.local_A[0])))
        pair = FaultyPair(0, FakePrograms(local_tokens=local_tokens, **({"max_prefills": 9} | config)))
        flowguard = FlowGuard(lambda lanes: where_it_fits, num_lanes=1, seed=0)
        return Bench([pair], flowguard=flowguard, prefill_calls=prefill_calls)

    def _assert_all_well(self, bench: Bench) -> None:
        for name, end in bench.drain().items():
            self.assertEqual(end.completion.token_ids, quiet_output(bench.requests[name]), name)

    def test_calls_under_way_are_limited_on_each_mesh_by_itself(self):
        bench = self._bench(polls=_never, prefill_buckets=(2 * PAGE,))
        for index in range(2):
            bench.submit(make_request(f"near {index}", NEAR, max_tokens=2))
            bench.step()
        for index in range(2):
            bench.submit(make_request(f"far {index}", FAR, max_tokens=2))
            bench.step()
        (lane,) = bench.scheduler.lanes
        self.assertEqual(collections.Counter(call.local for call, _, _ in lane._prompts._calls), {False: 1, True: 1})

    def test_tokens_that_are_yet_to_be_computed_are_told_for_each_mesh(self):
        bench = self._bench(polls=_never, prefill_buckets=(2 * PAGE,))
        bench.submit(make_request("near", NEAR[:3], max_tokens=2))
        bench.submit(*(make_request(f"far {index}", FAR, max_tokens=2) for index in range(3)))
        for _ in range(3):
            bench.step()  # what is in a call that has not ended still counts
            stats = bench.scheduler.lanes[0].stats(bench.clock())
            self.assertEqual((stats.queued_prefill_tokens, stats.queued_local_tokens), (9 * PAGE, PAGE))

    def test_a_prompt_that_waits_for_pages_does_not_wait_for_prefill(self):
        bench = self._bench(polls=_never)
        taken = exhaust(bench.pairs[0].decode_store)
        bench.submit(*(make_request(f"far {index}", FAR, max_tokens=2) for index in range(2)))
        bench.step()
        stats = bench.scheduler.lanes[0].stats(bench.clock())
        self.assertEqual((stats.waiting, stats.in_transit), (1, 2))  # one has all of its tiles in the call
        restock(bench.pairs[0].decode_store, taken)
        bench.scheduler.shutdown()

    def test_what_has_arrived_and_waits_for_a_slot_is_no_backlog_of_the_link(self):
        bench = self._bench(max_num_seqs=1, decode_batches=(), depth=0)
        bench.submit(make_request("first", FAR, max_tokens=28))
        bench.until("first", State.DECODE)
        bench.faults.plan.append(Fault("transfer", FaultKind.LATE, polls=3))
        bench.submit(make_request("second", FAR, max_tokens=2))
        bench.until("second", State.TRANSFER)
        backlog = []
        while bench.state("second") is State.TRANSFER:
            backlog.append(bench.scheduler.lanes[0].stats(bench.clock()).transfer_backlog_bytes)
            bench.step()
        self.assertGreater(backlog[0], 0)
        self.assertEqual(backlog[-1], 0)
        self._assert_all_well(bench)

    def test_calls_on_the_decode_mesh_say_nothing_of_the_pace_of_the_prefill_mesh(self):
        bench = self._bench(polls=lambda what: 20 if what == "call" else 0)
        bench.submit(*(make_request(f"near {index}", NEAR, max_tokens=3) for index in range(4)))
        bench.drain()
        self.assertEqual(bench.scheduler.lane_stats()[0].pace.prefill_s_per_token, 0.0)
        bench.submit(make_request("far", FAR, max_tokens=3))
        bench.drain()
        self.assertGreater(bench.scheduler.lane_stats()[0].pace.prefill_s_per_token, 0.0)

    def test_the_pace_of_the_link_does_not_count_the_call_that_it_waited_for(self):
        bench = self._bench(polls=lambda what: 9 if what == "call" else 0)
        bench.submit(make_request("far", FAR, max_tokens=3))
        while bench.state("far") is not State.FINISHED:
            bench.clock.sleep(1.0)  # the host looks seldom
            bench.step()
        (end,) = bench.drain().values()
        self.assertGreater(end.metrics.prefill_s, 1.9)
        pace = bench.scheduler.lane_stats()[0].pace
        self.assertLess(pace.transfer_s_per_byte * end.metrics.transfer_bytes, 0.5)

    def test_a_prompt_that_has_its_pages_does_not_wait_behind_one_that_has_none(self):
        bench = self._bench()
        store = bench.pairs[0].decode_store
        taken = exhaust(store, leave=2)
        bench.submit(make_request("far", FAR, max_tokens=2), make_request("near", NEAR, max_tokens=2))
        bench.until("near", State.FINISHED, limit=50)
        self.assertEqual(bench.state("far"), State.PREFILL)
        restock(store, taken)
        self._assert_all_well(bench)

    def test_while_it_is_computed_its_pages_go_to_who_decodes_and_is_more_important(self):
        slow = []
        bench = self._bench(polls=lambda what: NEVER if slow and what == "call" else 0)
        bench.submit(make_request("far", FAR, max_tokens=28))
        bench.until("far", State.DECODE)
        slow.append(True)
        bench.submit(*(make_request(f"near {index}", NEAR, max_tokens=2) for index in range(2)))
        bench.step()
        self.assertEqual([bench.state(f"near {index}") for index in range(2)], [State.TRANSFER, State.PREFILL])
        exhaust(bench.pairs[0].decode_store)
        bench.until("near 1", State.WAITING, limit=20)  # the last to come is the first to go
        self.assertEqual(bench.state("near 0"), State.TRANSFER)
        self.assertEqual(bench.state("far"), State.DECODE)

    def test_it_takes_no_pages_that_a_more_important_request_which_was_preempted_waits_for(self):
        bench = self._bench(preemption="keep", enable_prefix_caching=False)
        bench.submit(make_request("kept", FAR, max_tokens=28))
        bench.until("kept", State.DECODE)
        bench.step()
        store = bench.pairs[0].decode_store
        taken = exhaust(store)
        bench.until("kept", State.PREEMPTED)
        taken += exhaust(store, leave=2)  # enough for a short prompt, and too few for who was preempted
        bench.submit(make_request("near", NEAR, max_tokens=2))
        for _ in range(6):
            bench.step()
        self.assertEqual([bench.state(name) for name in ("kept", "near")], [State.PREEMPTED, State.WAITING])
        urgent = dataclasses.replace(make_request("urgent", NEAR, max_tokens=2), priority=-1)
        bench.submit(urgent)
        bench.until("urgent", State.FINISHED, limit=50)
        self.assertEqual([bench.state(name) for name in ("kept", "near")], [State.PREEMPTED, State.WAITING])
        restock(store, taken)
        self._assert_all_well(bench)
