"""Bandits over depths, with tokens per verification or tokens per second for a reward."""

from typing import Any, NamedTuple

import numpy as np

from streamserve.bandits import Policy, exp3, ucb
from streamserve.specustream.depth import DepthContext, Plan, StepStats, whole
from streamserve.specustream.policies import rewards


class BanditSpecState(NamedTuple):
    """A bandit and the range of its rewards.

    Attributes:
      bandit: its state.
      width: largest less smallest reward; tokens, or tokens a second.
    """

    bandit: Any
    width: float


def ucbspec(
    tiers: tuple[int, ...], slots: int, *, delta: float = 0.05, per_second: bool = False, memory: float = 0.999
) -> Policy:
    """Choose the depth of the largest upper confidence bound: UCBSpec (Hou et al., arXiv 2505.15141, algorithm 2).

    The published reward is y in [1, L + 1], the tokens of a verification, L the deepest tier. It knows no time, so
    that deep arms win whatever they cost. `per_second` divides it by the measured seconds of a round; rewards are then
    kept in tokens a second, and the range that scales the bound runs from zero to the largest reward seen, which loses
    a factor `memory` with each reward.

    Args:
      tiers: depths of the arms.
      slots: B.
      delta: probability that a bound fails.
      per_second: reward tokens a second of a row.
      memory: what remains of the largest reward after another one, a fraction; read with `per_second` only.
    """
    del slots
    bandit = ucb(len(tiers), delta=delta)

    def init() -> BanditSpecState:
        return BanditSpecState(bandit.init(), 0.0 if per_second else float(max(tiers[-1], 1)))

    def choose(state: BanditSpecState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, BanditSpecState]:
        decision, inner = bandit.choose(state.bandit, 0.5 * state.width, noise_A2)
        return whole(context, *decision), state._replace(bandit=inner)

    def update(state: BanditSpecState, context: DepthContext, plan: Plan, stats: StepStats) -> BanditSpecState:
        del context
        earned = _earned(state, stats, per_second=per_second, memory=memory)
        if earned is None:
            return state
        reward, width = earned
        return BanditSpecState(bandit.update(state.bandit, 0.5 * width, plan, reward), width)

    return Policy(init=init, choose=choose, update=update)


def exp3spec(
    tiers: tuple[int, ...], slots: int, *, explore: float = 0.0, per_second: bool = False, memory: float = 0.999
) -> Policy:
    """Draw the depth by exponential weights: EXP3Spec (Hou et al., arXiv 2505.15141, algorithm 3).

    The loss of a verification is (L + 1 - y) / L, with y of `ucbspec`. With `per_second` the loss is 1 - y / (t width):
    t the seconds of a round and width the largest y / t seen, which loses a factor `memory` with each one.

    Args:
      tiers: depths of the arms.
      slots: B.
      explore: probability of drawing among all depths alike; published as 0.
      per_second: reward tokens a second of a row.
      memory: what remains of the largest reward after another one, a fraction; read with `per_second` only.
    """
    del slots
    bandit = exp3(len(tiers), explore=explore)

    def init() -> BanditSpecState:
        return BanditSpecState(bandit.init(), 0.0 if per_second else float(max(tiers[-1], 1)))

    def choose(state: BanditSpecState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, BanditSpecState]:
        decision, inner = bandit.choose(state.bandit, None, noise_A2)
        return whole(context, *decision), state._replace(bandit=inner)

    def update(state: BanditSpecState, context: DepthContext, plan: Plan, stats: StepStats) -> BanditSpecState:
        del context
        earned = _earned(state, stats, per_second=per_second, memory=memory)
        if earned is None:
            return state
        reward, width = earned
        least = 0.0 if per_second else 1.0
        scaled = (reward - least) / width if width > 0.0 else 0.0
        return BanditSpecState(bandit.update(state.bandit, None, plan, scaled), width)

    return Policy(init=init, choose=choose, update=update)


def _earned(state: BanditSpecState, stats: StepStats, *, per_second: bool, memory: float) -> tuple[float, float] | None:
    """Give the reward of a tick and the width of rewards after it; None where nothing was measured."""
    if not per_second:
        return (rewards.tokens_per_verification(stats), state.width) if rewards.ran(stats) else None
    if not rewards.timed(stats):
        return None
    reward = rewards.row_rate(stats)
    return reward, max(memory * state.width, reward)


def ucbspec_rate(tiers: tuple[int, ...], slots: int, *, delta: float = 0.05, memory: float = 0.999) -> Policy:
    """Build `ucbspec` with `per_second`: tokens a second of a row for a reward."""
    return ucbspec(tiers, slots, delta=delta, per_second=True, memory=memory)


def exp3spec_rate(tiers: tuple[int, ...], slots: int, *, explore: float = 0.02, memory: float = 0.999) -> Policy:
    """Build `exp3spec` with `per_second`, and with some exploration: depth 0 may be best for a long time, then not."""
    return exp3spec(tiers, slots, explore=explore, per_second=True, memory=memory)
