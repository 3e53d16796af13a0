"""Thompson sampling over depths."""

import numpy as np

from streamserve.bandits import Policy, gaussian_thompson
from streamserve.bandits.thompson import ThompsonState
from streamserve.specustream.depth import DepthContext, Plan, StepStats, whole
from streamserve.specustream.policies import rewards


def thompson(
    tiers: tuple[int, ...], slots: int, *, discount: float = 0.98, noise: float = 0.25, prior_weight: float = 0.1
) -> Policy:
    """Choose the depth whose tokens a second of a row, drawn from what is believed, are the most.

    Gaussian Thompson sampling with forgetting; see `bandits.gaussian_thompson` for its beliefs.

    Args:
      tiers: depths of the arms.
      slots: B.
      discount: what remains of a tick's weight after another one, a fraction.
      noise: deviation of one tick's reward as a fraction of the root mean square reward.
      prior_weight: ticks that the mean over all arms is worth.
    """
    del slots
    bandit = gaussian_thompson(len(tiers), discount=discount, noise=noise, prior_weight=prior_weight)

    def choose(state: ThompsonState, context: DepthContext, noise_A2: np.ndarray) -> tuple[Plan, ThompsonState]:
        decision, state = bandit.choose(state, None, noise_A2)
        return whole(context, *decision), state

    def update(state: ThompsonState, context: DepthContext, plan: Plan, stats: StepStats) -> ThompsonState:
        del context
        if not rewards.timed(stats):
            return state
        return bandit.update(state, None, plan, rewards.row_rate(stats))

    return Policy(init=bandit.init, choose=choose, update=update)
