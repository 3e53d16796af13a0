"""SpecuStream: its goodput against every fixed depth on known acceptance, and each of its rules by hand."""

import numpy as np
import pytest
from absl.testing import parameterized

from streamserve.specustream import simulate, synthetic
from streamserve.specustream.costs import CostTable
from streamserve.specustream.depth import DepthContext, StepStats, whole
from streamserve.specustream.policies import horizons
from streamserve.specustream.policies.oracle import oracle
from streamserve.specustream.policies.specustream import specustream
from streamserve.specustream.policies.specustream_paper import specustream_paper

TIERS = (0, 1, 2, 3, 4, 6, 8)
# Cost of a round at depth K is 1 + slope * K, of which drafting is some part.
SHAPES = {"cheap draft": 0.1, "CPU-like": 0.39, "memory bound": 0.07}
LEARNING = horizons.Learning(keep=(0.5, 1.0), prior=0.6, prior_weight=2.0, share=0.1, evidence=1e9)


def cost_table(slope, tiers=TIERS):
    """Costs of a shape, at 1 ms for plain decoding."""
    seconds_NCA = np.tile(1e-3 * (1 + slope * np.array(tiers)), (2, 1, 1))
    return CostTable(tiers=tiers, batches=(1, 8), contexts=(0,), seconds_NCA=seconds_NCA, draft_NCA=0.4 * seconds_NCA)


def trace_of(process, slope, *, batch, ticks, seed=0, make_policy=specustream, tiers=TIERS, **changes):
    """Simulate a policy."""
    given = {"tiers": tiers, "slots": batch, "batch": batch, "rounds": 4, "ticks": ticks, "seed": seed}
    acceptance = synthetic.parse(process, max(tiers))
    return simulate.simulate(make_policy, acceptance, cost_table(slope, tiers), **{**given, **changes})


def compared(trace):
    """Goodput over that of the best fixed depth in hindsight."""
    return simulate.goodput(trace) / simulate.best_fixed(trace)[1]


class TargetTest(parameterized.TestCase):
    @parameterized.product(
        process=["iid:0.05", "iid:0.3", "iid:0.7", "iid:0.95", "positions:0.9,0.7,0.5", "positions:0.8,0.8,0.2"],
        shape=list(SHAPES),
    )
    def test_it_is_near_the_best_fixed_depth_where_nothing_changes(self, process, shape):
        self.assertGreater(compared(trace_of(process, SHAPES[shape], batch=1, ticks=300)), 0.97)
        short_tiers = trace_of(process, SHAPES[shape], batch=8, ticks=150, seed=1, tiers=(0, 1, 2, 4))
        self.assertGreater(compared(short_tiers), 0.97)

    @parameterized.product(process=["regimes:0.9,0.2@200", "drift:0.9,0.1@500"], shape=list(SHAPES))
    def test_it_beats_every_fixed_depth_where_something_changes(self, process, shape):
        self.assertGreater(compared(trace_of(process, SHAPES[shape], batch=1, ticks=1200)), 1.02)

    def test_it_does_not_wait_for_a_probe_where_the_prior_says_plain(self):
        trace = trace_of("iid:0.9", 0.7, batch=4, ticks=60, slots=8)  # a prior of 0.6 would not pay for a draft
        self.assertGreater(np.mean(trace.arm_T[10:] > 0), 0.9)

    def test_it_costs_next_to_nothing_where_speculation_cannot_pay(self):
        trace = trace_of("iid:0.05", SHAPES["CPU-like"], batch=8, ticks=1000)
        plain = trace.tokens_TA[:, 0].sum() / trace.seconds_TA[:, 0].sum()
        self.assertGreater(simulate.goodput(trace), 0.98 * plain)  # probes may cost 2 %
        self.assertLess(np.mean(trace.arm_T > 0), 0.05)

    def test_it_adapts_to_the_load(self):
        trace = trace_of("load:0.95,0.05@8", 0.39, batch=lambda t: 1 if t // 150 % 2 else 8, ticks=900, slots=8)
        deep_T, settled_T = trace.arm_T >= 4, np.arange(900) % 150 >= 50
        self.assertGreater(np.mean(deep_T[settled_T & (trace.batch_T == 1)]), 0.9)
        self.assertLess(np.mean(trace.arm_T[settled_T & (trace.batch_T == 8)] > 0), 0.1)

    def test_a_wrong_table_is_put_right_by_what_is_measured(self):
        told = cost_table(0.1)  # deep drafts look cheap
        trace = trace_of("iid:0.5", 0.39, batch=1, ticks=1500, believed=told)
        late = simulate.goodput(
            trace._replace(mean_tokens_T=trace.mean_tokens_T[500:], mean_seconds_T=trace.mean_seconds_T[500:])
        )
        self.assertGreater(late / simulate.best_fixed(trace)[1], 0.93)

    def test_a_run_repeats(self):
        one, other = (trace_of("regimes:0.9,0.2@50", 0.1, batch=2, ticks=200, slots=8) for _ in range(2))
        np.testing.assert_array_equal(one.arm_T, other.arm_T)


def context_of(*, cost_A=(1e-3, 1.4e-3, 2e-3), holder_B=(1, 2), switch_A=(0.0, 0.0, 0.0), tiers=(0, 2, 4)):
    """A context of two rows."""
    return DepthContext(np.array(tiers), np.array(holder_B), np.array(cost_A), np.zeros(3), np.array(switch_A))


def stats_of(drafted, accepted_BR, *, seconds=4e-3, lost=0):
    """A tick in which every row drafts as much; `lost` tokens of the first row came after its end."""
    accepted_BR = np.array(accepted_BR)
    emitted_B = (accepted_BR + 1).sum(axis=1)
    emitted_B[0] -= lost
    return StepStats(np.full(accepted_BR.shape, drafted), accepted_BR, emitted_B, 0.0 * accepted_BR, seconds)


def choose(policy, state, context, noise=(0.5, 0.5)):
    """Choose with these numbers for chance."""
    return policy.choose(state, context, np.tile(noise, (3, 1)))


def knowing(policy, mean_K, **changes):
    """A state in which all horizons agree about the acceptance."""
    state = policy.init()
    mean_HK = np.tile(np.array(mean_K, float), (len(state.known.weight_H), 1))
    return state._replace(known=state.known._replace(mean_HK=mean_HK), **changes)


class HorizonsTest(parameterized.TestCase):
    def test_counts_are_of_verified_positions_and_priors_of_the_position_before(self):
        known = horizons.learn(horizons.unknown(3, LEARNING), stats_of(3, [[0, 3], [1, 3]]), LEARNING)
        np.testing.assert_array_equal(known.accepted_HK, [[3, 2, 2]] * 2)
        np.testing.assert_array_equal(known.tried_HK, [[4, 3, 2]] * 2)
        first = (3 + 2 * 0.6) / (4 + 2)
        second = (2 + 2 * first) / (3 + 2)
        np.testing.assert_allclose(known.mean_HK, [[first, second, (2 + 2 * second) / (2 + 2)]] * 2)
        again = horizons.learn(known, stats_of(1, [[0], [1]]), LEARNING)
        np.testing.assert_allclose(again.accepted_HK, [[2.5, 1, 1], [4, 2, 2]])
        np.testing.assert_allclose(again.tried_HK, [[4, 1.5, 1], [6, 3, 2]])

    def test_horizons_are_believed_by_what_they_foretold(self):
        # Faded counts of the first horizon 8 of 8 and 4 of 8, of the second 0 of 8 and 4 of 8; prior 0.6 twice.
        accepted_HK, tried_HK = np.array([[16.0, 8], [0, 4]]), np.array([[16.0, 16], [8, 8]])
        known = horizons.unknown(2, LEARNING)._replace(accepted_HK=accepted_HK, tried_HK=tried_HK)
        first_H = (np.array([8, 0]) + 1.2) / 10
        second_H = (4 + 2 * first_H) / 10
        likely_H = first_H * second_H * (1 - first_H)  # both accepted, then the first refused
        expected_H = 0.9 * likely_H / likely_H.sum() + 0.05
        np.testing.assert_allclose(horizons.learn(known, stats_of(2, [[2, 0]]), LEARNING).weight_H, expected_H)

    def test_one_tick_counts_as_no_more_than_its_evidence(self):
        counts = {"accepted_HK": np.array([[15.6], [1.2]]), "tried_HK": np.array([[16.0], [8.0]])}
        known = horizons.unknown(1, LEARNING)._replace(**counts)  # faded, and with the prior: 0.9 and 0.24
        known = horizons.learn(known, stats_of(1, [[1, 1, 1, 1]]), LEARNING._replace(evidence=2.0))
        likely_H = np.array([0.9, 0.24]) ** 2  # not to the power of 4
        np.testing.assert_allclose(known.weight_H, 0.9 * likely_H / likely_H.sum() + 0.05)

    def test_a_tick_without_drafts_fades_counts_and_changes_no_prediction(self):
        known = horizons.learn(horizons.unknown(1, LEARNING), stats_of(1, [[1], [0]]), LEARNING)
        known = known._replace(weight_H=np.array([0.7, 0.3]))
        after = horizons.learn(known, stats_of(0, [[0], [0]]), LEARNING)
        np.testing.assert_allclose(after.tried_HK, [[1.0], [2.0]])
        np.testing.assert_array_equal(after.weight_H, [0.7, 0.3])
        np.testing.assert_array_equal(after.mean_HK, known.mean_HK)

    def test_tokens_are_averaged_over_horizons_with_their_deviation(self):
        known = horizons.unknown(2, LEARNING)._replace(
            mean_HK=np.array([[0.8, 0.5], [0.2, 0.5]]), weight_H=np.array([0.75, 0.25])
        )
        mean_A, deviation_A = horizons.drafted_tokens(known, np.array([0, 1, 2]))
        np.testing.assert_allclose(mean_A, [0, 0.65, 0.975])
        np.testing.assert_allclose(deviation_A, np.sqrt(0.75 * 0.25) * np.array([0, 0.6, 0.9]))


class RulesTest(parameterized.TestCase):
    # Acceptance 0.8: 1, 2.44 and 3.3616 tokens at depths 0, 2, 4.
    @parameterized.parameters(([1, 2.4, 3.4], 1), ([1, 2.5, 3.3], 2), ([1, 2.5, 3.4], 0))
    def test_it_begins_with_the_most_tokens_a_second(self, cost_A, arm):
        policy = specustream((0, 2, 4), 2)
        plan, state = choose(policy, knowing(policy, [0.8] * 4), context_of(cost_A=cost_A))
        self.assertEqual((plan.arm, state.home), (arm, arm))

    @parameterized.parameters((1.03, 4, 1), (1.03, 5, 2), (1.01, 99, 1))
    def test_home_moves_for_more_than_the_hysteresis_after_its_dwell(self, better, dwell, arm):
        policy = specustream((0, 2, 4), 2, hysteresis=0.02, min_dwell=5, explore=0.0)
        tokens_A = np.array([1, 2.44, 3.3616])
        state = knowing(policy, [0.8] * 4, home=1, dwell=dwell)
        plan, state = choose(policy, state, context_of(cost_A=tokens_A / [0.5, 1, better]))
        self.assertEqual(plan.arm, arm)
        self.assertEqual(state.dwell, 1 if arm == 2 else dwell + 1)

    def test_the_price_of_a_switch_is_spread_over_rounds(self):
        policy = specustream((0, 2, 4), 2, amortise=10.0, hysteresis=0.0, explore=0.0)
        tokens_A = np.array([1, 2.44, 3.3616])
        for price, arm in ((4.9, 2), (5.1, 1)):  # 0.5 s of a round that takes 1 s a token
            context = context_of(cost_A=tokens_A / [0.5, 1, 1] - [0, 0, 0.5], switch_A=[0, 0, price])
            self.assertEqual(choose(policy, knowing(policy, [0.8] * 4), context)[0].arm, arm)

    def test_disagreement_lowers_the_depth(self):
        arms = []
        for caution in (0.0, 1.0):
            policy = specustream((0, 2, 4), 2, horizons=(1.0, 9.0), caution=caution)
            known = policy.init().known._replace(mean_HK=np.array([[0.9] * 4, [0.1] * 4]))
            arms.append(choose(policy, policy.init()._replace(known=known), context_of())[0].arm)
        self.assertEqual(arms, [1, 0])  # 1, 1.36, 1.30 tokens a ms, of which 0.57 and 0.75 deviate

    def test_measured_goodput_corrects_the_prediction(self):
        policy, context = specustream((0, 2, 4), 2, likeness=1.0, clip=0.5, horizons=(1e12,)), context_of()
        state = policy.update(
            policy.init(), context, whole(context, 1), stats_of(2, [[2, 2], [2, 1]], seconds=3.5e-3, lost=1)
        )
        ratio = np.log(10 / 11 * 2.8 / 3.5)  # a token lost, and 0.7 ms
        np.testing.assert_allclose(state.residual_2A, [[0, ratio, 0], [0, 1, 0]])
        for seconds in (1e9, 0.0):
            other = policy.update(policy.init(), context, whole(context, 1), stats_of(2, [[2], [2]], seconds=seconds))
            np.testing.assert_allclose(other.residual_2A[:, 1], [-0.5, 1] if seconds else [0, 0])
        known = knowing(policy, [0.8] * 4).known
        cost_A = np.array([1.0, 2.44, 3.3616])
        state = state._replace(known=known, residual_2A=np.array([[0, -0.3, 0], [0, 2.0, 0]]))
        plan, _ = choose(policy, state, context_of(cost_A=cost_A / [1, 1.05, 1]))
        # Pooled -0.3 / 3 = -0.1; arm 1: (-0.3 - 0.1) / 3 = -0.133, so 1.05 e^-0.033 > 1 still wins; not with -0.6.
        self.assertEqual(plan.arm, 1)
        state = state._replace(residual_2A=np.array([[0, -0.6, 0], [0, 2.0, 0]]))
        self.assertNotEqual(choose(policy, state, context_of(cost_A=cost_A / [1, 1.05, 1]))[0].arm, 1)


class ProbeTest(parameterized.TestCase):
    def plain(self, **changes):
        policy = specustream((0, 2, 4), 2, probe_budget=0.01, patience=4.0, explore=0.0)
        given = {"home": 0, "dwell": 9, "plain_s": 4e-3, "patience": 1.0, "seen_B": np.array([1, 2])}
        return policy, knowing(policy, [0.01] * 4, **{**given, **changes})

    # A probe of 40 % more time than a plain tick of 4 ms costs 1.6 ms: one in 160 ms.
    @parameterized.parameters((0.159, 1.0, 0), (0.161, 1.0, 1), (0.319, 2.0, 0), (0.321, 2.0, 1))
    def test_plain_decoding_is_probed_within_the_budget(self, idle_s, patience, arm):
        policy, state = self.plain(idle_s=idle_s, patience=patience)
        plan, state = choose(policy, state, context_of())
        self.assertEqual((plan.arm, state.home), (arm, 0))
        self.assertEqual((state.idle_s, state.patience), (0.0, 2 * patience) if arm else (idle_s, patience))

    def test_a_switch_makes_a_probe_rarer(self):
        policy, state = self.plain(idle_s=0.161)
        self.assertEqual(choose(policy, state, context_of(switch_A=[0, 1e-4, 0]))[0].arm, 0)

    def test_patience_ends_and_new_requests_set_it_back(self):
        policy, state = self.plain(idle_s=9.0, patience=4.0)
        plan, after = choose(policy, state, context_of())
        self.assertEqual((plan.arm, after.patience), (1, 4.0))
        _, after = choose(policy, state._replace(idle_s=0.0), context_of(holder_B=(1, 3)))
        self.assertEqual(after.patience, 4.0)  # one of two
        _, after = choose(policy, state._replace(idle_s=0.0), context_of(holder_B=(4, 3)))
        self.assertEqual(after.patience, 1.0)
        np.testing.assert_array_equal(choose(policy, state, context_of(holder_B=(4, 3)))[1].seen_B, [4, 3])

    def test_time_without_drafts_is_counted_until_something_is_drafted(self):
        policy, state = self.plain(idle_s=0.1)
        context = context_of()
        state = policy.update(state, context, whole(context, 0), stats_of(0, [[0], [0]], seconds=5e-3))
        self.assertAlmostEqual(state.idle_s, 0.105)
        self.assertEqual(state.plain_s, 5e-3)
        state = policy.update(state, context, whole(context, 1), stats_of(2, [[0], [0]], seconds=7e-3))
        self.assertAlmostEqual(state.idle_s, 0.105)

    def test_it_finds_its_way_out_of_plain_decoding(self):
        trace = trace_of("regimes:0.01,0.95@300", 0.39, batch=1, ticks=2000, seed=3)
        high_T = trace.acceptance_TK[:, 0] > 0.5
        self.assertGreater(np.mean(trace.arm_T[high_T] > 0), 0.8)
        self.assertLess(np.mean(trace.arm_T[~high_T] > 0), 0.15)

    def test_without_another_depth_there_is_nothing_to_probe(self):
        for tiers in ((0,), (4,), (1, 3)):
            make = lambda tiers, slots: specustream(tiers, slots, explore=0.2)  # noqa: E731
            trace = trace_of("iid:0.01", 0.39, batch=1, ticks=40, tiers=tiers, make_policy=make) if max(tiers) else None
            policy = specustream(tiers, 2)
            context = context_of(tiers=tiers, cost_A=[1.0] * len(tiers), switch_A=[0.0] * len(tiers))
            plan, _ = policy.choose(policy.init()._replace(home=0, plain_s=1.0, idle_s=1e9), context, np.ones((1, 2)))
            self.assertEqual(plan.arm, 0)
            assert trace is None or set(trace.arm_T) <= set(range(len(tiers)))


class ExploreTest(parameterized.TestCase):
    def test_only_arms_near_the_best_are_explored_and_the_propensity_says_how_often(self):
        policy = specustream((0, 2, 4), 2, explore=0.3, margin=0.1)
        tokens_A = np.array([1, 2.44, 3.3616])
        context, rng = context_of(cost_A=tokens_A / [0.5, 1, 0.95]), np.random.default_rng(0)
        plans = [policy.choose(knowing(policy, [0.8] * 4), context, rng.random((3, 2)))[0] for _ in range(4000)]
        self.assertEqual({plan.arm for plan in plans}, {1, 2})
        for arm, propensity in ((1, 0.85), (2, 0.15)):
            self.assertEqual({round(plan.propensity, 12) for plan in plans if plan.arm == arm}, {propensity})
            share = np.mean([plan.arm == arm for plan in plans])
            self.assertLess(abs(share - propensity), 4 * np.sqrt(0.85 * 0.15 / 4000))

    def test_a_probe_that_is_not_near_has_the_propensity_of_not_exploring(self):
        policy = specustream((0, 2, 4), 2, explore=0.3)
        state = knowing(policy, [0.01] * 4, home=0, plain_s=4e-3, idle_s=9.0)
        plan, _ = choose(policy, state, context_of())
        self.assertEqual(plan.arm, 1)
        self.assertAlmostEqual(plan.propensity, 0.7)
        plan, _ = choose(policy, state, context_of(), noise=(0.1, 0.99))
        self.assertEqual(plan.arm, 0)
        self.assertAlmostEqual(plan.propensity, 0.3)


class OthersTest(parameterized.TestCase):
    def test_the_oracle_wants_to_know_the_acceptance(self):
        policy = oracle((0, 2, 4), 2)
        with pytest.raises(ValueError, match="no acceptance is known here"):
            choose(policy, policy.init(), context_of())
        context = context_of(cost_A=[1, 2.4, 3.4])._replace(acceptance_K=np.full(4, 0.8))
        self.assertEqual(choose(policy, policy.init(), context)[0].arm, 1)

    def test_the_reported_policy_raises_the_depth_with_volatility_and_never_stops(self):
        policy = specustream_paper(TIERS, 2, up=2.0, down=0.0, throughput_gain=0.0)
        context = DepthContext(np.array(TIERS), np.array([1, 2]), np.ones(7), np.zeros(7), np.zeros(7))
        steady, wild = policy.init(), policy.init()
        for tick in range(20):
            steady = policy.update(steady, context, whole(context, 4), stats_of(4, [[2], [2]]))
            wild = policy.update(wild, context, whole(context, 4), stats_of(4, [[4 * (tick % 2)]] * 2))
        depth = lambda state: int(policy.choose(state, context, np.ones((7, 2)))[0].depth_B[0])  # noqa: E731
        self.assertEqual((depth(steady), depth(wild)), (4, 6))
        np.testing.assert_array_equal(steady.change_W, np.zeros(10))  # changes, not the acceptance of one half
        np.testing.assert_array_equal(wild.change_W, [-1, 1] * 5 if wild.change_W[0] < 0 else [1, -1] * 5)
        never = specustream_paper(TIERS, 2)
        state = never.init()
        for _ in range(50):
            state = never.update(state, context, whole(context, 1), stats_of(1, [[0], [0]]))
        self.assertEqual(never.choose(state, context, np.ones((7, 2)))[0].depth_B[0], 1)

    def test_the_reported_policy_moves_by_the_running_mean_and_measures_no_time(self):
        policy = specustream_paper(TIERS, 2, start=4, memory=0.5, volatility_gain=0.0, throughput_gain=0.0)
        context = DepthContext(np.array(TIERS), np.array([1, 2]), np.ones(7), np.zeros(7), np.zeros(7))
        after = lambda accepted, seconds: policy.update(  # noqa: E731
            policy.init(), context, whole(context, 4), stats_of(4, [[accepted], [accepted]], seconds=seconds)
        )
        self.assertEqual([after(accepted, 1.0).depth for accepted in (4, 2, 1)], [5.0, 4.0, 3.0])
        self.assertEqual(after(4, 1.0).throughput, 0.5 * 1 + 0.5 * 5)
        self.assertEqual(after(4, 1.0).throughput, after(4, 9.0).throughput)
        self.assertEqual(policy.update(after(4, 1.0), context, whole(context, 4), stats_of(4, [[2], [2]])).mean, 3.0)
