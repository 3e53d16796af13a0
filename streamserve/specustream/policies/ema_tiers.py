"""Move along the tiers with the average number of accepted tokens."""

import bisect
from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import DepthContext, Plan, StepStats, whole


class EmaState(NamedTuple):
    """One controller for each of S ranges of the batch.

    Attributes:
      arm_S: int64, the arm that runs.
      ema_S: float64, accepted tokens a round of a row.
      rounds_S: int64, rounds so far.
    """

    arm_S: np.ndarray
    ema_S: np.ndarray
    rounds_S: np.ndarray


def _next_arm(arm: int, ema: float, tiers: tuple[int, ...], down: float, up: float) -> int:
    """Go down while the average is not above the tier below, or else up while it is near the tier."""
    if tiers[arm] == 0:
        return min(arm + 1, len(tiers) - 1)
    lower = arm
    while lower > 0 and ema <= max(tiers[lower - 1] - 0.5, 0.5 * (tiers[lower - 1] == 0)) + down:
        lower -= 1
    if lower < arm:
        return lower
    while arm < len(tiers) - 1 and ema > tiers[arm] - 0.5 + up:
        arm += 1
    return arm


def ema_tiers(
    tiers: tuple[int, ...],
    slots: int,
    *,
    batches: tuple[int, ...] = (1, 8, 32, 64),
    deepest: tuple[int, ...] = (7, 3, 1, 0),
    memory: float = 0.8,
    warm_up: int = 10,
    every: int = 5,
    down: float = -0.25,
    up: float = 0.0,
) -> Policy:
    """Follow an average of accepted tokens from tier to tier, each range of batch sizes for itself.

    The adaptive speculative steps of SGLang (`adaptive_spec_params.py`): ema = 0.8 ema + 0.2 x mean accepted tokens;
    every 5 rounds after 10, down a tier while ema <= tier below - 0.5 + down (0.5 + down if the one below is 0), else
    up while ema > tier - 0.5 + up. From tier 0 it goes to the next one, to see. SGLang lists candidates for each
    range; here they are the compiled tiers up to its deepest one, and it begins in their middle.

    Args:
      tiers: depths of the arms.
      slots: B.
      batches: rows from which each range holds, ascending.
      deepest: tokens a round, the most in each range; 0 is for good.
      memory: weight of the past in the average, a fraction.
      warm_up: rounds before the first decision.
      every: rounds from one decision to the next.
      down: tokens added to the average at which it goes down.
      up: tokens added to the average at which it goes up.

    Raises:
      ValueError: ranges and their deepest tiers are not of one number.
    """
    del slots
    if len(batches) != len(deepest) or not batches:
        raise ValueError(f"a deepest tier for each range of batches, got {batches=} {deepest=}")
    allowed = [tiers[: max(bisect.bisect_right(tiers, most), 1)] for most in deepest]

    def init() -> EmaState:
        arm_S = np.array([len(mine) // 2 for mine in allowed], np.int64)
        ema_S = np.array([mine[arm] - 1.0 for mine, arm in zip(allowed, arm_S, strict=True)])
        return EmaState(arm_S, np.maximum(ema_S, 0.0), np.zeros(len(allowed), np.int64))

    def row(context: DepthContext) -> int:
        return max(bisect.bisect_right(batches, context.batch) - 1, 0)

    def choose(state: EmaState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, EmaState]:
        del noise_A2
        return whole(context, state.arm_S[row(context)]), state

    def update(state: EmaState, context: DepthContext, plan: Plan, stats: StepStats) -> EmaState:
        here, rows_R = row(context), stats.ran_BR.sum(axis=0)
        ran_R = rows_R > 0
        mean_R = np.maximum(stats.accepted_BR, 0).sum(axis=0)[ran_R] / rows_R[ran_R]
        arm_S, ema_S, rounds_S = state.arm_S.copy(), state.ema_S.copy(), state.rounds_S.copy()
        if tiers[plan.arm] > 0:
            ema = float(ema_S[here])
            for mean in mean_R.tolist():
                ema = memory * ema + (1.0 - memory) * mean
            ema_S[here] = ema
        rounds_S[here] += len(mean_R)
        decisions = [max(int(rounds) - warm_up, 0) // every for rounds in (state.rounds_S[here], rounds_S[here])]
        if decisions[1] > decisions[0]:
            arm_S[here] = _next_arm(int(arm_S[here]), float(ema_S[here]), allowed[here], down, up)
        return EmaState(arm_S, ema_S, rounds_S)

    return Policy(init=init, choose=choose, update=update)
