"""The waiting queue, rule by rule; `test_waiting_laws` has what holds for any sequence of calls."""

from absl.testing import parameterized

from streamserve import waiting
from streamserve.sampling_params import SamplingParams
from streamserve.types import Deferred, Request
from streamserve.waiting import WaitingQueue

PARAMS = SamplingParams()


def waiting_request(name: str, tenant: str = "", *, priority: int = 0, tokens: int = 1, timeout_s: float | None = None):
    """Build a request of `tokens` prompt tokens."""
    return Request(
        request_id=name,
        prompt_token_ids=(5,) * tokens,
        params=PARAMS,
        seed=0,
        stop_ids=(),
        priority=priority,
        tenant=tenant,
    )


def _queue(*requests: Request, max_waiting: int = 64) -> WaitingQueue:
    queue = WaitingQueue(max_waiting)
    for request in requests:
        assert queue.put(request) is None
    return queue


def _pop(queue: WaitingQueue, count: int) -> list[str]:
    return [queue.pop().request.request_id for _ in range(count)]


def _drain(queue: WaitingQueue) -> list[str]:
    return _pop(queue, len(queue))


class OrderTest(parameterized.TestCase):
    def test_the_lowest_priority_goes_first(self):
        queue = _queue(
            waiting_request("a", priority=2), waiting_request("b", priority=-1), waiting_request("c", priority=0)
        )
        self.assertEqual(_drain(queue), ["b", "c", "a"])

    def test_one_tenant_is_served_first_come_first_served(self):
        self.assertEqual(_drain(_queue(*(waiting_request(name, tokens=9) for name in "edcba"))), list("edcba"))

    def test_equal_tenants_take_turns_from_the_earliest_on(self):
        queue = _queue(*(waiting_request(f"{tenant}{index}", tenant) for tenant in "ba" for index in range(3)))
        self.assertEqual(_drain(queue), ["b0", "a0", "b1", "a1", "b2", "a2"])

    def test_short_prompts_go_more_often_than_long_ones(self):
        long = [waiting_request(f"a{index}", "a", tokens=3) for index in range(2)]
        short = [waiting_request(f"b{index}", "b", tokens=1) for index in range(4)]
        self.assertEqual(_drain(_queue(*long, *short)), ["a0", "b0", "b1", "b2", "a1", "b3"])

    @parameterized.parameters((1, "a1"), (2, "b1"))
    def test_an_output_token_weighs_as_much_as_two_of_the_prompt(self, output_tokens, following):
        queue = _queue(
            waiting_request("a0", "a"),
            waiting_request("b0", "b", tokens=4),
            waiting_request("b1", "b"),
            waiting_request("a1", "a"),
        )
        popped = [queue.pop(), queue.pop()]
        queue.charge(popped[0].request, output_tokens)  # a: 1 + 2 * output_tokens, b: 4
        self.assertEqual(queue.peek().request.request_id, following)

    def test_peek_shows_what_pop_takes_and_an_empty_queue_has_nothing(self):
        queue = _queue(waiting_request("a"))
        self.assertTrue(queue)
        self.assertIs(queue.peek(), queue.peek())
        self.assertIs(queue.peek(), queue.pop())
        self.assertIsNone(queue.peek())
        self.assertIsNone(queue.pop())
        self.assertFalse(queue)


class IdleTest(parameterized.TestCase):
    def test_a_newcomer_starts_level_with_the_least_of_those_who_wait(self):
        queue = _queue(
            *(waiting_request(f"{tenant}{index}", tenant, tokens=50) for tenant in "ab" for index in range(5))
        )
        _pop(queue, 4)
        for index in range(4):
            queue.put(waiting_request(f"c{index}", "c", tokens=50))
        self.assertEqual(_pop(queue, 6), ["a2", "b2", "c0", "a3", "b3", "c1"])

    def test_who_comes_back_has_no_credit_for_idling(self):
        queue = _queue(
            waiting_request("c0", "c"), *(waiting_request(f"a{index}", "a", tokens=50) for index in range(6))
        )
        self.assertEqual(_pop(queue, 4), ["c0", "a0", "a1", "a2"])
        queue.put(waiting_request("c1", "c", tokens=50))
        queue.put(waiting_request("c2", "c", tokens=50))
        self.assertEqual(_drain(queue), ["a3", "c1", "a4", "c2", "a5"])

    def test_who_comes_back_has_not_lost_what_it_was_ahead(self):
        queue = _queue(
            waiting_request("a0", "a", tokens=9),
            waiting_request("b0", "b"),
            waiting_request("b1", "b"),
            waiting_request("b2", "b"),
        )
        _pop(queue, 2)
        queue.put(waiting_request("a1", "a"))
        self.assertEqual(_drain(queue), ["b1", "b2", "a1"])

    def test_a_newcomer_to_an_empty_queue_starts_level_with_the_last_to_have_left(self):
        queue = _queue(waiting_request("c", "c"), *(waiting_request(f"a{index}", "a", tokens=50) for index in range(2)))
        last = [queue.pop() for _ in range(3)][2]
        queue.charge(last.request, 7)
        for index in range(3):
            queue.put(waiting_request(f"b{index}", "b", tokens=50))
            queue.put(waiting_request(f"a{index + 2}", "a", tokens=50))
        self.assertEqual(_drain(queue), ["b0", "a2", "b1", "a3", "b2", "a4"])

    def test_a_tenant_starved_at_a_low_priority_gives_newcomers_to_a_higher_one_no_credit(self):
        queue = _queue(
            waiting_request("low", "low", priority=1), *(waiting_request(f"a{i}", "a", tokens=50) for i in range(6))
        )
        _pop(queue, 4)
        for index in range(3):
            queue.put(waiting_request(f"b{index}", "b", tokens=50))
        self.assertEqual(_drain(queue), ["a4", "b0", "a5", "b1", "b2", "low"])

    def test_millions_of_tenants_leave_no_more_counters_than_the_limit(self):
        queue = _queue(waiting_request("a0", "a"), waiting_request("a1", "a"))
        for index in range(2 * waiting.MAX_IDLE_COUNTERS):
            queue.put(waiting_request(f"{index}.0", f"once {index}"))
            queue.remove(f"{index}.0") if index % 2 else queue.pop()
        self.assertLen(queue._idle, waiting.MAX_IDLE_COUNTERS)
        self.assertEqual(set(queue._served), {*queue._lines, *queue._idle})
        self.assertLessEqual(len(queue._lines), 2)

    def test_a_tenant_who_waits_is_never_forgotten(self):
        queue = _queue(waiting_request("a0", "a"))
        queue.pop()
        queue.put(waiting_request("a1", "a"))
        for index in range(waiting.MAX_IDLE_COUNTERS + 1):
            queue.put(waiting_request(f"{index}", f"once {index}"))
            queue.remove(f"{index}")
        self.assertEqual(_drain(queue), ["a1"])

    def test_who_was_forgotten_comes_back_as_a_newcomer(self):
        queue = _queue(waiting_request("a0", "a", tokens=500))
        forgotten = queue.pop()
        for index in range(waiting.MAX_IDLE_COUNTERS):
            queue.put(waiting_request(f"{index}", f"once {index}", tokens=3))
            queue.pop()
        queue.charge(forgotten.request, 10**6)
        for index in range(2):
            queue.put(waiting_request(f"b{index}", "b", tokens=3))
        queue.put_back(forgotten)
        self.assertEqual(queue._served[0, "a"], queue._served[0, "b"])
        queue.put(waiting_request("a1", "a"))
        self.assertEqual(_drain(queue), ["a0", "b0", "b1", "a1"])


class BoundTest(parameterized.TestCase):
    def test_a_full_queue_says_so_and_stays_as_it_was(self):
        queue = _queue(*(waiting_request(f"{index}") for index in range(64)))
        refused = queue.put(waiting_request("64", "b"))
        self.assertEqual(refused, Deferred("the waiting queue is full: 64 requests wait (scheduler.max_waiting=64)"))
        self.assertLen(queue, 64)
        self.assertIsNone(queue.remove("64"))
        queue.pop()
        self.assertIsNone(queue.put(waiting_request("64", "b")))

    def test_what_is_put_back_is_never_refused_and_takes_no_room_from_others(self):
        queue = _queue(waiting_request("a"), waiting_request("b"), max_waiting=2)
        popped = [queue.pop(), queue.pop()]
        for name in "cd":
            self.assertIsNone(queue.put(waiting_request(name)))
        for entry in popped:
            queue.put_back(entry)
        self.assertLen(queue, 4)
        reason = "the waiting queue is full: 2 requests wait (scheduler.max_waiting=2)"
        self.assertEqual(queue.put(waiting_request("e")), Deferred(reason))
        queue.remove("a")
        self.assertEqual(queue.put(waiting_request("e")), Deferred(reason))
        queue.remove("c")
        self.assertIsNone(queue.put(waiting_request("e")))
        self.assertEqual(_drain(queue), ["b", "d", "e"])

    def test_a_request_waits_once(self):
        queue = _queue(waiting_request("a"))
        with self.assertRaisesRegex(AssertionError, "request a waits already"):
            queue.put(waiting_request("a"))


class PutBackTest(parameterized.TestCase):
    def test_it_goes_before_its_tenants_others_in_the_order_of_arrival(self):
        queue = _queue(*(waiting_request(name) for name in "abcd"))
        popped = [queue.pop() for _ in range(3)]
        for index in (1, 2, 0):
            queue.put_back(popped[index])
        self.assertEqual([queue.pop() for _ in range(3)], popped)

    def test_it_keeps_its_priority(self):
        queue = _queue(waiting_request("a", priority=1))
        queue.put(waiting_request("b", priority=0))
        _pop(queue, 1)
        queue.put_back(queue.pop())
        queue.put(waiting_request("c", priority=0))
        self.assertEqual(queue.peek().request.request_id, "c")

    def test_a_prompt_is_paid_for_once(self):
        requests = [waiting_request(f"{tenant}{index}", tenant, tokens=9) for index in range(3) for tenant in "ab"]
        queue = _queue(*requests)
        for _ in range(5):
            queue.put_back(queue.pop())
        self.assertEqual(_drain(queue), ["a0", "b0", "a1", "b1", "a2", "b2"])

    def test_it_is_no_arrival_so_new_requests_behind_it_have_no_credit(self):
        queue = _queue(
            waiting_request("b0", "b"), *(waiting_request(f"a{index}", "a", tokens=50) for index in range(6))
        )
        preempted = queue.pop()
        _pop(queue, 3)
        queue.put_back(preempted)
        self.assertEqual(_pop(queue, 1), ["b0"])
        queue.put_back(preempted)
        for index in (1, 2):
            queue.put(waiting_request(f"b{index}", "b", tokens=50))
        self.assertEqual(_drain(queue), ["b0", "a3", "b1", "a4", "b2", "a5"])


class LeavingTest(parameterized.TestCase):
    def test_a_removed_request_is_returned_once_and_not_charged_for(self):
        queue = _queue(waiting_request("a0", "a", tokens=99), waiting_request("b0", "b"), waiting_request("a1", "a"))
        self.assertEqual(queue.remove("a0").request.request_id, "a0")
        self.assertIsNone(queue.remove("a0"))
        queue.put(waiting_request("a2", "a"))
        self.assertEqual(_drain(queue), ["b0", "a1", "a2"])
