"""Laws of the generic bandits: what they promise of regret, of probabilities and of change."""

import functools
import math

import numpy as np
import pytest
from absl.testing import parameterized

from streamserve.bandits import Decision, HostPolicy, exp3, gaussian_thompson, ucb
from streamserve.bandits.exp3 import draw
from streamserve.bandits.ucb import radius

# A bandit that forgets never stops exploring: its regret a choice has a floor.
BANDITS = {"ucb": ucb, "exp3": exp3, "gaussian_thompson": functools.partial(gaussian_thompson, discount=1.0)}
MEANS_A = np.array([0.2, 0.5, 0.9])
HALF_RANGE = 0.5


def play(make, mean_TA, reward, seed=0, delay=0):
    """Arms that a bandit chooses when rewards of the given means come `delay` choices late."""
    host = HostPolicy(make(mean_TA.shape[1]), num_arms=mean_TA.shape[1], seed=seed)
    rng, arms, waiting = np.random.default_rng(seed + 1), [], []
    for mean_A in mean_TA:
        decision = host.choose(HALF_RANGE)
        waiting.append((decision, reward(rng, mean_A[decision.arm])))
        if len(waiting) > delay:
            host.update(HALF_RANGE, *waiting.pop(0))
        arms.append(decision.arm)
    return np.array(arms)


def bernoulli(rng, mean):
    return float(rng.random() < mean)


def gaussian(rng, mean):
    return float(mean + 0.1 * rng.standard_normal())


class BanditsTest(parameterized.TestCase):
    @parameterized.product(name=list(BANDITS), reward=[bernoulli, gaussian], delay=[0, 2])
    def test_regret_a_choice_shrinks(self, name, reward, delay):
        mean_TA = np.tile(MEANS_A, (900, 1))
        regret_ST = [MEANS_A.max() - MEANS_A[play(BANDITS[name], mean_TA, reward, seed, delay)] for seed in range(3)]
        third = np.mean(regret_ST, axis=0).reshape(3, -1).mean(axis=1)
        uniform = MEANS_A.max() - MEANS_A.mean()
        assert third[2] < 0.8 * third[0], third
        assert third[2] < 0.5 * uniform, third

    @parameterized.parameters(1, None, (Decision(1, 1.0),), ((Decision(1, 1.0), 0, 0),))
    def test_what_is_no_decision_and_state_is_told(self, answer):
        policy = BANDITS["ucb"](3)._replace(choose=lambda state, context, noise_A2: answer)
        with pytest.raises(TypeError, match=r"`choose` must return \(decision, state\), got "):
            HostPolicy(policy, num_arms=3, seed=0).choose(HALF_RANGE)

    @parameterized.product(name=list(BANDITS), delay=[0, 3])
    def test_every_arm_is_tried(self, name, delay):
        arms = play(BANDITS[name], np.tile(MEANS_A, (100, 1)), bernoulli, 5, delay)
        assert set(arms) == {0, 1, 2}

    @parameterized.parameters("exp3", "gaussian_thompson")
    def test_the_propensity_is_how_often_an_arm_is_chosen(self, name):
        policy, rng = BANDITS[name](3), np.random.default_rng(2)
        state = policy.init()
        for arm, reward in [(0, 0.2), (1, 0.4), (2, 0.5), (0, 0.5), (2, 0.6)]:
            state = policy.update(state, None, Decision(arm, 0.5), reward)
        noise_NA2 = 1.0 - rng.random((8000, 3, 2))
        decisions = [policy.choose(state, None, noise_A2)[0] for noise_A2 in noise_NA2]
        propensity = {decision.arm: decision.propensity for decision in decisions}
        assert abs(sum(propensity.values()) - 1.0) < 1e-3, propensity  # all three occur; the integral is a sum of 101
        for arm, probability in propensity.items():
            share = np.mean([decision.arm == arm for decision in decisions])
            assert abs(share - probability) < 0.025, (arm, share, probability)  # four deviations of the share

    def test_the_radius_is_that_of_the_paper(self):
        # n = 4, t = 10, A = 3, delta = 0.1: 2 sqrt(5 / 16 (1 + 2 log(3 x 100 x sqrt 5 / 0.1)))
        expected = 2.0 * math.sqrt(5 / 16 * (1 + 2 * math.log(3 * 100 * math.sqrt(5) / 0.1)))
        np.testing.assert_allclose(radius(np.array([4, 1, 1]), 10, 2.0, 0.1)[0], expected, rtol=1e-12)

    def test_exp3_weighs_losses_by_propensity_and_by_its_rate(self):
        policy = exp3(2)
        _, state = policy.choose(policy.init(), None, np.full((2, 2), 0.9))
        state = policy.update(state, None, Decision(0, 0.25), 0.5)  # loss (1 - 0.5) / 0.25 = 2
        np.testing.assert_allclose(state.loss_A, [2.0, 0.0])
        decision, _ = policy.choose(state, None, np.full((2, 2), 1e-9))  # t = 2
        weight = math.exp(-2.0 * math.sqrt(math.log(2) / 4))
        assert decision.arm == 0
        assert abs(decision.propensity - weight / (1.0 + weight)) < 1e-12

    def test_exp3_explores_with_the_probability_it_was_told(self):
        policy = exp3(4, explore=0.2)
        state = policy.update(policy.init(), None, Decision(0, 1e-9), 0.0)  # a loss beyond recovery
        decision, _ = policy.choose(state, None, np.full((4, 2), 1e-9))
        assert decision == Decision(0, pytest.approx(0.05))

    def test_a_weight_of_zero_is_never_drawn(self):
        weight_A = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
        assert {draw(weight_A, uniform) for uniform in (1e-300, 0.29, 0.31, 1.0)} == {1, 3}

    def test_thompson_sampling_notices_that_the_best_arm_has_changed(self):
        mean_TA = np.concatenate([np.tile([0.3, 0.9], (300, 1)), np.tile([0.9, 0.3], (300, 1))])
        arms = play(gaussian_thompson, mean_TA, gaussian)
        assert np.mean(arms[200:300] == 1) > 0.8
        assert np.mean(arms[500:] == 0) > 0.8

    def test_thompson_sampling_does_not_depend_on_the_unit_of_rewards(self):
        def thousandfold(rng, mean):
            return 1000.0 * gaussian(rng, mean)

        mean_TA = np.tile(MEANS_A, (100, 1))
        plain, scaled = play(gaussian_thompson, mean_TA, gaussian), play(gaussian_thompson, mean_TA, thousandfold)
        np.testing.assert_array_equal(plain, scaled)
