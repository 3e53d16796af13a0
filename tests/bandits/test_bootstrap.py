"""Resamples of blocks know that neighbours are alike, and are otherwise those of the plain bootstrap."""

import math

import numpy as np
from absl.testing import absltest, parameterized

from streamserve.bandits.bootstrap import Bootstrap, resampled_means
from streamserve.bandits.offpolicy import Choices, ips, snips


def bootstrap(seed=0, mean_block=1.0, repeats=200):
    return Bootstrap(mean_block=mean_block, seed=seed, repeats=repeats)


def interval(boot):
    """Estimate from 100 fair choices among two arms, of which the second earns more."""
    arms_T = np.random.default_rng(0).integers(2, size=100)
    choices = Choices(arms_T, np.full(100, 0.5), np.tile([0.6, 0.4], (100, 1)))
    return ips(arms_T + np.linspace(0.0, 1.0, 100), choices, bootstrap=boot)


def correlated(seed, mean_block, num_steps=800, correlation=0.8):
    """Give the interval for a policy that takes arm 1, which earns 1 more, 4 times in 10; noise forgets slowly."""
    generator = np.random.default_rng([8, seed])
    noise = [float(generator.standard_normal())]
    for shock in generator.standard_normal(num_steps - 1).tolist():
        noise.append(correlation * noise[-1] + math.sqrt(1 - correlation**2) * shock)
    arms_T = generator.integers(2, size=num_steps)
    choices = Choices(arms_T, np.full(num_steps, 0.5), np.tile([0.6, 0.4], (num_steps, 1)))
    found = ips(arms_T + np.array(noise), choices, bootstrap=bootstrap(seed, mean_block, repeats=100))
    return found.low, found.high


class BootstrapTest(parameterized.TestCase):
    def test_blocks_cover_where_single_steps_pretend_to_know(self):
        single, blocks = (
            np.mean([low <= 0.4 <= high for low, high in (correlated(seed, mean_block) for seed in range(200))])
            for mean_block in (1.0, 40.0)
        )
        self.assertLess(single, 0.65)  # 0.49 is expected: the variance of a mean is 9 times that of independent steps
        self.assertBetween(blocks, 0.88, 0.995)

    def test_the_spread_is_that_of_the_mean(self):
        """For independent steps the resampled variance is the population's over T; a chi-square spread of it."""
        terms_TC = np.random.default_rng(0).standard_normal((500, 1))
        for mean_block in (1.0, 5.0):
            means_RC = resampled_means(terms_TC, bootstrap(1, mean_block, repeats=4000))
            self.assertAlmostEqual(means_RC.std() / (terms_TC.std() / math.sqrt(500)), 1.0, delta=0.15)
            self.assertAlmostEqual(means_RC.mean(), terms_TC.mean(), delta=0.003)

    def test_blocks_have_the_mean_length(self):
        """With the steps' numbers as terms, a resample is spread like T / mean_block independent ones."""
        terms_TC = np.arange(10_000.0)[:, None]
        means_RC = resampled_means(terms_TC, bootstrap(1, 50.0, repeats=1000))
        # A geometric length L has E[L^2] / E[L] = 2 * 50 - 1.
        expected = terms_TC.std() * math.sqrt(99 / 10_000)
        self.assertAlmostEqual(means_RC.std() / expected, 1.0, delta=0.1)

    def test_the_same_seed_gives_the_same_interval_and_another_one_another(self):
        first, second, third = (interval(bootstrap(seed)) for seed in (1, 1, 2))
        self.assertEqual(first, second)
        self.assertEqual(first.value, third.value)
        self.assertNotEqual(first.low, third.low)

    def test_a_higher_level_gives_a_wider_interval(self):
        narrow, wide = (interval(bootstrap()._replace(level=level)) for level in (0.5, 0.99))
        self.assertBetween(narrow.low, wide.low, narrow.high)
        self.assertLess(narrow.high, wide.high)

    @parameterized.parameters((0.8, 1.2816), (0.95, 1.96))
    def test_an_interval_of_independent_steps_has_the_normal_width(self, level, deviations):
        rewards_T = np.random.default_rng(0).standard_normal(500)
        choices = Choices(np.zeros(500, int), np.full(500, 0.5), np.tile([0.5, 0.5], (500, 1)))
        found = ips(rewards_T, choices, bootstrap=bootstrap(repeats=4000)._replace(level=level))
        width = (found.high - found.low) / (rewards_T.std() / math.sqrt(500))
        self.assertAlmostEqual(width / (2 * deviations), 1.0, delta=0.06)

    def test_the_interval_is_infinite_where_hardly_a_step_was_the_targets(self):
        probs_TA = np.tile([0.0, 1.0], (50, 1))
        arms_T = (np.arange(50) == 7).astype(int)
        found = snips(np.ones(50), Choices(arms_T, np.full(50, 0.1), probs_TA), bootstrap=bootstrap())
        self.assertEqual((found.value, found.low, found.high), (1.0, -math.inf, math.inf))
        self.assertEqual(found.effective_samples, 1.0)

    @parameterized.parameters({"mean_block": 0.5}, {"repeats": 0}, {"level": 1.0}, {"level": 0.0})
    def test_refuses_impossible_settings(self, **settings):
        with self.assertRaisesRegex(ValueError, "impossible: Bootstrap"):
            interval(bootstrap()._replace(**settings))


if __name__ == "__main__":
    absltest.main()
