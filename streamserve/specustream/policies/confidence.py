"""Stop drafting when the draft is not sure of its token."""

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import DepthContext, Plan, StepStats, StopRule, whole


def confidence_stop(tiers: tuple[int, ...], slots: int, *, threshold: float = 0.4) -> Policy:
    """Draft up to the deepest tier, until a token's draft probability is below a threshold.

    This is `assistant_confidence_threshold` of Hugging Face's assisted generation with its default, held constant: the
    simplest of the rules that DISCO (Mamou et al., arXiv 2405.04304) compares with.

    Args:
      tiers: depths of the arms.
      slots: B.
      threshold: probability of the drafted token, below which the next one is not drafted.
    """
    del slots

    def init() -> tuple[()]:
        return ()

    def choose(state: tuple[()], context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, tuple[()]]:
        del noise_A2
        plan = whole(context, len(tiers) - 1)
        return plan._replace(rule=StopRule.CONFIDENCE, threshold=threshold), state

    def update(state: tuple[()], context: DepthContext, plan: Plan, stats: StepStats) -> tuple[()]:
        del context, plan, stats
        return state

    return Policy(init=init, choose=choose, update=update)
