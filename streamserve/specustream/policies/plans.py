"""From what a policy wants to a plan that can run."""

import numpy as np

from streamserve.specustream.depth import NOT_RUN, DepthContext, Plan, whole

SHORTEST_S = 1e-9  # s, least time of a round that is divided by


def cover(context: DepthContext, wanted_B: np.ndarray) -> Plan:
    """Plan a depth for each slot, with the smallest arm that has them all.

    Args:
      context: of the choice.
      wanted_B: int, drafted tokens a round; empty slots do not count, and nobody gets more than the deepest arm.
    """
    deepest = int(np.max(wanted_B, where=context.holder_B != NOT_RUN, initial=0))
    arm = min(int(np.searchsorted(context.tiers_A, deepest)), len(context.tiers_A) - 1)
    depth_B = np.minimum(np.maximum(wanted_B, 0), context.tiers_A[arm]).astype(np.int32)
    return Plan(arm=arm, propensity=1.0, depth_B=depth_B)


def probe(plan: Plan, context: DepthContext, idle: int, every: int) -> tuple[Plan, int]:
    """Let a policy that learns by drafting only find its way out of not drafting.

    Args:
      plan: what the policy would do.
      context: of the choice.
      idle: plans before this one, without a break, that drafted nothing.
      every: so many of them are followed by one plan with the smallest depth there is.

    Returns:
      The plan to run, and the new `idle`.
    """
    held_B = context.holder_B != NOT_RUN
    if plan.depth_B[held_B].any() or not held_B.any():
        return plan, 0 if held_B.any() else idle
    if idle < every:
        return plan, idle + 1
    arm = min(int(np.searchsorted(context.tiers_A, 0, side="right")), len(context.tiers_A) - 1)
    return whole(context, arm), 0
