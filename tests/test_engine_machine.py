"""Random walks over the whole engine: what is asked of it, what happens to it, and laws that hold after every step."""

import dataclasses
import functools
import random
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
from absl.testing import parameterized
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from streamserve.bandits import Policy
from streamserve.flowguard import FlowGuard, Route
from streamserve.flowguard.routers.picking import stateless
from streamserve.lifecycle import State
from tests import doubles
from tests.doubles import make_request
from tests.fake_programs import MAX_MODEL_LEN, VOCAB, FakePrograms, quiet_output
from tests.faults import NEVER, Bench, Fault, FaultyPair, Kind, exhaust, poison, restock

STEMS = (tuple(range(12)), (1,) * 16, (2, 3) * 5)  # prompts begin alike
EXCUSES = ("on purpose", "the link is down", "not finite", "did not arrive")
PROGRAMS = (
    *("prefill", "local_prefill", "draft_prefill", "first", "local_first", "take", "put", "insert", "release", "step"),
    *("read", "keep", "restore"),
)

RANDOMS = st.randoms(use_true_random=True)


def _fake_pairs(count: int, slowness: int, seed: float, config: dict[str, Any]) -> list[FaultyPair]:
    rng = random.Random(seed)
    batches = tuple(size for size in (1, 2) if size < config["max_num_seqs"])
    polls = lambda what: rng.randrange(slowness)  # noqa: E731
    return [FaultyPair(index, FakePrograms(polls=polls, decode_batches=batches, **config)) for index in range(count)]


def _wandering(num_lanes: int) -> Policy:
    """Make a router that goes anywhere, and computes prompts where they are decoded whenever it can."""
    del num_lanes

    def choose(context, noise_A2):
        lanes = np.flatnonzero(context.eligible_A)
        arm = int(lanes[int(noise_A2[0, 0] * len(lanes)) % len(lanes)])
        return Route(arm, 1 / len(lanes), bool(context.local_A[arm] and noise_A2[0, 1] < 0.7))

    return stateless(choose)


class EngineMachine(RuleBasedStateMachine):
    """Requests, faults and time, in any order, on lanes without devices.

    Hypothesis chooses what happens; numbers come from plain generators, which reach pages that run out far more often.
    """

    @initialize(rng=RANDOMS)
    def build(self, rng):
        pool = lambda: MAX_MODEL_LEN + 4 * rng.choice((0, 2, 5, 10))  # noqa: E731
        config = {
            "tiers": rng.choice(((0,), (2,), (0, 1, 3), (1, 3))),
            "colocated": rng.random() < 0.5,
            "draft_kv": rng.choice(("transfer", "recompute")),
            "preemption": rng.choice(("recompute", "keep")),
            "enable_prefix_caching": rng.random() < 0.7,
            "prefill_pool_tokens": pool(),
            "decode_pool_tokens": pool(),
            "max_num_seqs": rng.randint(1, 4),
        }
        config["local_tokens"] = 0 if config["colocated"] else rng.choice((0, 6, 40))
        pairs = _fake_pairs(rng.randint(1, 3), rng.choice((1, 3, 9)), rng.random(), config)
        plans = [doubles.tiny_specustream(pair, doubles.restless(pair.sizes), seed=rng.randint(0, 9)) for pair in pairs]
        self.bench = Bench(
            pairs,
            max_waiting=rng.randint(4, 12),
            transfer_timeout_s=1.0,
            specustreams=plans,
            flowguard=FlowGuard(_wandering, num_lanes=len(pairs), seed=rng.randint(0, 9)),
        )
        self.made, self.taken, self.excused, self.judged = 0, [], False, 0

    @rule(rng=RANDOMS)
    def submit(self, rng):
        for _ in range(rng.randint(1, 5)):
            self.made += 1
            prompt = (
                *rng.choice(STEMS)[: rng.randint(0, 16)],
                *(rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))),
            )
            base = make_request(
                str(self.made),
                prompt,
                seed=self.made,
                stop_ids=(rng.randrange(VOCAB),) if rng.random() < 0.2 else (),
                max_tokens=rng.randint(1, min(30, MAX_MODEL_LEN - len(prompt))),
                logprobs=rng.choice((None, 1)),
                prompt_logprobs=rng.choice((None, None, None, 1)),
            )
            timeout_s = rng.choice((None, None, None, None, 0.2, 2.0))
            place = {"priority": rng.randint(0, 2), "tenant": rng.choice("abc"), "timeout_s": timeout_s}
            self.bench.submit(dataclasses.replace(base, **place))

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            self.bench.step()
        self.judge()

    @rule(seconds=st.sampled_from((0.01, 0.3, 1.1)))
    def pass_time(self, seconds):
        self.bench.clock.sleep(seconds)
        self.bench.step()

    @rule(rng=RANDOMS)
    def cancel(self, rng):
        live = sorted(self.bench.scheduler._roster.known)
        if live:
            assert self.bench.scheduler.cancel(rng.choice(live))
        assert not self.bench.scheduler.cancel("nobody")
        self.bench.step()
        self.judge()

    @rule(rng=RANDOMS)
    def switch(self, rng):
        pair = rng.choice(self.bench.pairs)
        pair.switched_on = not pair.switched_on
        self.bench.step()
        self.judge()

    @rule(rng=RANDOMS)
    def break_a_program(self, rng):
        self.excused = True
        fault = Fault(rng.choice(PROGRAMS), rng.choice((Kind.REFUSED, Kind.LOST)), skip=rng.randint(0, 3))
        rng.choice(self.bench.pairs).faults.plan.append(fault)

    @rule(rng=RANDOMS)
    def delay_transfers(self, rng):
        fault = Fault("transfer", Kind.LATE, polls=rng.choice((2, 20, NEVER)), count=rng.choice((1, 1, 4)))
        self.excused |= fault.count > 1
        rng.choice(self.bench.pairs).faults.plan.append(fault)

    @rule(rng=RANDOMS)
    @precondition(lambda self: not self.taken)
    def exhaust(self, rng):
        pair = rng.choice(self.bench.pairs)
        store = rng.choice((pair.prefill_store, pair.decode_store))
        self.taken.append((store, exhaust(store, leave=rng.randint(0, 3))))

    @rule()
    @precondition(lambda self: self.taken)
    def restock(self):
        for store, pages in self.taken:
            restock(store, pages)
        self.taken.clear()

    @rule(rng=RANDOMS)
    def poison(self, rng):
        pair = rng.choice(self.bench.pairs)
        store = rng.choice((pair.prefill_store, pair.decode_store))
        pages = [page for page, owner in sorted(store.ledger.held().items()) if owner.holder in self.bench.requests]
        if pages and not store.is_lost:
            self.excused = True
            poison(store, rng.choice(pages))

    @rule(rng=RANDOMS)
    @precondition(lambda self: self.made > 20)
    def shut_down(self, rng):
        if rng.random() < 0.1:
            if self.taken:
                self.restock()
            self.bench.take(self.bench.scheduler.shutdown())
            assert self.bench.scheduler.idle
            doubles.assert_empty(self.bench.pairs)
            self.judge()

    def judge(self) -> None:
        """Look at the ends that are new."""
        ends = list(self.bench.ends.values())
        for end in ends[self.judged :]:
            if end.state is State.FINISHED:
                request = self.bench.requests[end.request_id]
                assert end.completion.token_ids == self.quiet(request)
                asked = request.params.prompt_logprobs is not None
                assert asked == (end.prompt_logprobs is not None)
                assert not asked or len(end.prompt_logprobs) == len(request.prompt_token_ids)
                assert request.params.logprobs is None or len(end.completion.logprobs) == len(end.completion.token_ids)
            elif end.state is State.FAILED:
                assert self.excused, end
                assert any(excuse in end.error for excuse in EXCUSES), end
            else:
                assert end.error, end
        self.judged = len(ends)

    def quiet(self, request):
        """The output that a request must have."""
        return quiet_output(request)

    def teardown(self):
        """Let all end, and see that the lanes serve on, whatever has happened."""
        if self.taken:
            self.restock()
        for pair in self.bench.pairs:
            pair.faults.plan.clear()
            pair.switched_on = True
        for _ in range(3000):
            if self.bench.scheduler.idle:
                break
            self.bench.clock.sleep(0.05)
            self.bench.step()
        self.bench.drain(limit=1)
        late = [make_request(f"late {index}", (1, 2, index), max_tokens=9) for index in range(4)]
        for request in late:
            self.bench.submit(request)
            self.bench.drain()
        self.judge()
        assert all(self.bench.ends[request.request_id].completion is not None for request in late)


EngineMachine.TestCase.settings = hypothesis.settings(
    max_examples=100,
    phases=(hypothesis.Phase.generate,),
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
EngineMachineTest = EngineMachine.TestCase


class TinyMachine(EngineMachine):
    """The same on the tiny model, greedily: its outputs are those of decoding by whole sequences."""

    def build(self, rng):
        layout = {"draft_kv": "recompute", "preemption": rng.choice(("recompute", "keep"))}
        layout["draft_kv"] = "transfer" if layout["preemption"] == "recompute" else "recompute"
        pairs = doubles.tiny_pairs(3, tiers=(0, 1, 3), num_pairs=1, local_tokens=16, **layout)
        pair = FaultyPair(0, pairs[0].programs)
        plans = [doubles.tiny_specustream(pair, doubles.restless(pair.sizes), seed=rng.randint(0, 9))]
        flowguard = FlowGuard(_wandering, num_lanes=1, seed=rng.randint(0, 9))
        self.bench = Bench([pair], transfer_timeout_s=1.0, specustreams=plans, flowguard=flowguard)
        self.made, self.taken, self.excused, self.judged = 0, [], False, 0

    def quiet(self, request):
        stop_ids, output = request.stop_ids, _greedy(request.prompt_token_ids, request.params.max_tokens)
        length = next((place + 1 for place, token in enumerate(output) if token in stop_ids), len(output))
        return output[:length]


@functools.cache
def _greedy(prompt, max_tokens):
    return tuple(doubles.plain_greedy(doubles.tiny_params(0), prompt, max_tokens))


# How often each thing happens on a walk.
WALK = {
    "submit": 4,
    "step": 12,
    "pass_time": 1,
    "cancel": 2,
    "delay_transfers": 1,
    "exhaust": 1,
    "restock": 2,
    "shut_down": 0.3,
    "switch": 0.5,
    "break_a_program": 1,
    "poison": 0.5,
}


def walk(machine: EngineMachine, seed: int, steps: int) -> int:
    """Let things happen at random; hypothesis leaves out whole kinds of them in most of its runs.

    Returns:
      How many requests ended; the laws were asserted after every step, and that nothing is left at the end.
    """
    rng = random.Random(seed)
    machine.build(rng)
    names = list(WALK)[: rng.choice((-2, None))]  # half of the walks without faults, in which nobody may fail
    for name in rng.choices(names, [WALK[name] for name in names], k=steps):
        if name == "step":
            machine.step(rng.randint(1, 6))
        elif name == "pass_time":
            machine.pass_time(rng.choice((0.01, 0.3, 1.1)))
        elif name == "restock":
            if machine.taken:
                machine.restock()
        elif name != "exhaust" or not machine.taken:
            getattr(machine, name)(rng)
    machine.teardown()
    return len(machine.bench.ends)


class WalkTest(parameterized.TestCase):
    @parameterized.parameters(*range(6))
    def test_nothing_is_lost_on_lanes_without_devices(self, seed):
        ended = sum(walk(EngineMachine(), 10 * seed + index, 100) for index in range(10))
        self.assertGreater(ended, 100)

    @parameterized.parameters(*range(4))
    def test_nothing_is_lost_on_the_tiny_model(self, seed):
        self.assertGreater(walk(TinyMachine(), seed, 60), 5)

    def test_a_run_that_is_closed_in_the_middle_leaves_nothing_behind(self):
        for seed in range(20):
            rng, machine = random.Random(seed), EngineMachine()
            machine.build(rng)
            machine.submit(rng)
            requests = [make_request(f"pulled {index}", (index,) * 7, max_tokens=9) for index in range(13)]
            run = machine.bench.scheduler.run(requests)
            for _ in range(rng.randint(1, 9)):
                next(run)
            run.close()
            self.assertTrue(machine.bench.scheduler.idle)
            doubles.assert_empty(machine.bench.pairs)
            self.assertLen(list(machine.bench.scheduler.run(requests)), len(requests))
