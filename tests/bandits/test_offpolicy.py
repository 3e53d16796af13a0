"""Estimates are compared with the true value of a policy in small worlds where it is known."""

import math

import numpy as np
from absl.testing import absltest, parameterized

from streamserve.bandits.bootstrap import Bootstrap
from streamserve.bandits.offpolicy import Choices, doubly_robust, doubly_robust_rate, ips, ips_rate, snips
from streamserve.bandits.reward_model import fit_linear

NUM_ARMS, REPEATS = 3, 200
LIKELY = (0.88, 0.995)  # share of 200 intervals of 95% that cover: +-4 standard deviations, and bootstrap's own error


class World:
    """A context x in (0, 1); arm a earns `base_A[a] + slope_A[a] x`, in tokens and in seconds, plus noise.

    The logging policy is epsilon-greedy around a fixed arm; the target takes arm 2 if x is large, else mostly arm 1.
    """

    def __init__(self, seed, *, num_steps=300, epsilon=0.6, noise=0.5):
        generator = np.random.default_rng([7, seed])
        self.x_T = generator.random(num_steps)
        best_T = (self.x_T < 0.5).astype(int)
        explore_T = generator.random(num_steps) < epsilon
        arms_T = np.where(explore_T, generator.integers(NUM_ARMS, size=num_steps), best_T)
        propensities_T = epsilon / NUM_ARMS + (1 - epsilon) * (arms_T == best_T)
        self.choices = Choices(arms_T, propensities_T, self.target(self.x_T))
        steps = np.arange(num_steps)
        noise_T = generator.standard_normal(num_steps)
        self.tokens_T = self.tokens(self.x_T)[steps, arms_T] + noise * noise_T
        self.seconds_T = self.seconds(self.x_T)[steps, arms_T] * np.exp(0.1 * generator.standard_normal(num_steps))

    @staticmethod
    def target(x_T):
        large_T1 = (x_T > 0.7)[:, None]
        return np.where(large_T1, np.array([0.0, 0.1, 0.9]), np.array([0.1, 0.8, 0.1]))

    @staticmethod
    def tokens(x_T):
        return np.array([1.0, 3.0, 2.0]) + x_T[:, None] * np.array([2.0, -1.0, 6.0])

    @staticmethod
    def seconds(x_T):
        return np.array([0.2, 1.0, 2.0]) + x_T[:, None] * np.array([0.1, 0.5, 4.0])


def truth():
    """Give the target's mean tokens and its rate, by a fine grid over x."""
    x_T = (np.arange(100_000) + 0.5) / 100_000
    probs_TA, tokens_TA = World.target(x_T), World.tokens(x_T)
    seconds_TA = World.seconds(x_T) * math.exp(0.1**2 / 2)  # the mean of the lognormal noise
    tokens, seconds = ((probs_TA * values_TA).sum(axis=1).mean() for values_TA in (tokens_TA, seconds_TA))
    return tokens, tokens / seconds


def bootstrap(seed=0, mean_block=1.0, repeats=120):
    return Bootstrap(mean_block=mean_block, seed=seed, repeats=repeats)


def fitted(world, rewards_T):
    return fit_linear(world.x_T[:, None], world.choices.arms_T, rewards_T, num_arms=NUM_ARMS, ridge=1.0, folds=4)


def with_ips(world, boot):
    return ips(world.tokens_T, world.choices, bootstrap=boot)


def with_snips(world, boot):
    return snips(world.tokens_T, world.choices, bootstrap=boot)


def with_good_model(world, boot):
    return doubly_robust(world.tokens_T, world.choices, fitted(world, world.tokens_T), bootstrap=boot)


def with_wrong_model(world, boot):
    q_TA = np.stack([5.0 * world.x_T, -3.0 + 0 * world.x_T, 9.0 - world.x_T], axis=1)
    return doubly_robust(world.tokens_T, world.choices, q_TA, bootstrap=boot)


def with_ips_rate(world, boot):
    return ips_rate(world.tokens_T, world.seconds_T, world.choices, bootstrap=boot)


def with_model_rate(world, boot):
    models = fitted(world, world.tokens_T), fitted(world, world.seconds_T)
    return doubly_robust_rate(world.tokens_T, world.seconds_T, world.choices, *models, bootstrap=boot)


def repeated(estimate):
    return [estimate(World(seed), bootstrap(seed)) for seed in range(REPEATS)]


def coverage(estimates, value):
    return np.mean([found.low <= value <= found.high for found in estimates])


class TruthTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("ips", with_ips, 0),
        ("snips", with_snips, 0),
        ("doubly_robust_with_a_fitted_model", with_good_model, 0),
        ("doubly_robust_with_a_wrong_model", with_wrong_model, 0),
        ("ips_rate", with_ips_rate, 1),
        ("doubly_robust_rate", with_model_rate, 1),
    )
    def test_intervals_cover_the_true_value_and_estimates_are_unbiased(self, estimate, which):
        value, estimates = truth()[which], repeated(estimate)
        self.assertBetween(coverage(estimates, value), *LIKELY)
        values = np.array([found.value for found in estimates])
        self.assertLess(abs(values.mean() - value), 4 * values.std() / math.sqrt(REPEATS))
        self.assertTrue(all(found.low <= found.value <= found.high for found in estimates))

    def test_a_good_model_lowers_the_variance_and_self_normalising_does(self):
        spread = {
            estimate: np.std([estimate(World(seed), bootstrap(repeats=1)).value for seed in range(REPEATS)])
            for estimate in (with_ips, with_snips, with_good_model, with_wrong_model)
        }
        self.assertLess(spread[with_good_model], 0.6 * spread[with_ips])
        self.assertLess(spread[with_snips], 0.9 * spread[with_ips])
        self.assertGreater(spread[with_wrong_model], spread[with_good_model])

    def test_the_model_alone_would_be_wrong(self):
        world = World(0, num_steps=20_000)
        q_TA = np.stack([5.0 * world.x_T, -3.0 + 0 * world.x_T, 9.0 - world.x_T], axis=1)
        model = (q_TA * world.choices.target_probs_TA).sum(axis=1).mean()
        self.assertGreater(abs(model - truth()[0]), 1.0)
        self.assertAlmostEqual(with_wrong_model(world, bootstrap()).value, truth()[0], delta=0.2)

    def test_the_rate_is_not_the_mean_of_the_ticks_own_rates(self):
        world = World(1, num_steps=20_000)
        rate = truth()[1]
        mean = ips(world.tokens_T / world.seconds_T, world.choices, bootstrap=bootstrap())
        self.assertGreater(mean.low, rate + 0.1)
        self.assertAlmostEqual(with_ips_rate(world, bootstrap()).value, rate, delta=0.05)

    def test_on_the_logging_policy_itself_ips_is_the_mean(self):
        world = World(3)
        best_T = (world.x_T < 0.5).astype(int)
        probs_TA = 0.6 / NUM_ARMS + 0.4 * np.eye(NUM_ARMS)[best_T]
        choices = world.choices._replace(target_probs_TA=probs_TA)
        for estimate in (ips, snips):
            found = estimate(world.tokens_T, choices, bootstrap=bootstrap())
            self.assertAlmostEqual(found.value, world.tokens_T.mean())
            self.assertAlmostEqual(found.effective_samples, len(world.x_T))

    def test_self_normalised_estimates_shift_with_the_rewards(self):
        world = World(3)
        first = snips(world.tokens_T, world.choices, bootstrap=bootstrap())
        second = snips(world.tokens_T + 100.0, world.choices, bootstrap=bootstrap())
        np.testing.assert_allclose(np.array(second[:3]) - 100.0, first[:3])

    def test_clipping_takes_from_ips_and_bounds_the_weights(self):
        world = World(3)
        plain, clipped = (ips(world.tokens_T, world.choices, bootstrap=bootstrap(), clip=clip) for clip in (1e9, 1.5))
        self.assertLess(clipped.value, plain.value)
        self.assertGreater(clipped.effective_samples, plain.effective_samples)
        weights_T = world.choices.target_probs_TA[np.arange(300), world.choices.arms_T] / world.choices.propensities_T
        self.assertAlmostEqual(clipped.value, np.mean(np.minimum(weights_T, 1.5) * world.tokens_T))
        self.assertAlmostEqual(plain.effective_samples, weights_T.sum() ** 2 / (weights_T**2).sum())


class SupportTest(parameterized.TestCase):
    def choices(self, arms, propensities, probs):
        return Choices(np.array(arms), np.array(propensities), np.tile(np.array(probs), (len(arms), 1)))

    def mass(self, choices):
        return ips(np.ones(len(choices.arms_T)), choices, bootstrap=bootstrap()).unsupported_mass

    def test_arms_that_were_never_logged_are_reported(self):
        self.assertAlmostEqual(self.mass(self.choices([0, 1, 1], [0.5, 0.5, 0.5], [0.2, 0.5, 0.3])), 0.3)
        self.assertEqual(self.mass(self.choices([0, 1, 2], [0.5, 0.5, 0.5], [0.2, 0.5, 0.3])), 0.0)

    def test_what_a_certain_choice_excluded_is_reported(self):
        """Both arms are in the log, but a choice of probability 1 says that the other one was impossible there."""
        self.assertAlmostEqual(self.mass(self.choices([0, 1], [1.0, 1.0], [0.2, 0.8])), 0.5)
        self.assertAlmostEqual(self.mass(self.choices([0, 1], [1.0, 0.5], [0.2, 0.8])), 0.4)

    @parameterized.named_parameters(
        ("zero_propensity", {"propensities_T": np.array([0.5, 0.0])}, "propensity"),
        ("propensity_above_one", {"propensities_T": np.array([0.5, 1.1])}, "propensity"),
        ("nan_propensity", {"propensities_T": np.array([0.5, np.nan])}, "propensity"),
        ("unknown_arm", {"arms_T": np.array([0, 2])}, "an arm is not one of 2"),
        ("negative_arm", {"arms_T": np.array([0, -1])}, "an arm is not one of 2"),
        ("fractional_arm", {"arms_T": np.array([0.0, 0.5])}, "an arm is not one of 2"),
        ("no_distribution", {"target_probs_TA": np.array([[0.5, 0.5], [0.5, 0.4]])}, "not a distribution"),
        ("negative_probability", {"target_probs_TA": np.array([[0.5, 0.5], [1.5, -0.5]])}, "not a distribution"),
        ("other_length", {"arms_T": np.array([0, 1, 1])}, r"np.shape\(arms_T\)=\(3,\)"),
    )
    def test_refuses_choices_that_cannot_be_logged(self, changes, message):
        choices = self.choices([0, 1], [0.5, 0.5], [0.5, 0.5])._replace(**changes)
        with self.assertRaisesRegex(ValueError, message):
            ips(np.ones(2), choices, bootstrap=bootstrap())

    def test_refuses_rewards_and_times_that_cannot_be(self):
        choices, ones = self.choices([0, 1], [0.5, 0.5], [0.5, 0.5]), np.ones(2)
        with self.assertRaisesRegex(ValueError, "rewards_T: .*not finite"):
            ips(np.array([1.0, np.nan]), choices, bootstrap=bootstrap())
        with self.assertRaisesRegex(ValueError, r"rewards_T: of shape \(3,\) instead of \(2,\)"):
            snips(np.ones(3), choices, bootstrap=bootstrap())
        with self.assertRaisesRegex(ValueError, "took no time"):
            ips_rate(ones, np.array([1.0, 0.0]), choices, bootstrap=bootstrap())
        with self.assertRaisesRegex(ValueError, "q_TA"):
            doubly_robust(ones, choices, np.ones((2, 3)), bootstrap=bootstrap())
        with self.assertRaisesRegex(ValueError, "clip=0.0 is not positive"):
            ips(ones, choices, bootstrap=bootstrap(), clip=0.0)

    def test_refuses_to_normalise_by_nothing(self):
        choices = self.choices([0, 0], [0.5, 0.5], [0.0, 1.0])
        self.assertEqual(ips(np.ones(2), choices, bootstrap=bootstrap()).value, 0.0)
        with self.assertRaisesRegex(ValueError, "none of the logged choices"):
            snips(np.ones(2), choices, bootstrap=bootstrap())


if __name__ == "__main__":
    absltest.main()
