"""The depth of the largest predicted goodput."""

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats, whole
from streamserve.specustream.policies import acceptance
from streamserve.specustream.policies.plans import SHORTEST_S, probe

_SUREST = 0.9999  # acceptance at most: the geometric series has no closed form at one


def goodput(
    tiers: tuple[int, ...],
    slots: int,
    *,
    discount: float = 0.95,
    prior: float = 0.7,
    prior_weight: float = 4.0,
    probe_every: int = 32,
) -> Policy:
    """Choose the depth k with the most tokens a second, sum over rows i of (1 - a_i^(k+1)) / (1 - a_i) / T(k).

    The goodput of SmartSpec, since TurboSpec (Liu et al., arXiv 2406.14066, equations 2 to 4): a_i is a moving average
    of the row's acceptance and T(k) comes from the cost table. The prior of new rows and the probing out of depth 0 are
    ours.

    Args:
      tiers: depths of the arms.
      slots: B.
      discount: what remains of an observation after a tick, a fraction.
      prior: acceptance where nothing is known, a probability.
      prior_weight: observations that the lane's acceptance is worth to a row, and the prior to the lane.
      probe_every: plans without drafts before one with the smallest depth.
    """

    def init() -> acceptance.Watched:
        return acceptance.Watched(acceptance.nothing(slots, max(tiers[-1], 1)), 0)

    def choose(
        state: acceptance.Watched, context: DepthContext, noise_A2: np.ndarray
    ) -> tuple[Plan, acceptance.Watched]:
        del noise_A2
        counts = acceptance.seat(state.counts, context)
        accept_B1 = acceptance.estimate(acceptance.over_positions(counts), prior, prior_weight)
        accept_B1 = np.minimum(accept_B1[context.holder_B != NOT_RUN], _SUREST)
        tokens_BA = (1.0 - accept_B1 ** (context.tiers_A + 1)) / (1.0 - accept_B1)
        arm = int(np.argmax(tokens_BA.sum(axis=0) / np.maximum(context.cost_A, SHORTEST_S)))
        plan, idle = probe(whole(context, arm), context, state.idle, probe_every)
        return plan, acceptance.Watched(counts, idle)

    def update(state: acceptance.Watched, context: DepthContext, plan: Plan, stats: StepStats) -> acceptance.Watched:
        del plan
        return state._replace(counts=acceptance.learn(state.counts, context, stats, discount))

    return Policy(init=init, choose=choose, update=update)
