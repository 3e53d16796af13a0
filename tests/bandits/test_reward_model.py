"""Linear models find linear rewards, and predict a step without having seen it."""

import numpy as np
from absl.testing import absltest

from streamserve.bandits.reward_model import fit_linear


def data(num_steps, noise=0.5):
    """Give features, arms, every arm's mean reward and the rewards; one feature is constant."""
    generator = np.random.default_rng(0)
    x_T = generator.random(num_steps)
    means_TA = np.array([1.0, 3.0, 2.0]) + x_T[:, None] * np.array([2.0, -1.0, 6.0])
    arms_T = generator.integers(3, size=num_steps)
    rewards_T = means_TA[np.arange(num_steps), arms_T] + noise * generator.standard_normal(num_steps)
    return np.stack([x_T, np.ones(num_steps)], axis=1), arms_T, means_TA, rewards_T


def fitted(features_TD, arms_T, rewards_T, ridge=1.0):
    return fit_linear(features_TD, arms_T, rewards_T, num_arms=3, ridge=ridge, folds=4)


class FitLinearTest(absltest.TestCase):
    def test_finds_linear_rewards(self):
        features_TD, arms_T, means_TA, rewards_T = data(3000, noise=0.01)
        np.testing.assert_allclose(fitted(features_TD, arms_T, rewards_T), means_TA, atol=0.05)

    def test_a_step_is_predicted_without_itself_and_its_neighbours(self):
        features_TD, arms_T, _, rewards_T = data(300)
        before_TA = fitted(features_TD, arms_T, rewards_T)
        rewards_T[:75] += 50.0  # the first of 4 folds
        after_TA = fitted(features_TD, arms_T, rewards_T)
        np.testing.assert_array_equal(after_TA[:75], before_TA[:75])
        self.assertGreater(np.abs(after_TA[75:] - before_TA[75:]).min(), 1.0)

    def test_the_scale_of_a_feature_does_not_matter_but_the_penalty_does(self):
        features_TD, arms_T, _, rewards_T = data(300)
        plain_TA = fitted(features_TD, arms_T, rewards_T)
        np.testing.assert_allclose(fitted(1e6 * features_TD + 1e3, arms_T, rewards_T), plain_TA, rtol=1e-6)
        flat_TA = fitted(features_TD, arms_T, rewards_T, ridge=1e9)
        self.assertLess(np.ptp(flat_TA[:75], axis=0).max(), 1e-3)
        self.assertGreater(np.ptp(plain_TA[:75], axis=0).max(), 1.0)

    def test_an_arm_without_steps_gets_the_mean(self):
        features_TD, arms_T = np.zeros((10, 1)), np.zeros(10, int)
        q_TA = fit_linear(features_TD, arms_T, np.full(10, 3.0), num_arms=2, ridge=1.0, folds=2)
        np.testing.assert_allclose(q_TA, 3.0)

    def test_refuses_impossible_fits(self):
        for changes in ({"ridge": 0.0}, {"folds": 1}, {"folds": 11}):
            settings = {"num_arms": 2, "ridge": 1.0, "folds": 2} | changes
            with self.assertRaisesRegex(ValueError, "impossible fit"):
                fit_linear(np.zeros((10, 1)), np.zeros(10, int), np.zeros(10), **settings)
        with self.assertRaisesRegex(ValueError, "shapes differ"):
            fit_linear(np.zeros((9, 1)), np.zeros(10, int), np.zeros(10), num_arms=2, ridge=1.0, folds=2)


if __name__ == "__main__":
    absltest.main()
