"""The yardstick: the depth of most expected tokens a second, by an acceptance that only synthetic outcomes reveal."""

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import DepthContext, Plan, StepStats, expected_tokens, whole


def oracle(tiers: tuple[int, ...], slots: int) -> Policy:
    """Build the policy that knows the acceptance: argmax of expected tokens / predicted time, tick by tick.

    Args:
      tiers: depths, one an arm.
      slots: unused.

    Returns:
      A policy whose `choose` raises ValueError where the acceptance is not known.
    """
    del tiers, slots

    def choose(state: None, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, None]:
        del noise_A2
        if context.acceptance_K is None:
            raise ValueError("the oracle needs synthetic outcomes: no acceptance is known here")
        goodput_A = expected_tokens(context.acceptance_K, context.tiers_A) / context.cost_A
        return whole(context, int(goodput_A.argmax())), state

    def update(state: None, context: DepthContext, plan: Plan, stats: StepStats) -> None:
        del context, plan, stats
        return state

    return Policy(init=lambda: None, choose=choose, update=update)
