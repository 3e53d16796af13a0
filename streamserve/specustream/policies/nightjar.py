"""A bandit that keeps its arm for a while and knows the price of starting to speculate."""

import math
from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.bandits.exp3 import draw
from streamserve.specustream.depth import DepthContext, Plan, StepStats, whole
from streamserve.specustream.policies import rewards


class NightjarState(NamedTuple):
    """One bandit for each of C ranges of the batch. A arms.

    Attributes:
      goodput_CA: float64, tokens a second, mean.
      count_CA: int64, ticks that it is the mean of.
      block_C: int64, number of the block, from one.
      bin_C: int64, number of the bin in its block, from one; 0 before the first.
      left_C: int64, plans left in the bin.
      arm_C: int64, the arm of the bin.
    """

    goodput_CA: np.ndarray
    count_CA: np.ndarray
    block_C: np.ndarray
    bin_C: np.ndarray
    left_C: np.ndarray
    arm_C: np.ndarray


def _width(block: int) -> int:
    """Bins in a block, and plans in each of them: ceil(sqrt(2^(block - 1)))."""
    return math.isqrt(2 ** (block - 1) - 1) + 1


def _losses(state: NightjarState, here: int, context: DepthContext) -> np.ndarray:
    """Seconds a token of each arm, the price of starting included; 0 where nothing is known, so that it is tried."""
    known_A = state.count_CA[here] > 0
    loss_A = np.zeros(len(known_A))
    np.divide(1.0, state.goodput_CA[here], out=loss_A, where=known_A)
    if context.previous >= 0 and context.tiers_A[context.previous] == 0:
        starts_A = known_A & (context.tiers_A > 0)
        loss_A += starts_A * context.switch_A / np.maximum(context.tiers_A, 1)
    return loss_A


def nightjar(tiers: tuple[int, ...], slots: int, *, least_goodput: float = 1e-3) -> Policy:
    """Minimise 1 / goodput(batch, depth) + [depth was 0 and is not] price of the switch / depth, by ADA-BINGREEDY.

    Nightjar (Li et al., arXiv 2512.22420, equation 4 and algorithm 1). Time is cut into blocks, block j for 2^(j-1)
    plans, and a block into bins. The arm of a bin is fixed: in the b-th of its block it is drawn among all with
    probability 1 / b, and is the best so far otherwise. Each range of batch sizes (1, 2, 3-4, 5-8, ...) is a bandit of
    its own. Our reading: a block of h plans has ceil(sqrt h) bins of ceil(sqrt h) plans; the ranges; and an arm that
    was never measured counts as best. Moving draft weights out of memory is not part of this.

    Args:
      tiers: depths of the arms.
      slots: B.
      least_goodput: tokens a second, which a tick counts for at least.
    """
    arms, ranges = len(tiers), (slots - 1).bit_length() + 1

    def init() -> NightjarState:
        zero_C = np.zeros(ranges, np.int64)
        none_CA = np.zeros((ranges, arms), np.int64)
        return NightjarState(np.zeros((ranges, arms)), none_CA, zero_C + 1, zero_C, zero_C, zero_C)

    def range_of(context: DepthContext) -> int:
        return min((max(context.batch, 1) - 1).bit_length(), ranges - 1)

    def open_bin(state: NightjarState, here: int, context: DepthContext, uniform: float) -> tuple[Plan, NightjarState]:
        block, number = int(state.block_C[here]), int(state.bin_C[here]) + 1
        if number > _width(block):
            block, number = block + 1, 1
        probability_A = np.full(arms, 1.0 / number / arms)
        probability_A[np.argmin(_losses(state, here, context))] += 1.0 - 1.0 / number
        arm = draw(probability_A, uniform)
        block_C, bin_C, left_C, arm_C = (part.copy() for part in state[2:])
        block_C[here], bin_C[here], left_C[here], arm_C[here] = block, number, _width(block) - 1, arm
        state = NightjarState(state.goodput_CA, state.count_CA, block_C, bin_C, left_C, arm_C)
        return whole(context, arm, min(1.0, probability_A[arm])), state

    def choose(state: NightjarState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, NightjarState]:
        here = range_of(context)
        if state.left_C[here] == 0:
            return open_bin(state, here, context, noise_A2[0, 0])
        left_C = state.left_C.copy()
        left_C[here] -= 1
        return whole(context, state.arm_C[here]), state._replace(left_C=left_C)

    def update(state: NightjarState, context: DepthContext, plan: Plan, stats: StepStats) -> NightjarState:
        if not rewards.timed(stats):
            return state
        at = range_of(context), plan.arm
        goodput_CA, count_CA = state.goodput_CA.copy(), state.count_CA.copy()
        count_CA[at] += 1
        goodput_CA[at] += (max(rewards.lane_rate(stats), least_goodput) - goodput_CA[at]) / count_CA[at]
        return state._replace(goodput_CA=goodput_CA, count_CA=count_CA)

    return Policy(init=init, choose=choose, update=update)
