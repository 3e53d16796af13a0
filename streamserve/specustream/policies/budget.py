"""A budget of verified tokens, spent where it is most likely to be accepted."""

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, StepStats
from streamserve.specustream.policies import acceptance
from streamserve.specustream.policies.plans import SHORTEST_S, cover, probe


def spend(survival_BK: np.ndarray, rows: int, context: DepthContext) -> np.ndarray:
    """Take the most likely tokens, as many as give the most tokens a second.

    Among m = 0, 1, ... take the m largest survivals; each slot then has a depth, the smallest arm that covers them all
    a price, and m a rate (rows + sum of survivals) / price. A slot's survivals fall with depth, so that what is taken
    of it is a prefix.

    Args:
      survival_BK: probability that a slot's first k tokens are all accepted; 0 for empty slots.
      rows: slots that are held.
      context: of the choice.

    Returns:
      int [B], the depths at the best m.
    """
    survival_KB = survival_BK.T  # equal ones: the shallower first
    order_M = np.argsort(-survival_KB, axis=None, kind="stable")
    position_M, slot_M = np.divmod(order_M, survival_BK.shape[0])
    deepest_M = np.concatenate([[0], np.maximum.accumulate(position_M + 1)])
    tokens_M = rows + np.concatenate([[0.0], np.cumsum(survival_KB.ravel()[order_M])])
    arm_M = np.searchsorted(context.tiers_A, deepest_M)
    best = int(np.argmax(tokens_M / np.maximum(context.cost_A[arm_M], SHORTEST_S)))
    return np.bincount(slot_M[:best], minlength=survival_BK.shape[0])


def budget(
    tiers: tuple[int, ...],
    slots: int,
    *,
    discount: float = 0.95,
    prior: float = 0.7,
    prior_weight: float = 4.0,
    probe_every: int = 32,
) -> Policy:
    """Spread as many drafted tokens over the slots as give the most tokens a second.

    The verification budget of DSpark (Cheng et al., arXiv 2607.05147, objective tokens x steps per second) and the
    greedy choice of TETRIS (Wu et al., arXiv 2502.15197), before drafting: with survivals from each slot's past in the
    place of a trained head or of the draft's own probabilities, and with the price of the compiled depth.

    Args:
      tiers: depths of the arms.
      slots: B.
      discount: what remains of an observation after a tick, a fraction.
      prior: acceptance of a position of which nothing is known, a probability.
      prior_weight: observations that the lane's acceptance is worth to a slot, and the prior to the lane.
      probe_every: plans without drafts before one with the smallest depth.
    """

    def init() -> acceptance.Watched:
        return acceptance.Watched(acceptance.nothing(slots, tiers[-1]), 0)

    def choose(
        state: acceptance.Watched, context: DepthContext, noise_A2: np.ndarray
    ) -> tuple[Plan, acceptance.Watched]:
        del noise_A2
        counts = acceptance.seat(state.counts, context)
        held_B = context.holder_B != NOT_RUN
        survival_BK = np.cumprod(acceptance.estimate(counts, prior, prior_weight), axis=1) * held_B[:, None]
        wanted_B = spend(survival_BK, int(np.count_nonzero(held_B)), context)
        plan, idle = probe(cover(context, wanted_B), context, state.idle, probe_every)
        return plan, acceptance.Watched(counts, idle)

    def update(state: acceptance.Watched, context: DepthContext, plan: Plan, stats: StepStats) -> acceptance.Watched:
        del plan
        return state._replace(counts=acceptance.learn(state.counts, context, stats, discount))

    return Policy(init=init, choose=choose, update=update)
