"""The simulation: late feedback, the same luck for every policy, and expectations that the outcomes agree with."""

import numpy as np
from absl.testing import parameterized

from streamserve.bandits import Policy
from streamserve.specustream import costs, simulate, synthetic
from streamserve.specustream.depth import NOT_RUN, whole
from streamserve.specustream.policies import fixed, oracle

TIERS = (0, 2, 4)
ROUNDS = 4


def spy(arms=(0, 1, 2)):
    """A policy that goes round through arms and keeps what it saw: (policy's factory, contexts, feedbacks)."""
    contexts, feedbacks = [], []

    def choose(state, context, noise_A2):
        contexts.append((context, len(feedbacks)))
        return whole(context, arms[state % len(arms)]), state + 1

    def update(state, context, plan, stats):
        feedbacks.append((context, plan, stats))
        return state

    return (lambda tiers, slots: Policy(lambda: 0, choose, update)), contexts, feedbacks


def run(make_policy, process="iid:0.7", **changes):
    """Simulate some ticks with the nominal costs."""
    given = {"tiers": TIERS, "slots": 4, "batch": 3, "rounds": ROUNDS, "ticks": 50, "seed": 0}
    table = costs.nominal(TIERS, (1, 4))
    return simulate.simulate(make_policy, synthetic.parse(process, 4), table, **{**given, **changes})


def always(depth):
    """Factory of a fixed depth."""
    return lambda tiers, slots: fixed(tiers, slots, depth=depth)


class SimulateTest(parameterized.TestCase):
    @parameterized.parameters(0, 1, 3)
    def test_feedback_comes_late_and_belongs_to_its_choice(self, delay):
        make_policy, contexts, feedbacks = spy()
        run(make_policy, feedback_delay=delay)
        self.assertEqual([known for _, known in contexts], [max(0, tick - delay) for tick in range(50)])
        for (context, _), (told, plan, stats) in zip(contexts, feedbacks, strict=False):
            self.assertIs(told, context)
            np.testing.assert_array_equal(np.unique(stats.drafted_BR[context.holder_B != NOT_RUN]), plan.depth_B[0])

    def test_outcomes_are_what_an_engine_could_report(self):
        make_policy, _, feedbacks = spy()
        run(make_policy)
        for context, plan, stats in feedbacks:
            held_B = context.holder_B != NOT_RUN
            self.assertEqual(held_B.sum(), 3)
            np.testing.assert_array_equal(stats.ran_BR, np.repeat(held_B[:, None], ROUNDS, axis=1))
            np.testing.assert_array_equal(stats.accepted_BR == NOT_RUN, ~stats.ran_BR)
            assert (stats.accepted_BR <= stats.drafted_BR).all()
            emitted_B = np.where(held_B, (stats.accepted_BR + 1).sum(axis=1), 0)
            np.testing.assert_array_equal(stats.emitted_B, emitted_B)
            assert stats.drafted_BR.max() == TIERS[plan.arm]

    def test_expectations_are_worked_out_by_hand(self):
        trace = run(always(2), "positions:0.8,0.5")
        # 3 rows, 4 rounds: 1 token; 1 + 0.8 + 0.4; and 0.2 + 0.1 more. 1, 1.5 and 2 ms a round.
        np.testing.assert_allclose(trace.tokens_TA[7], 12 * np.array([1, 2.2, 2.5]))
        np.testing.assert_allclose(trace.seconds_TA[7], [4e-3, 6e-3, 8e-3])
        np.testing.assert_allclose(trace.mean_tokens_T, 26.4)
        np.testing.assert_allclose(simulate.goodput(trace), 26.4 / 6e-3)
        arm, best = simulate.best_fixed(trace)
        self.assertEqual(arm, 1)
        np.testing.assert_allclose(best, 26.4 / 6e-3)
        np.testing.assert_allclose(simulate.regret_T(trace), 0, atol=1e-9)
        plain = run(always(0), "positions:0.8,0.5")
        np.testing.assert_allclose(simulate.regret_T(plain), 26.4 / 6e-3 * 4e-3 - 12)
        np.testing.assert_allclose(simulate.regret_to_fixed_T(plain), 26.4 / 6e-3 * 4e-3 - 12)

    def test_luck_agrees_with_expectation(self):
        trace = run(spy()[0], "regimes:0.9,0.3@30", ticks=3000)
        # 30,000 rounds whose tokens deviate by at most 1.7 from 2.5: a standard error below 0.5 %.
        self.assertLess(abs(trace.tokens_T.sum() / trace.mean_tokens_T.sum() - 1), 0.01)
        self.assertLess(abs(trace.seconds_T.sum() / trace.mean_seconds_T.sum() - 1), 0.005)
        self.assertLess(abs(simulate.measured_goodput(trace) / simulate.goodput(trace) - 1), 0.012)
        noise_T = np.log(trace.seconds_T / trace.mean_seconds_T)
        self.assertLess(abs(noise_T.std() - 0.05), 0.005)

    def test_policies_share_their_luck(self):
        deep, shallow = spy([2]), spy([1])
        one, other = run(deep[0], "regimes:0.9,0.3@5"), run(shallow[0], "regimes:0.9,0.3@5")
        np.testing.assert_array_equal(one.acceptance_TK, other.acceptance_TK)
        noise_T, others_T = one.seconds_T / one.mean_seconds_T, other.seconds_T / other.mean_seconds_T
        np.testing.assert_allclose(noise_T, others_T)
        first, second = deep[2][0][2], shallow[2][0][2]
        np.testing.assert_array_equal(np.minimum(first.accepted_BR, 2), second.accepted_BR)
        again = run(always(4), "regimes:0.9,0.3@5")
        np.testing.assert_array_equal(one.tokens_T, again.tokens_T)
        assert (run(always(4), "regimes:0.9,0.3@5", seed=1).tokens_T != one.tokens_T).any()

    def test_requests_end_and_others_take_their_slots(self):
        make_policy, contexts, _ = spy([1])
        trace = run(make_policy, ticks=2000)
        holders = [context.holder_B for context, _ in contexts]
        requests = len({holder for holder_B in holders for holder in holder_B if holder != NOT_RUN})
        # About 850 geometric lengths; a request ends at the end of a tick, of 9 tokens, so that it may emit some more.
        self.assertLess(abs(trace.tokens_T.sum() / requests - simulate.MEAN_TOKENS - 4), 10)
        lengths = [context.mean_length for context, _ in contexts]
        self.assertEqual(lengths[0], simulate.PROMPT_TOKENS)
        assert all(simulate.PROMPT_TOKENS <= length <= simulate.MAX_TOKENS for length in lengths)

    def test_the_batch_may_change_and_what_is_too_much_waits(self):
        make_policy, contexts, _ = spy()
        trace = run(make_policy, batch=lambda tick: tick % 7)
        np.testing.assert_array_equal(trace.batch_T, np.minimum(np.arange(50) % 7, 4))
        self.assertEqual([context.waiting for context, _ in contexts[:8]], [0, 0, 0, 0, 0, 1, 2, 0])
        self.assertEqual([context.batch for context, _ in contexts[:8]], [0, 1, 2, 3, 4, 4, 4, 0])

    def test_a_switch_costs_what_it_costs(self):
        switch_AA = np.array([[0, 5, 6], [1, 0, 2], [1, 3, 0.0]])
        trace = run(spy([0, 1, 1, 2])[0], ticks=6, switch_AA=switch_AA)
        price_T = trace.mean_seconds_T - trace.seconds_TA[np.arange(6), trace.arm_T]
        np.testing.assert_allclose(price_T, [0, 5, 0, 2, 1, 5], atol=1e-12)

    def test_what_is_believed_is_told_and_refreshed(self):
        believed = costs.CostTable(
            tiers=TIERS,
            batches=(4,),
            contexts=(0,),
            seconds_NCA=np.full((1, 1, 3), 3e-3),
            draft_NCA=np.zeros((1, 1, 3)),
        )
        make_policy, contexts, _ = spy()
        trace = run(make_policy, believed=believed, ticks=600)
        np.testing.assert_allclose(contexts[0][0].cost_A, 3e-3)
        np.testing.assert_allclose(believed.lookup(3, 0)[0], [1e-3, 1.5e-3, 2e-3], rtol=0.05)
        np.testing.assert_allclose(trace.seconds_TA[0], [4e-3, 6e-3, 8e-3])

    def test_the_oracle_has_no_regret_and_beats_what_is_fixed(self):
        trace = run(oracle, "regimes:0.9,0.1@20", ticks=400)
        np.testing.assert_allclose(simulate.regret_T(trace), 0, atol=1e-9)
        self.assertGreater(simulate.goodput(trace), 1.05 * simulate.best_fixed(trace)[1])
        self.assertLess(simulate.regret_to_fixed_T(trace).sum(), 0)

    def test_divergence_is_measured_where_it_is_wanted(self):
        def make_policy(tiers, slots):
            choose = lambda state, context, noise_A2: (whole(context, 1)._replace(wants_divergence=True), state)  # noqa: E731
            return Policy(lambda: 0, choose, lambda state, *feedback: collected.append(feedback[2]) or state)

        collected = []
        run(make_policy, "positions:0.8,0.5", ticks=800)
        divergence = np.concatenate([stats.divergence_BR[stats.ran_BR] for stats in collected])
        np.testing.assert_allclose(divergence.mean(), -np.log(0.8 * 0.5) / 2, rtol=0.03)
        assert all((stats.divergence_BR[~stats.ran_BR] == 0).all() for stats in collected)
