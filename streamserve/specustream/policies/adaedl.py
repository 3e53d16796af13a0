"""Stop drafting when the draft's entropy says that acceptance is unlikely."""

from typing import NamedTuple

import numpy as np

from streamserve.bandits import Policy
from streamserve.specustream.depth import DepthContext, Plan, StepStats, StopRule, whole


class AdaEDLState(NamedTuple):
    """Two averages.

    Attributes:
      acceptance: accepted of drafted tokens, a fraction.
      threshold: lambda, a lower bound of acceptance.
    """

    acceptance: float
    threshold: float


def adaedl(
    tiers: tuple[int, ...],
    slots: int,
    *,
    start: float = 0.6,
    target: float = 0.9,
    step: float = 0.01,
    acceptance_memory: float = 0.5,
    threshold_memory: float = 0.9,
) -> Policy:
    """Draft up to the deepest tier, while 1 - sqrt(0.2 entropy) is at least a threshold that follows acceptance.

    AdaEDL (Agrawal et al., arXiv 2410.18351). After each round, with r its accepted of drafted tokens:
    acceptance = 0.5 acceptance + 0.5 r; threshold' = threshold + 0.01 if acceptance is below 0.9, else
    threshold - 0.01, but unchanged if everything was accepted at full depth; threshold = 0.9 threshold + 0.1
    threshold'. Published for one row, here a round pools its rows. Two things are ours: the threshold stays in [0, 1],
    and falls after a round that drafted nothing, which could teach nothing else.

    Args:
      tiers: depths of the arms.
      slots: B.
      start: threshold at first, a probability.
      target: acceptance below which the threshold rises, a fraction.
      step: by which the threshold' differs, a probability.
      acceptance_memory: weight of the past in the acceptance, a fraction.
      threshold_memory: weight of the past in the threshold, a fraction.
    """
    del slots

    def init() -> AdaEDLState:
        return AdaEDLState(target, start)

    def choose(state: AdaEDLState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, AdaEDLState]:
        del noise_A2
        plan = whole(context, len(tiers) - 1)
        return plan._replace(rule=StopRule.ENTROPY, threshold=state.threshold), state

    def update(state: AdaEDLState, context: DepthContext, plan: Plan, stats: StepStats) -> AdaEDLState:
        del context
        acceptance, threshold = state
        accepted_R = np.maximum(stats.accepted_BR, 0).sum(axis=0).tolist()
        drafted_R = np.maximum(stats.drafted_BR, 0).sum(axis=0).tolist()
        most_R = (stats.ran_BR * plan.depth_B[:, None]).sum(axis=0).tolist()
        for accepted, drafted, most in zip(accepted_R, drafted_R, most_R, strict=True):
            if most == 0:  # nobody was there, or nobody was to draft
                continue
            change = -step
            if drafted > 0:
                acceptance = acceptance_memory * acceptance + (1.0 - acceptance_memory) * accepted / drafted
                change = step if acceptance < target else -step * (accepted != most)
            threshold = min(1.0, max(0.0, threshold + (1.0 - threshold_memory) * change))
        return AdaEDLState(acceptance, threshold)

    return Policy(init=init, choose=choose, update=update)
