"""A logged run can be made again decision by decision, and whatever was changed in it is noticed."""

import pathlib
import tempfile

import numpy as np
from absl.testing import absltest, parameterized

from streamserve.specustream import policies
from streamserve.specustream.decision_log import read_log, replay
from streamserve.specustream.depth import StopRule
from tests.specustream.logged_runs import SEED, SLOTS, TIERS, greedy, run, sampler


class ReplayTest(parameterized.TestCase):
    def logged(self, make_policy):
        path = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())) / "decisions.jsonl"
        run(path, make_policy)
        return read_log(path)[1]

    def again(self, make_policy, logged, seed=SEED):
        return replay(make_policy(TIERS, SLOTS), logged, num_arms=len(TIERS), seed=seed)

    @parameterized.named_parameters(("greedy", greedy), ("sampler", sampler))
    def test_a_run_with_late_and_lost_feedback_on_two_lanes_is_reproduced(self, make_policy):
        logged = self.logged(make_policy)
        self.assertEqual({one.lane for one in logged}, {0, 1})
        self.assertTrue(any(one.outcome is None for one in logged))
        told = sorted((one.lane, one.outcome.order, one.step) for one in logged if one.outcome)
        self.assertNotEqual([step for *_, step in told], sorted(step for *_, step in told))  # in another order
        self.assertGreater(len({one.plan.arm for one in logged}), 2)
        self.assertEqual(self.again(make_policy, logged[::-1]), [])

    @parameterized.parameters(*(name for name in policies.__all__ if name != "oracle"))  # which must know the truth
    def test_every_policy_of_the_package_is_reproduced(self, name):
        make_policy = getattr(policies, name)
        self.assertEqual(self.again(make_policy, self.logged(make_policy)), [])

    @parameterized.named_parameters(("greedy", greedy), ("sampler", sampler))
    def test_another_seed_is_noticed(self, make_policy):
        self.assertNotEmpty(self.again(make_policy, self.logged(make_policy), seed=SEED + 1))

    def test_another_policy_is_noticed(self):
        self.assertNotEmpty(self.again(sampler, self.logged(greedy)))

    @parameterized.named_parameters(("greedy", greedy), ("sampler", sampler))
    def test_a_changed_reward_is_noticed(self, make_policy):
        logged = self.logged(make_policy)
        index = next(i for i, one in enumerate(logged) if one.outcome and one.plan.depth_B.any())
        outcome = logged[index].outcome
        assert outcome is not None
        stats = outcome.stats._replace(seconds=outcome.stats.seconds * 1e3)
        logged[index] = logged[index]._replace(outcome=outcome._replace(stats=stats))
        mismatches = self.again(make_policy, logged)
        self.assertNotEmpty(mismatches)
        self.assertEqual({found.lane for found in mismatches}, {logged[index].lane})

    @parameterized.named_parameters(("greedy", greedy), ("sampler", sampler))
    def test_a_changed_context_is_noticed(self, make_policy):
        logged = self.logged(make_policy)
        cost_A = logged[7].context.cost_A.copy()
        cost_A[(logged[7].plan.arm + 1) % len(TIERS)] -= np.float32(1e6)
        logged[7] = logged[7]._replace(context=logged[7].context._replace(cost_A=cost_A))
        self.assertIn((0, 7), {(found.lane, found.step) for found in self.again(make_policy, logged)})

    @parameterized.named_parameters(
        ("arm", "arm", 3),
        ("propensity", "propensity", 0.1),
        ("depth", "depth_B", np.array([9, 0, 0], np.int32)),
        ("rule", "rule", StopRule.CONFIDENCE),
        ("threshold", "threshold", 0.25),
        ("wants_divergence", "wants_divergence", None),
    )
    def test_each_field_of_a_plan_is_compared(self, field, value):
        logged = self.logged(greedy)
        last = max(i for i, one in enumerate(logged) if one.outcome is None and one.plan.arm != 3)  # teaches nothing
        was = getattr(logged[last].plan, field)
        logged[last] = logged[last]._replace(plan=logged[last].plan._replace(**{field: value}))
        (found,) = self.again(greedy, logged)
        self.assertEqual((found.lane, found.step, found.field), (logged[last].lane, logged[last].step, field))
        np.testing.assert_array_equal(found.replayed, was)
        np.testing.assert_array_equal(found.logged, value)

    def test_one_bit_of_a_propensity_is_noticed(self):
        logged = self.logged(sampler)
        last = max(i for i, one in enumerate(logged) if one.outcome is None)
        plan = logged[last].plan
        logged[last] = logged[last]._replace(plan=plan._replace(propensity=float(np.nextafter(plan.propensity, 0))))
        (found,) = self.again(sampler, logged)
        self.assertEqual(found.field, "propensity")

    def test_missing_decisions_and_feedbacks_are_errors(self):
        logged = self.logged(greedy)
        with self.assertRaisesRegex(ValueError, "lane 0 step 4: step 3 should come here"):
            self.again(greedy, logged[:3] + logged[4:])
        first = next(i for i, one in enumerate(logged) if one.outcome and one.outcome.order == 0)
        without = logged.copy()
        without[first] = logged[first]._replace(outcome=None)
        with self.assertRaisesRegex(ValueError, "feedback 0 is missing"):
            self.again(greedy, without)
        early = logged.copy()
        early[0] = logged[0]._replace(feedbacks=1)
        with self.assertRaisesRegex(ValueError, "lane 0 step 0: feedback 0 is missing, or comes before"):
            self.again(greedy, early)
        early[0] = logged[0]._replace(feedbacks=1000)
        with self.assertRaisesRegex(ValueError, "lane 0 step 0: 1000 feedbacks, after 0 and of"):
            self.again(greedy, early)


if __name__ == "__main__":
    absltest.main()
