"""Routers: one contract for all of them, and the guard around them."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
from absl.testing import parameterized

from streamserve.bandits import Decision, Policy
from streamserve.flowguard import FlowGuard, signals
from streamserve.parts import ROUTERS
from streamserve.types import LaneStats


def _stats(lane: int, **fields) -> LaneStats:
    numbers = {"free_slots": 1, "num_slots": 4, "free_pages": 9, "running": 3, "in_transit": 0}
    return LaneStats(lane=lane, **{**numbers, "queued_prefill_tokens": 0, "accepted_per_step": 1.5, **fields})


def _flowguard(name: str, lanes: int) -> FlowGuard:
    return FlowGuard(ROUTERS[name], num_lanes=lanes, seed=3)


class ContractTest(parameterized.TestCase):
    @parameterized.product(name=tuple(ROUTERS), lanes=(1, 3))
    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(data=st.data())
    def test_only_eligible_lanes_are_chosen(self, name, lanes, data):
        flowguard = _flowguard(name, lanes)
        for _ in range(4):
            eligible = data.draw(st.lists(st.booleans(), min_size=lanes, max_size=lanes).filter(any))
            lane = flowguard.route([_stats(index) for index in range(lanes)], eligible)
            self.assertTrue(eligible[lane])

    @parameterized.product(name=tuple(ROUTERS))
    def test_the_same_seed_gives_the_same_decisions(self, name):
        stats = [_stats(index) for index in range(3)]
        one, two = (_flowguard(name, 3) for _ in range(2))
        self.assertEqual(
            [one.route(stats, [True] * 3) for _ in range(9)], [two.route(stats, [True] * 3) for _ in range(9)]
        )

    @parameterized.product(name=tuple(ROUTERS))
    def test_the_state_keeps_its_shape_and_propensities_are_probabilities(self, name):
        policy = ROUTERS[name](3)
        context = signals.context([_stats(index) for index in range(3)], [True] * 3)
        decision, state = policy.choose(policy.init(), context, np.full((3, 2), 0.5))
        after = policy.update(state, context, decision, 1.0)
        shapes = [jax.tree.map(lambda leaf: np.shape(leaf), tree) for tree in (policy.init(), state, after)]
        self.assertEqual(shapes[0], shapes[1])
        self.assertEqual(shapes[0], shapes[2])
        self.assertBetween(float(decision.propensity), 1e-9, 1.0)


class FlowGuardTest(parameterized.TestCase):
    def test_round_robin_takes_turns_and_passes_over_lanes_that_are_full(self):
        flowguard = _flowguard("round_robin", 3)
        stats = [_stats(index) for index in range(3)]
        eligible = [[True] * 3] * 4 + [[True, False, True]] * 3
        self.assertEqual([flowguard.route(stats, may) for may in eligible], [0, 1, 2, 0, 2, 0, 2])

    def test_the_guard_stops_a_policy_that_picks_a_full_lane(self):
        stubborn = Policy(
            init=lambda: np.int32(0),
            choose=lambda state, context, key: (Decision(np.int32(1), np.float32(1)), state),
            update=lambda state, context, decision, reward: state,
        )
        flowguard = FlowGuard(lambda lanes: stubborn, num_lanes=2, seed=0)
        stats = [_stats(0), _stats(1)]
        self.assertEqual(flowguard.route(stats, [True, True]), 1)
        with self.assertRaisesRegex(ValueError, "chose lane 1, which may not take the request"):
            flowguard.route(stats, [True, False])
        with self.assertRaisesRegex(ValueError, "no lane can take a request"):
            flowguard.route(stats, [False, False])

    def test_the_context_has_a_column_for_every_signal(self):
        context = signals.context([_stats(0, running=2), _stats(1, queued_prefill_tokens=70)], [False, True])
        self.assertEqual(context.shape, (2, len(signals.SIGNALS)))
        self.assertEqual(context[0].tolist(), [0, 1, 9, 2, 0, 0, 1.5])
        self.assertEqual(context[1].tolist(), [1, 1, 9, 3, 0, 70, 1.5])
