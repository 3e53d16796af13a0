"""Thompson sampling for rewards of any scale that may drift."""

import math
from typing import NamedTuple

import numpy as np

from streamserve.bandits.base import Decision, Policy

_LEAST = 1e-9  # propensity that an arm is given at least: the integral below can round to zero


class ThompsonState(NamedTuple):
    """Discounted sums over rewards of A arms.

    Attributes:
      weight_A: float64, of ones.
      total_A: float64, of rewards, in their unit.
      square: of squared rewards, over all arms.
    """

    weight_A: np.ndarray
    total_A: np.ndarray
    square: float


def _beliefs(state: ThompsonState, noise: float, prior_weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of what is believed of each arm's reward."""
    weight = float(state.weight_A.sum())
    if not state.square > 0.0:
        return np.zeros(len(state.weight_A)), np.ones(len(state.weight_A))
    pool, scale = float(state.total_A.sum()) / weight, math.sqrt(state.square / weight)
    known_A = state.weight_A + prior_weight
    return (state.total_A + prior_weight * pool) / known_A, noise * scale / np.sqrt(known_A)


def gaussian_thompson(
    num_arms: int, *, discount: float = 0.98, noise: float = 0.25, prior_weight: float = 0.1
) -> Policy:
    """Draw every arm's reward from what is believed of it and choose the largest.

    Beliefs are normal with mean (S_a + w m) / (N_a + w) and deviation `noise` x rms / sqrt(N_a + w): N_a and S_a are
    sums of ones and of rewards that lose a factor `discount` with each reward of any arm, m and rms are the mean and
    root mean square over all arms, w is `prior_weight`. An arm that is not chosen is forgotten, hence tried again (Qi
    et al., arXiv 2305.10718, algorithm 1; the prior and the scale from the data are ours). The propensity is the
    integral of the arm's density times the other arms' distribution functions. Feedback is the reward; the context is
    not read.

    Args:
      num_arms: A.
      discount: what remains of a reward's weight after another one; no unit.
      noise: deviation of one reward as a fraction of the root mean square.
      prior_weight: rewards that the mean over all arms is worth.
    """
    grid_N = np.linspace(-8.0, 8.0, 1601)
    normal_N = np.array([0.5 * (1.0 + math.erf(z / math.sqrt(2.0))) for z in grid_N])
    point_Q = np.linspace(-5.0, 5.0, 101)
    mass_Q = np.exp(-0.5 * point_Q**2)
    mass_Q /= mass_Q.sum()

    def propensity(arm: int, mean_A: np.ndarray, deviation_A: np.ndarray) -> float:
        value_Q1 = (mean_A[arm] + deviation_A[arm] * point_Q)[:, None]
        below_QA = np.interp((value_Q1 - mean_A) / deviation_A, grid_N, normal_N)
        below_QA[:, arm] = 1.0
        return min(1.0, max(_LEAST, float(mass_Q @ below_QA.prod(axis=1))))

    def init() -> ThompsonState:
        return ThompsonState(np.zeros(num_arms), np.zeros(num_arms), 0.0)

    def choose(state: ThompsonState, context: object, noise_A2: np.ndarray) -> tuple[Decision, ThompsonState]:
        del context
        mean_A, deviation_A = _beliefs(state, noise, prior_weight)
        normal_A = np.sqrt(-2.0 * np.log(noise_A2[:, 0])) * np.cos(2.0 * np.pi * noise_A2[:, 1])  # Box and Muller
        arm = int(np.argmax(mean_A + deviation_A * normal_A))
        return Decision(arm, propensity(arm, mean_A, deviation_A)), state

    def update(state: ThompsonState, context: object, decision: Decision, reward: float) -> ThompsonState:
        del context
        weight_A, total_A = discount * state.weight_A, discount * state.total_A
        weight_A[decision.arm] += 1.0
        total_A[decision.arm] += reward
        return ThompsonState(weight_A, total_A, discount * state.square + float(reward) ** 2)

    return Policy(init=init, choose=choose, update=update)
