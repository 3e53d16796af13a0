"""Exponential weights for rewards that may come from an adversary."""

import math
from typing import NamedTuple

import numpy as np

from streamserve.bandits.base import Decision, Policy

_LEAST = 1e-9  # probability below which an importance weight says nothing and only spoils sums


class Exp3State(NamedTuple):
    """What is known of A arms.

    Attributes:
      time: choices so far.
      loss_A: float64, sums of losses divided by their propensities.
    """

    time: int
    loss_A: np.ndarray


def draw(weight_A: np.ndarray, uniform: float) -> int:
    """Draw an index in proportion to weights; one without weight is never drawn.

    Args:
      weight_A: not negative, at least one above zero.
      uniform: in (0, 1].
    """
    sum_A = np.cumsum(weight_A)
    return int(np.searchsorted(sum_A, uniform * sum_A[-1]))


def exp3(num_arms: int, *, explore: float = 0.0) -> Policy:
    """Draw an arm in proportion to exp(-eta_t x its estimated losses), eta_t = sqrt(log A / (t A)).

    An arm that was drawn with probability p and gave reward r adds (1 - r) / p to its losses (Auer et al., SIAM J.
    Comput. 2002; with this eta in EXP3Spec, Hou et al., arXiv 2505.15141, algorithm 3). Feedback is the reward in
    [0, 1]; the context is not read.

    Args:
      num_arms: A.
      explore: probability of drawing among all arms alike instead; above zero an arm can return after a change.
    """

    def init() -> Exp3State:
        return Exp3State(0, np.zeros(num_arms))

    def choose(state: Exp3State, context: object, noise_A2: np.ndarray) -> tuple[Decision, Exp3State]:
        del context
        time = state.time + 1
        eta = math.sqrt(math.log(num_arms) / (time * num_arms))
        weight_A = np.exp(-eta * (state.loss_A - state.loss_A.min()))
        probability_A = (1.0 - explore) * weight_A / weight_A.sum() + explore / num_arms
        arm = draw(probability_A, noise_A2[0, 0])
        return Decision(arm, min(1.0, float(probability_A[arm]))), state._replace(time=time)

    def update(state: Exp3State, context: object, decision: Decision, reward: float) -> Exp3State:
        del context
        loss_A = state.loss_A.copy()
        loss_A[decision.arm] += (1.0 - min(1.0, max(0.0, reward))) / max(decision.propensity, _LEAST)
        return state._replace(loss_A=loss_A)

    return Policy(init=init, choose=choose, update=update)
