"""From the log of one policy, the rate of another is found as the simulation knows it."""

import numpy as np
from absl.testing import absltest, parameterized

from streamserve.bandits.bootstrap import Bootstrap
from streamserve.bandits.offpolicy import Choices, doubly_robust_rate, ips_rate
from streamserve.bandits.reward_model import fit_linear
from streamserve.specustream import costs, synthetic
from streamserve.specustream.simulate import simulate
from tests.specustream.logged_runs import TIERS, greedy


class SimulatedTest(parameterized.TestCase):
    @parameterized.product(arm=(0, 1, 2, 3), process=("iid:0.7", "regimes:0.9,0.2@20"))
    def test_the_rate_of_a_fixed_depth_is_found_from_the_log_of_a_policy_that_learns(self, arm, process):
        trace = simulate(
            lambda tiers, slots: greedy(tiers, slots, epsilon=0.5),
            synthetic.parse(process, max(TIERS)),
            costs.nominal(TIERS, (4,)),
            tiers=TIERS,
            slots=4,
            batch=4,
            rounds=3,
            ticks=3000,
            seed=11,
        )
        rate = trace.tokens_TA[:, arm].sum() / trace.seconds_TA[:, arm].sum()
        choices = Choices(trace.arm_T, trace.propensity_T, np.tile(np.eye(len(TIERS))[arm], (3000, 1)))
        settings = Bootstrap(mean_block=60, seed=0, repeats=200, level=0.99)
        self.assertGreater(abs(trace.tokens_T.sum() / trace.seconds_T.sum() - rate), 0.02 * rate)  # not the log's own
        weighted = ips_rate(trace.tokens_T, trace.seconds_T, choices, bootstrap=settings)
        self.assertBetween(rate, weighted.low, weighted.high)
        self.assertAlmostEqual(weighted.value, rate, delta=0.1 * rate)
        tokens_TA, seconds_TA = (
            fit_linear(trace.acceptance_TK[:, :1], trace.arm_T, values_T, num_arms=len(TIERS), ridge=1.0, folds=5)
            for values_T in (trace.tokens_T, trace.seconds_T)
        )
        robust = doubly_robust_rate(trace.tokens_T, trace.seconds_T, choices, tokens_TA, seconds_TA, bootstrap=settings)
        self.assertAlmostEqual(robust.value, rate, delta=0.04 * rate)


if __name__ == "__main__":
    absltest.main()
