"""Upper confidence bounds for rewards of any range that do not drift."""

import math
from typing import NamedTuple

import numpy as np

from streamserve.bandits.base import Decision, Policy


class UCBState(NamedTuple):
    """What is known of A arms.

    Attributes:
      chosen_A: int64, choices so far.
      count_A: int64, rewards so far; fewer while some are under way.
      mean_A: float64, mean reward, in the reward's unit.
    """

    chosen_A: np.ndarray
    count_A: np.ndarray
    mean_A: np.ndarray


def radius(count_A: np.ndarray, time: int, half_range: float, delta: float) -> np.ndarray:
    """Bound how far a mean may be from the truth, with a self-normalised inequality.

    half_range sqrt((1 + n) / n^2 (1 + 2 log(A t^2 sqrt(1 + n) / delta))): the confidence of UCBSpec (Hou et al., arXiv
    2505.15141, algorithm 2), where half_range is L / 2.

    Args:
      count_A: n, rewards of each arm, at least one.
      time: t, the number of this choice, from one.
      half_range: half the width of the interval that holds all rewards.
      delta: probability that a bound fails.
    """
    more_A = 1.0 + count_A
    log_A = math.log(len(count_A) * time**2 / delta) + 0.5 * np.log(more_A)
    return half_range * np.sqrt(more_A * (1.0 + 2.0 * log_A)) / count_A


def ucb(num_arms: int, *, delta: float = 0.05) -> Policy:
    """Choose the arm with the largest mean plus radius, each arm once before.

    The context of a choice is `half_range` of `radius`, in the reward's unit: who does not know it beforehand may hand
    in what has been seen so far. Feedback is the reward.

    Args:
      num_arms: A.
      delta: probability that a bound fails; no unit.
    """

    def init() -> UCBState:
        return UCBState(np.zeros(num_arms, np.int64), np.zeros(num_arms, np.int64), np.zeros(num_arms))

    def choose(state: UCBState, half_range: float, noise_A2: np.ndarray) -> tuple[Decision, UCBState]:
        del noise_A2
        unknown_A = state.count_A == 0
        if unknown_A.any():
            # While first rewards are under way, the arm that has been asked for least.
            arm = int(np.argmin(np.where(unknown_A, state.chosen_A, np.iinfo(np.int64).max)))
        else:
            time = int(state.chosen_A.sum()) + 1
            arm = int(np.argmax(state.mean_A + radius(state.count_A, time, half_range, delta)))
        chosen_A = state.chosen_A.copy()
        chosen_A[arm] += 1
        return Decision(arm, 1.0), state._replace(chosen_A=chosen_A)

    def update(state: UCBState, half_range: float, decision: Decision, reward: float) -> UCBState:
        del half_range
        count_A, mean_A = state.count_A.copy(), state.mean_A.copy()
        count_A[decision.arm] += 1
        mean_A[decision.arm] += (reward - mean_A[decision.arm]) / count_A[decision.arm]
        return state._replace(count_A=count_A, mean_A=mean_A)

    return Policy(init=init, choose=choose, update=update)
