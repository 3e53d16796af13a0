"""One depth, always."""

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import DepthContext, Plan, StepStats
from streamserve.specustream.policies.plans import cover


def fixed(tiers: tuple[int, ...], slots: int, *, depth: int = 4) -> Policy:
    """Draft the same number of tokens in every round of every row (Leviathan et al., arXiv 2211.17192).

    Args:
      tiers: depths of the arms.
      slots: B.
      depth: tokens a round; at most the deepest tier is drafted.
    """
    del tiers

    def init() -> tuple[()]:
        return ()

    def choose(state: tuple[()], context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, tuple[()]]:
        del noise_A2
        return cover(context, np.full(slots, depth)), state

    def update(state: tuple[()], context: DepthContext, plan: Plan, stats: StepStats) -> tuple[()]:
        del context, plan, stats
        return state

    return Policy(init=init, choose=choose, update=update)
