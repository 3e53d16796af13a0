"""StreamScheduler before fake lanes: order, back-pressure, and one end for every request, without any model."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized

from streamserve import mesh
from streamserve.config import SchedulerConfig
from streamserve.flowguard import FlowGuard, round_robin
from streamserve.kv.pages import Owner, PageLedger, Stage
from streamserve.scheduler import Refused, StreamScheduler
from streamserve.sequence import RunningRequest
from streamserve.tokenizer import TextStream
from streamserve.types import EMPTY_TOKEN, FinishCode, StepOutput, TokenLogprobs
from tests.doubles import make_request

TOKENS_A_TICK = 3


class FakeItem:
    """A request on its way; it arrives when it has been asked `delay` times."""

    def __init__(self, request, delay):
        self.request, self.transfer_bytes, self.delay = request, 7, delay


class FakePair:
    """A lane that emits its prompt's first token, again and again, three a tick, and never compiles."""

    def __init__(self, slots=2, delay=0):
        self.ledger, self.delay = PageLedger(slots), delay
        self.rows, self.prefilled, self.transit, self.most_transit = {}, [], 0, 0

    num_slots = property(lambda self: self.ledger.num_pages)
    free_slots = property(lambda self: self.ledger.num_free)

    def prefill(self, request):
        if request.prompt_token_ids[0] == 0:
            raise ValueError("this prompt fits no bucket")
        if request.prompt_token_ids[0] == 8:
            raise RuntimeError("out of memory")
        self.prefilled.append(request.request_id)
        self.transit += 1
        self.most_transit = max(self.most_transit, self.transit)
        return FakeItem(request, self.delay)

    def has_arrived(self, item):
        item.delay -= 1
        return item.delay < 0

    def wait(self, item):
        item.delay = 0

    def insert(self, item):
        self.transit -= 1
        slot = self.ledger.acquire(Owner(Stage.DECODE, item.request.request_id))
        self.rows[slot] = [item.request, 0]
        return slot

    def step(self, tier):
        tokens = np.full((self.num_slots, TOKENS_A_TICK), EMPTY_TOKEN, np.int32)
        finish = np.zeros(self.num_slots, np.int32)
        for slot, row in self.rows.items():
            request, emitted = row
            count = min(TOKENS_A_TICK, request.params.max_tokens - emitted)
            tokens[slot, :count] = request.prompt_token_ids[0]
            row[1] += count
            finish[slot] = FinishCode.LENGTH if row[1] == request.params.max_tokens else FinishCode.RUNNING
        counts = np.full((self.num_slots, 1), EMPTY_TOKEN, np.int32)
        zeros = np.zeros(tokens.shape, np.float32)
        logprobs = TokenLogprobs(chosen=zeros, rank=zeros, top_ids=zeros[..., None], top=zeros[..., None])
        return StepOutput(tokens=tokens, accepted=counts, drafted=counts, finish=finish, logprobs=logprobs)

    def read(self, pending):
        return pending

    def reset(self):
        self.ledger, self.rows, self.transit = PageLedger(self.num_slots), {}, 0

    def release(self, slot, request_id):
        self.ledger.release(slot, Owner(Stage.DECODE, request_id))
        del self.rows[slot]


def _scheduler(lanes, **config) -> StreamScheduler:
    flowguard = FlowGuard(round_robin, num_lanes=len(lanes), seed=0, device=mesh.control_device())

    def start(request, **times):
        return RunningRequest(request, TextStream(None, request.params), lambda token: None, **times)

    ticks = iter(range(10**9))
    config = SchedulerConfig(**config)
    return StreamScheduler(lanes, flowguard, config, tier=0, start=start, clock=lambda: float(next(ticks)))


class SchedulerTest(parameterized.TestCase):
    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(
        lanes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=3),
        wanted=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 8)), max_size=25),
        prefills=st.integers(1, 3),
    )
    def test_every_request_ends_once_with_its_own_tokens(self, lanes, wanted, prefills):
        pairs = [FakePair(slots, delay) for slots, delay in lanes]
        requests = [
            make_request(str(index), (token,), max_tokens=count) if token < 9 else Refused(str(index), "no")
            for index, (token, count) in enumerate(wanted)
        ]
        ends = list(_scheduler(pairs, max_prefills=prefills, max_waiting=4).run(requests))
        assert sorted(end.request_id for end in ends) == sorted(str(index) for index in range(len(wanted)))
        for end in ends:
            token, count = wanted[int(end.request_id)]
            if token in (0, 8, 9):
                assert end.error == {0: "this prompt fits no bucket", 8: "out of memory", 9: "no"}[token]
            else:
                assert end.completion.token_ids == (token,) * count
        for pair in pairs:
            pair.ledger.check()
            assert not pair.ledger.held()
            assert pair.most_transit <= prefills

    def test_requests_are_served_first_come_first_served_and_lanes_take_turns(self):
        pairs = [FakePair(slots=4), FakePair(slots=4)]
        requests = [make_request(str(index), (1,), max_tokens=2) for index in range(9)]
        list(_scheduler(pairs).run(requests))
        self.assertEqual(pairs[0].prefilled, ["0", "2", "4", "6", "8"])
        self.assertEqual(pairs[1].prefilled, ["1", "3", "5", "7"])

    def test_a_lane_whose_prefill_is_backed_up_is_passed_over(self):
        slow, fast = FakePair(slots=1, delay=50), FakePair(slots=4)
        requests = [make_request(str(index), (1,), max_tokens=2) for index in range(20)]
        ends = list(_scheduler([slow, fast], max_prefills=1).run(requests))
        self.assertLen(ends, 20)
        self.assertGreater(len(fast.prefilled), len(slow.prefilled))

    def test_the_input_is_pulled_with_a_bounded_look_ahead(self):
        pulled = []

        def endless():
            for index in range(10**6):
                pulled.append(index)
                yield make_request(str(index), (1,), max_tokens=5)

        run = _scheduler([FakePair()], max_waiting=6, max_prefills=2).run(endless())
        for done in range(1, 30):
            next(run)
            self.assertLessEqual(len(pulled), done + 6 + 2 + 2)
        run.close()

    def test_an_error_of_the_input_or_of_a_lane_leaves_the_lanes_empty(self):
        def broken():
            yield make_request("a", (1,), max_tokens=50)
            raise OSError("the input is gone")

        pair = FakePair()
        scheduler = _scheduler([pair])
        with self.assertRaisesRegex(OSError, "the input is gone"):
            list(scheduler.run(broken()))
        self.assertEqual(pair.ledger.held(), {})
        self.assertLen(list(scheduler.run([make_request("b", (1,), max_tokens=2)])), 1)
        pair.step = lambda tier: (_ for _ in ()).throw(RuntimeError("the device is gone"))
        pair.release = lambda slot, request_id: (_ for _ in ()).throw(RuntimeError("the state is gone too"))
        with self.assertRaisesRegex(RuntimeError, "the device is gone"):
            list(scheduler.run([make_request("c", (1,), max_tokens=2)]))
        self.assertEqual(pair.ledger.held(), {})
        del pair.step, pair.release
        self.assertLen(list(scheduler.run([make_request("d", (1,), max_tokens=2)])), 1)

    def test_ticks_go_on_between_pulls(self):
        pulled = []

        def source():
            for index in range(200):
                pulled.append(index)
                yield make_request(str(index), (1,), max_tokens=5) if index % 2 else Refused(str(index), "no")

        run = _scheduler([FakePair()], max_waiting=100).run(source())
        first = next(end for end in run if end.completion is not None)
        self.assertEqual(first.request_id, "1")
        self.assertLess(len(pulled), 20)
        run.close()

    def test_times_are_in_order(self):
        (end,) = _scheduler([FakePair(delay=3)]).run([make_request("a", (1,), max_tokens=9)])
        times = end.metrics
        stamps = [times.arrival_s, times.scheduled_s, times.first_token_s, times.finished_s]
        self.assertEqual(stamps, sorted(stamps))
        self.assertLess(times.first_token_s, times.finished_s)
        self.assertEqual(times.transfer_bytes, 7)
