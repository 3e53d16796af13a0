"""Routers: one contract for all of them, what each is to prefer, and the guard around them."""

import collections
import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
from absl.testing import parameterized

from streamserve.bandits import Policy
from streamserve.config import FlowGuardConfig
from streamserve.flowguard import FlowGuard, Route, RouteOutcome, is_good, routers, utility
from streamserve.flowguard.predict import predict
from streamserve.flowguard.routers import scorers
from streamserve.parts import ROUTERS
from streamserve.types import LanePace, LaneStats
from tests.flowguard.lane_states import BUSY, OBJECTIVE, ask, contexts, lane, seen

GOOD = RouteOutcome(answered=True, ttft_s=0.1, tpot_s=0.01, latency_s=1.0, output_tokens=90)
OUTCOMES = (
    GOOD,
    RouteOutcome(answered=True, ttft_s=4.0, tpot_s=0.3, latency_s=9.0, output_tokens=20),
    RouteOutcome(False),
)


def _noise(lanes: int, seed: int) -> np.ndarray:
    return 1.0 - np.random.default_rng(seed).random((lanes, 2))


class ContractTest(parameterized.TestCase):
    @parameterized.product(name=tuple(ROUTERS), lanes=(1, 3))
    @hypothesis.settings(max_examples=40, deadline=None)
    @hypothesis.given(data=st.data())
    def test_only_eligible_lanes_are_chosen_with_a_probability_and_prefill_only_where_it_can(self, name, lanes, data):
        policy = ROUTERS[name](lanes)
        state = policy.init()
        for turn in range(4):
            context = data.draw(contexts(lanes))
            route, state = policy.choose(state, context, _noise(lanes, turn))
            self.assertTrue(context.eligible_A[route.arm])
            self.assertTrue(0 < route.propensity <= 1)
            self.assertTrue(context.local_A[route.arm] or not route.local)
            state = policy.update(state, context, route, data.draw(st.sampled_from(OUTCOMES)))
            self.assertTrue(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)))

    @parameterized.product(name=tuple(ROUTERS))
    @hypothesis.settings(max_examples=20, deadline=None)
    @hypothesis.given(data=st.data())
    def test_it_is_pure_and_its_state_keeps_its_shape(self, name, data):
        policy, context = ROUTERS[name](3), data.draw(contexts(3))
        before = jax.tree.map(np.copy, context)
        first, state = policy.choose(policy.init(), context, _noise(3, 1))
        again, _ = policy.choose(policy.init(), context, _noise(3, 1))
        self.assertEqual(first, again)
        after = policy.update(state, context, first, GOOD)
        kept = jax.tree.map(np.copy, after)
        policy.update(after, context, first, OUTCOMES[1])
        jax.tree.map(np.testing.assert_array_equal, after, kept)
        jax.tree.map(np.testing.assert_array_equal, context, before)
        shapes = [jax.tree.map(np.shape, tree) for tree in (policy.init(), state, after)]
        self.assertEqual(shapes[0], shapes[1])
        self.assertEqual(shapes[0], shapes[2])

    @parameterized.product(name=tuple(set(ROUTERS) - {"round_robin"}))
    def test_propensities_are_the_frequencies(self, name):
        policy = ROUTERS[name](4)
        lanes = [lane(0, running=2), lane(1, running=2), lane(2), lane(3, in_transit=2)]
        context = seen(lanes, eligible=[True, True, True, False])
        count, told = collections.Counter(), {}
        for seed in range(6000):
            route, _ = policy.choose(policy.init(), context, _noise(4, seed))
            count[route.arm] += 1
            told[route.arm] = route.propensity
        for arm, propensity in told.items():
            self.assertAlmostEqual(
                count[arm] / 6000, propensity, delta=4 * (propensity * (1 - propensity) / 6000) ** 0.5
            )

    @parameterized.product(name=tuple(ROUTERS))
    def test_the_same_seed_gives_the_same_decisions(self, name):
        def decisions():
            flowguard = FlowGuard(ROUTERS[name], num_lanes=3, seed=3)
            made = []
            for turn in range(40):
                lanes = [lane(index, running=(turn * (index + 1)) % 5) for index in range(3)]
                made.append(flowguard.route(ask(3, request_id=str(turn)), lanes, [True] * 3))
                flowguard.begun(turn)
                flowguard.learn(str(turn - 3), OUTCOMES[turn % 3], turn)
            return made

        self.assertEqual(decisions(), decisions())


def _arm(name: str, lanes, **fields) -> int:
    policy = ROUTERS[name](len(lanes))
    return policy.choose(policy.init(), seen(lanes, **fields), np.full((len(lanes), 2), 0.5))[0].arm


class PreferenceTest(parameterized.TestCase):
    def test_round_robin_takes_turns_and_passes_over_lanes_that_are_full(self):
        policy, lanes = ROUTERS["round_robin"](3), [lane(index) for index in range(3)]
        state, arms = policy.init(), []
        for eligible in [[True] * 3] * 4 + [[True, False, True]] * 3:
            route, state = policy.choose(state, seen(lanes, eligible=eligible), np.zeros((3, 2)))
            arms.append(route.arm)
        self.assertEqual(arms, [0, 1, 2, 0, 2, 0, 2])

    @parameterized.parameters("least_outstanding", "power_of_two", "flowguard_paper", "flowguard")
    def test_the_less_loaded_of_two_lanes_is_taken(self, name):
        self.assertEqual(_arm(name, [lane(0, in_transit=5, free_slots=0), lane(1, running=0, free_slots=4)]), 1)

    @parameterized.parameters("prefix_aware", "kv_cost", "min_latency", "weighted_scorers", "flowguard")
    def test_the_lane_that_knows_the_prompt_is_taken(self, name):
        for hit_tokens, arm in (((0, 90, 20), 1), ((90, 20, 0), 0), ((20, 0, 90), 2)):
            self.assertEqual(_arm(name, [lane(0), lane(1), lane(2)], hit_tokens=hit_tokens), arm)

    def test_prefix_aware_balances_where_loads_differ_much(self):
        lanes = [lane(0, running=40), lane(1, running=3)]
        self.assertEqual(_arm("prefix_aware", lanes, hit_tokens=(90, 0)), 1)
        self.assertEqual(_arm("prefix_aware", [lane(0, running=20), lane(1)], hit_tokens=(90, 0)), 0)
        self.assertEqual(_arm("prefix_aware", [lane(0, running=20), lane(1)], hit_tokens=(40, 0)), 1)  # hardly known

    def test_prefix_aware_balances_when_both_limits_are_exceeded_and_not_at_them(self):
        def arm(first: int, second: int, known: int) -> int:
            return _arm("prefix_aware", [lane(0, running=first), lane(1, running=second)], hit_tokens=(known, 0))

        self.assertEqual([arm(33, 0, 90), arm(32, 0, 90)], [1, 0])
        self.assertEqual([arm(400, 365, 90), arm(400, 360, 90)], [0, 1])  # 35 and 40 more, 1.096 and 1.11 times
        self.assertEqual([arm(20, 3, 51), arm(20, 3, 50)], [0, 1])

    def test_prefix_aware_looks_at_no_lane_that_is_full(self):
        def arm(full, **fields) -> int:
            return _arm("prefix_aware", [lane(0), lane(1, running=2), full], eligible=[True, True, False], **fields)

        self.assertEqual(arm(lane(2), hit_tokens=(10, 0, 90)), 1)  # where it may go, the prompt is hardly known
        self.assertEqual(arm(lane(2, running=40), hit_tokens=(90, 0, 0)), 0)  # and loads are alike

    def test_kv_cost_weighs_what_it_is_told_to(self):
        def arm(lanes, hits, **weights) -> int:
            policy = ROUTERS["kv_cost"](2, **weights)
            return policy.choose((), seen(lanes, hit_tokens=hits), np.full((2, 2), 0.5))[0].arm

        alike = [lane(0, in_transit=1), lane(1, in_transit=4)]
        self.assertEqual([arm(alike, (0, 0), request_weight=1.0), arm(alike[::-1], (0, 0), request_weight=1.0)], [0, 1])
        known = [lane(0, free_pages=8), lane(1, free_pages=9)]  # 64 tokens less to compute, and 64 more held
        scaled = [arm(known, (64, 0), prefill_scale=scale) for scale in (2.0, 0.5)]
        self.assertEqual(scaled, [0, 1])

    def test_min_latency_takes_the_less_loaded_of_lanes_that_have_measured_nothing(self):
        lanes = [lane(0, pace=LanePace(), in_transit=2), lane(1, pace=LanePace())]
        self.assertEqual([_arm("min_latency", lanes), _arm("min_latency", lanes[::-1])], [1, 0])

    def test_kv_cost_adds_blocks_to_compute_and_blocks_held(self):
        # 100 + 156 tokens in blocks of 64 and 30 pages held, against 100 tokens and 33 pages.
        self.assertEqual(_arm("kv_cost", [lane(0, queued_prefill_tokens=156, free_pages=10), lane(1, free_pages=7)]), 0)
        self.assertEqual(_arm("kv_cost", [lane(0, queued_prefill_tokens=412, free_pages=10), lane(1, free_pages=7)]), 1)
        # Smaller pages hold less: now the queue counts for more than three of them.
        small = [
            lane(0, queued_prefill_tokens=156, free_pages=10, page_tokens=16),
            lane(1, free_pages=7, page_tokens=16),
        ]
        self.assertEqual(_arm("kv_cost", small), 1)

    def test_weighted_scorers_weigh_queue_pages_and_prefix_by_2_2_and_3(self):
        # The whole queue is worth 2; a third of the prefix and half of the pages 1 each, less an eighth.
        lanes = [lane(0, waiting=1, free_pages=20), lane(1, free_pages=0)]
        self.assertEqual(_arm("weighted_scorers", lanes, hit_tokens=(30, 0)), 1)
        self.assertEqual(_arm("weighted_scorers", lanes, hit_tokens=(40, 0)), 0)

    @parameterized.parameters("min_latency", "flowguard")
    def test_a_long_prefill_queue_is_seen(self, name):
        self.assertEqual(_arm(name, [lane(0, queued_prefill_tokens=900), lane(1, running=4, free_slots=0)]), 1)

    @parameterized.parameters("min_latency", "flowguard")
    def test_a_slow_link_is_seen(self, name):
        slow = dataclasses.replace(BUSY, transfer_s_per_byte=1e-6)
        self.assertEqual(_arm(name, [lane(0, pace=slow), lane(1, in_transit=1, free_slots=2)]), 1)

    def test_only_flowguard_sees_what_speculation_brings(self):
        slow = LanePace(tick_s=0.02, tokens_per_tick=1.0, accepted_per_step=0.1, drafted_per_step=3.0)
        quick = LanePace(tick_s=0.02, tokens_per_tick=3.5, accepted_per_step=2.5, drafted_per_step=3.0)
        lanes = [lane(0, pace=slow), lane(1, pace=quick)]
        self.assertEqual(_arm("flowguard", lanes), 1)
        self.assertEqual(_arm("flowguard", lanes[::-1]), 0)
        for name in ("least_outstanding", "prefix_aware", "kv_cost", "min_latency", "weighted_scorers"):
            context = seen(lanes)
            blind = context._replace(
                tick_tokens_A=np.ones(2), accepted_A=np.ones(2), depth_A=np.ones(2), tpot_s_A=np.zeros(2)
            )
            policy = ROUTERS[name](2)
            for seed in range(20):
                one, other = (policy.choose(policy.init(), each, _noise(2, seed))[0] for each in (context, blind))
                self.assertEqual(one, other)

    def test_the_paper_divides_memory_by_a_hundred(self):
        # Full pages count for no more than an outstanding request in a hundred slots.
        lanes = [lane(0, free_pages=0, running=10, num_slots=100), lane(1, free_pages=40, running=11, num_slots=100)]
        self.assertEqual(_arm("flowguard_paper", lanes), 0)
        self.assertEqual(_arm("flowguard_paper", [lane(0, free_pages=0), lane(1, free_pages=40)]), 1)
        # Ten in a hundred slots are less than three in four.
        self.assertEqual(_arm("flowguard_paper", [lane(0, running=10, num_slots=100), lane(1)]), 0)
        late = LanePace(ttft_s=2.0)
        self.assertEqual(_arm("flowguard_paper", [lane(0, pace=late), lane(1, in_transit=2)]), 1)


class SignalsTest(parameterized.TestCase):
    def test_every_signal_is_that_of_its_name(self):
        names = {  # what a router sees, and what the lane calls it
            **{"slots_A": "num_slots", "free_slots_A": "free_slots", "pages_A": "num_pages"},
            **{"free_pages_A": "free_pages", "page_tokens_A": "page_tokens", "waiting_A": "waiting"},
            **{"in_transit_A": "in_transit", "running_A": "running", "queued_tokens_A": "queued_prefill_tokens"},
            **{"local_queued_A": "queued_local_tokens", "backlog_bytes_A": "transfer_backlog_bytes"},
        }
        paces = {
            **{"prefill_s_A": "prefill_s_per_token", "transfer_s_A": "transfer_s_per_byte"},
            **{"token_bytes_A": "transfer_bytes_per_token", "tick_s_A": "tick_s", "tick_tokens_A": "tokens_per_tick"},
            **{"accepted_A": "accepted_per_step", "depth_A": "drafted_per_step", "decode_s_A": "decode_s"},
            **{"ttft_s_A": "ttft_s", "tpot_s_A": "tpot_s", "idle_s_A": "idle_s"},
        }
        pace = LanePace(**{name: 0.5 + place for place, name in enumerate(paces.values())})
        lanes = [
            LaneStats(lane=index, pace=pace, **{name: 100 * index + place for place, name in enumerate(names.values())})
            for index in range(2)
        ]
        context = seen(lanes, hit_tokens=(7, 8), queue=9, waited_s=0.25, max_tokens=30)
        for place, signal in enumerate(names):
            self.assertEqual(getattr(context, signal).tolist(), [place, 100 + place], signal)
        for place, signal in enumerate(paces):
            self.assertEqual(getattr(context, signal).tolist(), [0.5 + place] * 2, signal)
        arrays = {name for name in context._fields if name.endswith("_A")}
        self.assertEqual(arrays - set(names) - set(paces), {"eligible_A", "local_A", "hit_tokens_A"})
        self.assertEqual(context.hit_tokens_A.tolist(), [7, 8])
        self.assertEqual((context.prompt_tokens, context.max_tokens), (100, 30))
        self.assertEqual((context.waited_s, context.queue), (0.25, 9))

    def test_a_router_cannot_change_what_it_sees(self):
        context = seen([lane(0), lane(1)])
        for name in context._fields:
            if name.endswith("_A"):
                with self.assertRaisesRegex(ValueError, "read-only"):
                    getattr(context, name)[0] = 1


class ScoresTest(parameterized.TestCase):
    def test_each_by_hand(self):
        shallow = dataclasses.replace(BUSY, accepted_per_step=0.5, drafted_per_step=1.0)
        lanes = [
            lane(0, waiting=2, in_transit=1, running=1),  # ten of forty pages
            lane(1, waiting=6, pace=shallow, free_pages=40),
            lane(2, waiting=99),
        ]
        context = seen(lanes, eligible=[True, True, False], hit_tokens=(25, 0, 100), waited_s=0.5)
        predicted = predict(context)
        for score, want in (
            (scorers.prefix, [0.25, 0, 1]),
            (scorers.pages, [9 / 40, 1, 9 / 40]),
            (scorers.slots, [0.5, 0.25, 0.25]),
            (scorers.queue, [1, 0, 0]),  # the third may not take it, and does not stretch the scale
            (scorers.acceptance, [2.5 / 4, 1.5 / 2, 2.5 / 4]),  # the bonus token counts on both sides
        ):
            np.testing.assert_allclose(score(context), want, err_msg=score.__name__)
        np.testing.assert_allclose(scorers.ttft(context, predicted), 1 / (1.5 + predicted.ttft_s_A))
        np.testing.assert_allclose(scorers.tpot(context, predicted), [0.1 / 0.105] * 3)


class PredictionTest(parameterized.TestCase):
    def test_the_parts_of_the_time_to_first_token_by_hand(self):
        lanes = [lane(0, queued_prefill_tokens=200, transfer_backlog_bytes=10**7, in_transit=2)]
        of = predict(seen(lanes, hit_tokens=(64,)))
        self.assertAlmostEqual(of.queue_s_A[0], 0.2)
        self.assertAlmostEqual(of.prefill_s_A[0], 0.036)
        self.assertAlmostEqual(of.transfer_s_A[0], 100 * 1000 * 1e-9)
        self.assertAlmostEqual(of.slot_s_A[0], 2 * 1.0 / 4)  # three want the one free slot
        self.assertAlmostEqual(of.tick_s_A[0], 0.05)
        self.assertAlmostEqual(of.tpot_s_A[0], 0.005)
        self.assertAlmostEqual(of.ttft_s_A[0], 0.55)  # the slot takes longest

    def test_where_it_decodes_a_prompt_neither_queues_nor_travels_nor_is_known(self):
        lanes = [lane(0, queued_prefill_tokens=200, transfer_backlog_bytes=10**7, local_tokens=128)]
        of = predict(seen(lanes, hit_tokens=(64,)), local=True)
        self.assertAlmostEqual(of.queue_s_A[0], 0.03)  # behind the ticks under way
        self.assertEqual(of.transfer_s_A[0], 0.0)
        self.assertAlmostEqual(of.ttft_s_A[0], 0.03 + 0.1 + 0.05)
        behind = predict(seen([lane(0, queued_local_tokens=128, local_tokens=128)]), local=True)
        self.assertAlmostEqual(behind.queue_s_A[0], 0.03 + 0.128)
        (idle,) = predict(seen([lane(0, running=0)])).tick_s_A
        self.assertAlmostEqual(idle, 0.02)

    def test_what_was_never_measured_counts_as_nothing(self):
        of = predict(seen([lane(0, pace=LanePace(), queued_prefill_tokens=10**6, in_transit=9)]))
        self.assertEqual((of.ttft_s_A[0], of.tpot_s_A[0]), (0.0, 0.0))

    @hypothesis.settings(max_examples=60, deadline=None)
    @hypothesis.given(context=contexts(3))
    def test_every_score_lies_between_zero_and_one(self, context):
        predicted = predict(context)
        for score in (scorers.prefix, scorers.pages, scorers.slots, scorers.queue, scorers.acceptance):
            self.assertTrue(((score(context) >= 0) & (score(context) <= 1)).all(), score.__name__)
        for score in (scorers.ttft, scorers.tpot):
            self.assertTrue(((score(context, predicted) >= 0) & (score(context, predicted) <= 1)).all())


class FlowGuardPolicyTest(parameterized.TestCase):
    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(context=contexts(3), seed=st.integers(0, 9), explore=st.sampled_from((0.0, 1.0)))
    def test_no_lane_that_misses_the_objective_is_taken_while_one_meets_it(self, context, seed, explore):
        context = context._replace(idle_s_A=np.zeros(3), local_A=np.zeros(3, bool))
        policy = routers.flowguard(3, explore=explore)
        route, _ = policy.choose(policy.init(), context, _noise(3, seed))
        of = predict(context)
        meets_A = (context.waited_s + of.ttft_s_A <= context.objective.ttft_s) & (
            of.tpot_s_A <= context.objective.tpot_s
        )
        if (meets_A & context.eligible_A).any():
            self.assertTrue(meets_A[route.arm])

    def test_weights_follow_the_outcomes(self):
        """Requests fare well where the prefix is known, and badly where slots are free: the weights turn round."""
        lanes = [lane(0, free_slots=4, running=0), lane(1, free_slots=0, running=4)]
        context = seen(lanes, hit_tokens=(0, 90))
        context = context._replace(prefill_s_A=np.zeros(2), decode_s_A=np.zeros(2))
        policy = routers.flowguard(2, explore=0.0, slots=0.5, prefix=0.0, prior_weight=5.0)
        state = policy.init()
        self.assertEqual(policy.choose(state, context, _noise(2, 0))[0].arm, 0)
        for _ in range(30):
            state = policy.update(state, context, Route(0), RouteOutcome(False))
            state = policy.update(state, context, Route(1), GOOD)
        self.assertEqual(policy.choose(state, context, _noise(2, 0))[0].arm, 1)
        still = routers.flowguard(2, explore=0.0, slots=0.5, prefix=0.0, learning=False)
        self.assertEqual(
            jax.tree.map(np.copy, still.init()).weight_F.tolist(),
            still.update(still.init(), context, Route(0), RouteOutcome(False)).weight_F.tolist(),
        )

    @parameterized.parameters("ttft", "tpot", "acceptance", "prefix", "slots", "pages")
    def test_a_weight_is_that_of_the_score_of_its_name(self, name):
        lanes = {
            "ttft": lane(0, pace=dataclasses.replace(BUSY, prefill_s_per_token=0.0)),
            "tpot": lane(1, pace=dataclasses.replace(BUSY, tokens_per_tick=8.0)),
            "acceptance": lane(2, pace=dataclasses.replace(BUSY, accepted_per_step=3.0)),
            "prefix": lane(3),
            "slots": lane(4, running=1),
            "pages": lane(5, free_pages=40),
        }
        context = seen(list(lanes.values()), hit_tokens=(0, 0, 0, 50, 0, 0))
        weights = dict.fromkeys(lanes, 0.0) | {name: 1.0}
        policy = routers.flowguard(6, explore=0.0, **weights)
        self.assertEqual(policy.choose(policy.init(), context, _noise(6, 0))[0].arm, list(lanes).index(name))

    def test_outcomes_are_forgotten_and_a_local_one_counts_as_such(self):
        policy = routers.flowguard(1, forget=1.0)
        context = seen([lane(0, local_tokens=128, queued_prefill_tokens=900)])
        for route, predicted in ((Route(0), predict(context)), (Route(0, local=True), predict(context, local=True))):
            state = policy.update(policy.update(policy.init(), context, route, GOOD), context, route, GOOD)
            (score,), faded = scorers.ttft(context, predicted), 1 + np.exp(-1)
            self.assertAlmostEqual(state.gram_FF[0, 0], score**2 * faded)
            self.assertAlmostEqual(state.sum_F[0], score * faded)

    def test_the_guard_lets_predictions_err_by_the_margin_and_exploring_keeps_within_it(self):
        late = dataclasses.replace(BUSY, prefill_s_per_token=0.01)  # its first token takes 1.05 s
        later = dataclasses.replace(BUSY, prefill_s_per_token=0.02)
        context = seen([lane(0), lane(1, pace=late), lane(2, pace=later)])

        def explored(margin: float) -> dict[int, float]:
            policy = routers.flowguard(3, explore=0.5, margin=margin)
            routes = [policy.choose(policy.init(), context, _noise(3, seed))[0] for seed in range(60)]
            return {route.arm: route.propensity for route in routes}

        self.assertEqual(explored(0.0), {0: 1.0})
        self.assertEqual(explored(0.1), {0: 0.75, 1: 0.25})

    def test_the_guard_counts_what_the_request_has_waited_already(self):
        quick = dataclasses.replace(BUSY, prefill_s_per_token=0.0005)  # 0.1 s to the first token, else 0.15 s
        policy, lanes = routers.flowguard(2, explore=1.0), [lane(0), lane(1, pace=quick)]
        for waited_s, propensities in ((0.8, {0: 0.5, 1: 0.5}), (0.87, {1: 1.0}), (0.95, {0: 0.5, 1: 0.5})):
            routes = [
                policy.choose(policy.init(), seen(lanes, waited_s=waited_s), _noise(2, seed))[0] for seed in range(30)
            ]
            self.assertEqual({route.arm: route.propensity for route in routes}, propensities, waited_s)

    def test_a_lane_is_judged_by_the_way_that_its_prompt_would_take(self):
        lanes = [lane(0, local_tokens=128, queued_prefill_tokens=300), lane(1, queued_prefill_tokens=120)]
        policy = routers.flowguard(2, explore=0.0)
        route, _ = policy.choose(policy.init(), seen(lanes), _noise(2, 0))
        self.assertEqual((route.arm, route.local), (0, True))

    def test_without_outcomes_the_weights_are_those_of_the_config(self):
        policy, by = routers.flowguard(2), FlowGuardConfig()
        told = [by.ttft, by.tpot, by.acceptance, by.prefix, by.slots, by.pages, 0.0]
        np.testing.assert_allclose(policy.init().weight_F, told)
        after = policy.update(policy.init(), seen([lane(0), lane(1)]), Route(0), GOOD)
        self.assertLess(np.abs(after.weight_F - told).max(), 0.1)  # one outcome is little beside the prior

    def test_a_lane_that_was_slow_is_tried_again_when_it_has_been_idle(self):
        slow = LanePace(tick_s=1.0, tokens_per_tick=1.0, idle_s=0.0, decode_s=5.0)
        rested = LanePace(tick_s=1.0, tokens_per_tick=1.0, idle_s=60.0, decode_s=5.0)
        other = lane(1, in_transit=6, free_slots=0)
        self.assertEqual(_arm("flowguard", [lane(0, pace=slow, running=0, free_slots=4), other]), 1)
        self.assertEqual(_arm("flowguard", [lane(0, pace=rested, running=0, free_slots=4), other]), 0)
        self.assertEqual(
            _arm("flowguard", [lane(0, pace=rested, running=1, free_slots=3), other]), 1
        )  # it has not rested

    @parameterized.parameters({"prefill_s_per_token": 0.05}, {"transfer_s_per_byte": 2e-5})
    def test_so_is_one_whose_prefill_or_link_was_slow(self, **slow):
        other = lane(1, in_transit=1, running=2)

        def arm(idle_s: float, running: int) -> int:
            pace = dataclasses.replace(BUSY, idle_s=idle_s, **slow)
            return _arm("flowguard", [lane(0, pace=pace, running=running, free_slots=4 - running), other])

        self.assertEqual([arm(0.0, 0), arm(60.0, 0), arm(60.0, 1)], [1, 0, 1])

    def test_a_short_prompt_prefills_where_it_decodes_if_that_saves_enough(self):
        policy = routers.flowguard(1)

        def way(**fields):
            context = seen([lane(0, local_tokens=128, **fields)])
            return policy.choose(policy.init(), context, _noise(1, 0))[0].local

        self.assertTrue(way(queued_prefill_tokens=300))
        self.assertFalse(way(queued_prefill_tokens=0))
        self.assertFalse(
            policy.choose(policy.init(), seen([lane(0, queued_prefill_tokens=300)]), _noise(1, 0))[0].local
        )


class UtilityTest(parameterized.TestCase):
    def test_one_within_the_objective_and_less_the_more_it_is_missed(self):
        graded = [utility(RouteOutcome(True, ttft, tpot), OBJECTIVE) for ttft, tpot in ((1, 0.1), (2, 0.1), (0.5, 0.4))]
        self.assertEqual(graded, [1.0, 0.5, 0.25])
        self.assertEqual(utility(RouteOutcome(False), OBJECTIVE), 0.0)

    def test_goodput_counts_what_was_answered_within_both_limits(self):
        outcomes = [RouteOutcome(True, 1.0, 0.1), RouteOutcome(True, 1.1, 0.0), RouteOutcome(True, 0.0, 0.2)]
        self.assertEqual(
            [is_good(one, OBJECTIVE) for one in (*outcomes, RouteOutcome(False))], [True, False, False, False]
        )


def _stubborn(route: Route) -> Policy:
    return Policy(
        init=lambda: 0,
        choose=lambda state, context, noise: (route, state + 1),
        update=lambda state, context, decision, outcome: state,
    )


class FlowGuardTest(parameterized.TestCase):
    def test_it_stops_a_policy_that_picks_what_it_may_not(self):
        lanes = [lane(0), lane(1)]
        flowguard = FlowGuard(lambda lanes: _stubborn(Route(1)), num_lanes=2, seed=0)
        self.assertEqual(flowguard.route(ask(2), lanes, [True, True]).arm, 1)
        with self.assertRaisesRegex(ValueError, r"chose lane 1, which .* request \(lanes that may: 0, 2\)"):
            flowguard.route(ask(3), [*lanes, lane(2)], [True, False, True])
        with self.assertRaisesRegex(ValueError, "no lane can take a request"):
            flowguard.route(ask(2), lanes, [False, False])
        local = FlowGuard(lambda lanes: _stubborn(Route(0, local=True)), num_lanes=2, seed=0)
        with self.assertRaisesRegex(ValueError, "to prefill where it decodes, but it cannot"):
            local.route(ask(2), [lane(0, local_tokens=99), lane(1)], [True, True])
        self.assertTrue(local.route(ask(2), [lane(0, local_tokens=100), lane(1)], [True, True]).local)

    def test_a_proposal_that_does_not_stand_changes_nothing(self):
        flowguard = FlowGuard(ROUTERS["round_robin"], num_lanes=3, seed=0)
        lanes, arms = [lane(index) for index in range(3)], []
        for _ in range(3):
            self.assertEqual(flowguard.route(ask(3), lanes, [False, True, True]).arm, arms[-1] if arms else 1)
            arms.append(1)
        self.assertEqual(flowguard.route(ask(3), lanes, [True] * 3).arm, 0)
        flowguard.begun(0.0)
        self.assertEqual(flowguard.route(ask(3), lanes, [True] * 3).arm, 1)

    @parameterized.parameters("random", "power_of_two", "least_outstanding")
    def test_a_lane_that_refuses_makes_no_other_lane_more_likely(self, name):
        """The lane that refuses is asked first as often as any; who is asked next must not depend on that."""
        flowguard, lanes = FlowGuard(ROUTERS[name], num_lanes=3, seed=1), [lane(index) for index in range(3)]
        count = collections.Counter()
        for turn in range(3000):
            if flowguard.route(ask(3, request_id=str(turn)), lanes, [True] * 3).arm == 0:
                count[flowguard.route(ask(3, request_id=str(turn)), lanes, [False, True, True]).arm] += 1
            flowguard.begun(0.0)
        total = count[1] + count[2]
        self.assertGreater(total, 800)
        self.assertAlmostEqual(count[1] / total, 0.5, delta=4 * 0.5 / total**0.5)

    def test_what_a_router_says_in_numpy_is_taken_and_a_propensity_that_is_none_is_not(self):
        lanes = [lane(0, local_tokens=100), lane(1)]
        said = _stubborn(Route(np.int64(0), np.float64(0.5), np.bool_(True)))
        route = FlowGuard(lambda lanes: said, num_lanes=2, seed=0).route(ask(2), lanes, [True, True])
        self.assertEqual([type(field) for field in route], [int, float, bool])
        for propensity in (0.0, -0.5, 1.5, float("nan")):
            wrong = FlowGuard(lambda lanes, p=propensity: _stubborn(Route(0, p)), num_lanes=2, seed=0)
            with self.assertRaisesRegex(ValueError, "with a propensity of"):
                wrong.route(ask(2), lanes, [True, True])

    def test_each_outcome_is_told_once_of_the_decision_that_stood_last(self):
        told = []
        policy = Policy(
            init=lambda: 0,
            choose=lambda state, context, noise: (Route(state % 2), state + 1),
            update=lambda state, context, route, outcome: told.append((route.arm, outcome.answered)) or state,
        )
        flowguard, lanes = FlowGuard(lambda lanes: policy, num_lanes=2, seed=0), [lane(0), lane(1)]
        for name in ("a", "b", "a"):  # the first lane has lost "a"
            flowguard.route(ask(2, request_id=name), lanes, [True, True])
            flowguard.begun(0.0)
        flowguard.learn("never routed", GOOD, 1.0)
        flowguard.withdraw("b")
        for name in ("a", "a", "b"):
            flowguard.learn(name, GOOD, 1.0)
        self.assertEqual(told, [(0, True)])

    def test_another_policy_learns_nothing_of_the_requests_under_way(self):
        told = []

        def make(name: str) -> Policy:
            return Policy(
                init=lambda: 0,
                choose=lambda state, context, noise: (Route(0), state),
                update=lambda state, context, route, outcome: told.append(name) or state,
            )

        flowguard = FlowGuard(lambda lanes: make("first"), num_lanes=1, seed=0)
        for name in ("a", "b"):
            flowguard.route(ask(1, request_id=name), [lane(0)], [True])
            flowguard.begun(0.0)
        flowguard.learn("a", GOOD, 1.0)
        flowguard.use(lambda lanes: make("second"))
        flowguard.learn("b", GOOD, 1.0)
        self.assertEqual(told, ["first"])
